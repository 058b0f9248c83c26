"""Files from a folder, the web or the hub: whole, checked, and continued only when that is safe."""

import contextlib
import hashlib
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from edm2.extras import needed
from edm2.files import claimed, remedy, sha256_of, sync_folder
from edm2.progress import Progress, tell

_T = TypeVar("_T")
SOURCE_VARIABLE = "EDM2_RELEASED_FROM"
_HUB = "hf://"
_BLOCK = 1 << 20
_LARGEST = 16 << 30
_TIMEOUT_SECONDS = 60
# A connection that brings fewer bytes a second, over this many seconds, is given up.
_SLOWEST, _WINDOW_SECONDS = 10_000, 60.0


def fetch(name: str, source: str | None, folder: str | Path, *, sha256: str | None = None) -> Path:
    """Find a file in a folder, or download it.

    An interrupted download is continued if the server identifies the file (by ETag or Last-Modified) or its hash is
    known; otherwise it starts again, because the parts of two files could be joined.

    Args:
        name: Name of the file.
        source: A folder; an http(s) address to which `/name` is added; or `hf://OWNER/NAME`, with `/FOLDER` after
            it for a folder inside, of the Hugging Face hub, which keeps downloads in its own cache. Default: the
            environment's EDM2_RELEASED_FROM.
        folder: Folder for downloads; each lies in a folder of its own inside it, named after what identifies the file.
        sha256: Expected hash, hexadecimal.

    Returns:
        The file: in the source folder, in the hub's cache, or downloaded.

    Raises:
        ValueError: If no source is known, the file is not there, or its hash differs; a download with another hash is
            deleted.
        OSError: If the download fails; the part received is kept if it can be continued.
    """
    source = _known_source(name, source)
    if source.startswith(_HUB):
        path = _from_hub(name, source)
    elif "://" in source:
        path = _download(_address(name, source), name, Path(folder), sha256)
    else:
        path = _in_folder(name, source)
    if sha256 is not None and sha256_of(path) != sha256.lower():
        advice = "delete it and download it again"
        if Path(folder) in path.parents:
            path.unlink()
            advice = "the download was deleted; give the same command again, or check the hash"
        raise ValueError(f"the sha256 of {path} is not {sha256}: it is damaged or another file; {advice}")
    return path


def check_there(names: Sequence[str], source: str | None) -> None:
    """Make sure that a source has several files, before the first of them is fetched: they may have gigabytes.

    Args:
        names: The files.
        source: As for `fetch`. The hub says what it has only when a file is requested.

    Raises:
        ValueError: If one is missing; the message says which.
        OSError: If the source cannot be reached.
    """
    for name in names:
        known = _known_source(name, source)
        if known.startswith(_HUB):
            continue
        if "://" in known:
            _identify(_address(name, known))
        else:
            _in_folder(name, known)


def _known_source(name: str, source: str | None) -> str:
    source = source or os.environ.get(SOURCE_VARIABLE)
    if not source:
        raise ValueError(
            f"where is {name}? give --from (or {SOURCE_VARIABLE}) the folder that you downloaded it to, or the http(s) "
            "address of the folder in which its authors publish it"
        )
    return source


def _in_folder(name: str, folder: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{folder} does not contain {name}: download it there, or give another --from")
    return path


def _from_hub(name: str, source: str) -> Path:
    owner, _, rest = source.removeprefix(_HUB).strip("/").partition("/")
    repository, _, folder = rest.partition("/")
    if not owner or not repository:
        raise ValueError(f"{source} does not name a repository of the hub: write {_HUB}OWNER/NAME")
    with needed(source):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", name, subfolder=folder or None))
    except (EntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(
                f"{source} does not contain {name}: check the name and --from ({reason})"
            ) from error
        raise OSError(f"{name} could not be downloaded from {source} ({reason})") from error


def _address(name: str, source: str) -> str:
    scheme = urllib.parse.urlsplit(source).scheme
    if scheme not in ("http", "https"):
        raise ValueError(
            f"{source} is an address of the kind {scheme!r}: give an http or https address, {_HUB}OWNER/NAME, or a "
            "folder"
        )
    return f"{source.rstrip('/')}/{urllib.parse.quote(name)}"


class _Version(NamedTuple):
    """What a server says of a file: its size, and an ETag or date that tells its versions apart."""

    size: int | None
    validator: str | None


def _download(url: str, name: str, folder: Path, sha256: str | None) -> Path:
    version = _identify(url) if sha256 is None else _Version(None, None)
    identity = sha256.lower() if sha256 is not None else f"{url} {version.size} {version.validator}"
    path = folder / hashlib.sha256(identity.encode()).hexdigest()[:16] / name
    part = path.with_name(f"{name}.part")
    with claimed(path.parent, path):
        if sha256 is None and version.validator is None:
            # What is there may be of another file of the same size.
            path.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        if not path.exists():
            with _explained(url, part):
                _receive(url, part, version)
            os.replace(part, path)
            sync_folder(path.parent)
    return path


def _identify(url: str) -> _Version:
    """Ask the server about a file.

    Raises:
        ValueError: If there is no such file.
    """
    with _explained(url):
        try:
            with _open(url, method="HEAD") as head:
                size = _length(head.headers["Content-Length"])
        except urllib.error.HTTPError as error:
            if error.code not in (403, 405, 501):  # of servers, and signed addresses, that know GET alone
                raise
            with _open(url, {"Range": "bytes=0-0"}) as head:
                whole = head.headers.get("Content-Range", "").rpartition("/")[2].replace("*", "")
                size = _length((whole or None) if head.status == 206 else head.headers["Content-Length"])
    return _Version(size, _validator(head.headers))


def _length(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise OSError(f"its server gives the size {text[:40]!r}, which is not a number")
    return None if text is None else int(text)


def _validator(headers: Message) -> str | None:
    """A strong ETag, or else the date of the last change."""
    tag, date = headers["ETag"], headers["Last-Modified"]
    return str(tag) if tag and not tag.startswith("W/") else (str(date) if date else None)


@contextlib.contextmanager
def _explained(url: str, part: Path | None = None) -> Iterator[None]:
    """Turn errors of the connection into ones that say what to do."""
    try:
        yield
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise ValueError(f"there is no {url}: check the name, and the address given as --from") from None
        raise OSError(f"{url} could not be downloaded ({error}): try again later") from error
    except (OSError, HTTPException) as error:
        advice = "give the same command again to continue, or download it by other means and give its folder as --from"
        if isinstance(error, OSError) and remedy(error) == "make room":
            advice = f"make room for {part} and give the same command again"
        raise OSError(f"{url} could not be downloaded ({error}): {advice}") from error


def _receive(url: str, part: Path, version: _Version) -> None:
    """Append what is missing of a file."""
    have = part.stat().st_size if part.exists() else 0
    if have and have == version.size:
        return
    tell(f"downloading {url}")
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and version.validator is not None:
        headers["If-Range"] = version.validator
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":
            # Too long, or whole on a server that does not say so.
            part.unlink()
            _receive(url, part, version)
        return
    with response:
        if version.validator not in (None, _validator(response.headers)):
            raise OSError("the file changed on its server meanwhile")
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("its server sent another part than the one requested")
        _save(response, part, have if resumed else 0)


def _save(response: HTTPResponse, part: Path, have: int) -> None:
    length = _length(response.headers["Content-Length"])
    total = None if length is None else have + length
    _check_size(total or 0)
    started, received = time.monotonic(), 0
    with (
        open(part, "ab" if have else "wb") as file,
        Progress(f"download {part.stem}", total or 0, "bytes", done=have) as progress,
    ):
        # What has come, instead of waiting for a whole block.
        while block := _within(_TIMEOUT_SECONDS, lambda: response.read1(_BLOCK)):
            file.write(block)
            progress.advance(len(block))
            _check_size(progress.done)
            received += len(block)
            seconds = time.monotonic() - started
            if seconds > _WINDOW_SECONDS:
                if received < _SLOWEST * seconds:
                    raise OSError(f"only {received:,} bytes arrived in {seconds:.0f} s")
                started, received = time.monotonic(), 0
        file.flush()
        os.fsync(file.fileno())
    if total is not None and progress.done != total:
        raise OSError(f"the connection ended after {progress.done} of {total} bytes")


def _check_size(size: int) -> None:
    if size > _LARGEST:
        raise OSError(f"it has {size} bytes or more, and at most {_LARGEST} are expected")


def _open(url: str, headers: dict[str, str] | None = None, *, method: str = "GET") -> HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "edm2", **(headers or {})}, method=method)
    try:
        response = _within(
            _TIMEOUT_SECONDS, lambda: urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        )
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise
    assert isinstance(response, HTTPResponse)
    return response


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """Do something that the server can prolong without end, byte by byte, within a time."""
    done: queue.SimpleQueue[tuple[_T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise OSError(f"its server did not answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return cast("_T", result)
