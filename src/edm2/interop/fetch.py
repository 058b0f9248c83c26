"""Files from a folder or from the web, whole and checked."""

import contextlib
import hashlib
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from edm2.extras import needed
from edm2.files import sha256_of
from edm2.progress import Progress

SOURCE_VARIABLE = "EDM2_RELEASED_FROM"
_HUB = "hf://"
_BLOCK = 1 << 20
_LARGEST = 16 << 30
_TIMEOUT_SECONDS = 60


def fetch(name: str, source: str | None, folder: str | Path, *, sha256: str | None = None) -> Path:
    """Find a file in a folder, or download it.

    A download that was cut off continues where it ended, if the file there is still the same.

    Args:
        name: the file's name.
        source: a folder; an http(s) address to which `/name` is added; or `hf://OWNER/NAME`, with `/FOLDER` after
            it for one inside, of the Hugging Face hub, which keeps downloads in its own cache. Default: the
            environment's EDM2_RELEASED_FROM.
        folder: where a download goes.
        sha256: expected hash, hexadecimal.

    Returns:
        The file: in the source folder, in the hub's cache, or downloaded.

    Raises:
        ValueError: if no source is known, the file is not in it, or its hash is another; a download with another
            hash is deleted.
        OSError: if the download fails; the part that came is kept.
    """
    source = _known_source(name, source)
    if source.startswith(_HUB):
        path = _from_hub(name, source)
    elif "://" in source:
        path = _download(_address(name, source), Path(folder) / name)
    else:
        path = Path(source) / name
        if not path.is_file():
            raise ValueError(f"{source} holds no {name}: download it there, or give another --from")
    if sha256 is not None and sha256_of(path) != sha256.lower():
        advice = "delete it and get it again"
        if path.parent == Path(folder):
            path.unlink()
            advice = "the download was deleted; give the same command again, or check the hash"
        raise ValueError(f"{path} has another sha256 than {sha256}: it is damaged or another file; {advice}")
    return path


def check_there(names: Sequence[str], source: str | None) -> None:
    """Make sure that a source has all of several files, before the first of them, of gigabytes, is fetched.

    Args:
        names: the files.
        source: as for `fetch`. What the hub has, it says only when a file is asked for.

    Raises:
        ValueError: if one is not there; it says which.
        OSError: if the source cannot be reached.
    """
    for name in names:
        known = _known_source(name, source)
        if known.startswith(_HUB):
            continue
        if "://" in known:
            _identify(_address(name, known))
        elif not (Path(known) / name).is_file():
            raise ValueError(f"{known} holds no {name}: download it there, or give another --from")


def _known_source(name: str, source: str | None) -> str:
    source = source or os.environ.get(SOURCE_VARIABLE)
    if not source:
        raise ValueError(
            f"{name} has to come from somewhere: give --from (or {SOURCE_VARIABLE}) the folder that you downloaded it "
            "to, or the http(s) address of the folder that its authors publish it in"
        )
    return source


def _from_hub(name: str, source: str) -> Path:
    owner, _, rest = source.removeprefix(_HUB).strip("/").partition("/")
    repository, _, folder = rest.partition("/")
    if not owner or not repository:
        raise ValueError(f"{source} names no repository of the hub: write {_HUB}OWNER/NAME")
    with needed(source):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", name, subfolder=folder or None))
    except (EntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"{source} holds no {name}: check the name and --from ({reason})") from error
        raise OSError(f"{name} could not be downloaded from {source} ({reason})") from error


def _address(name: str, source: str) -> str:
    scheme = urllib.parse.urlsplit(source).scheme
    if scheme not in ("http", "https"):
        raise ValueError(
            f"address {source} is of the kind {scheme!r}: give an http or https address, {_HUB}OWNER/NAME, or a folder"
        )
    return f"{source.rstrip('/')}/{urllib.parse.quote(name)}"


def _download(url: str, path: Path) -> Path:
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    size, version = _identify(url)
    # The part's name holds what identifies the file there, so that parts of two versions are never joined.
    identity = f"{url} {size} {version}"
    part = path.with_name(f".{path.name}.{hashlib.sha256(identity.encode()).hexdigest()[:12]}.part")
    if not (part.exists() and part.stat().st_size == size):
        with _explained(url):
            _receive(url, part)
    os.replace(part, path)
    return path


def _identify(url: str) -> tuple[int | None, str]:
    """Size of the file at an address, and what else tells its versions apart.

    Raises:
        ValueError: if there is none.
    """
    with _explained(url):
        try:
            with _open(url, {}, method="HEAD") as head:
                size = head.headers["Content-Length"]
        except urllib.error.HTTPError as error:
            if error.code not in (403, 405, 501):  # of servers, and signed addresses, that know GET alone
                raise
            with _open(url, {"Range": "bytes=0-0"}) as head:
                whole = head.headers.get("Content-Range", "").rpartition("/")[2]
                size = whole if head.status == 206 else head.headers["Content-Length"]
    digits = size if size is not None and size.isdecimal() else None
    return None if digits is None else int(digits), f"{head.headers['ETag']} {head.headers['Last-Modified']}"


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn errors of the connection into ones that say what to do."""
    try:
        yield
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise ValueError(f"there is no {url}: check the name, and the address given as --from") from None
        raise OSError(f"{url} could not be downloaded ({error}): try again later") from error
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{url} could not be downloaded ({error}): give the same command again to continue, or download it by"
            " other means and give its folder as --from"
        ) from error


def _receive(url: str, part: Path) -> None:
    """Append what is missing of a file."""
    have = part.stat().st_size if part.exists() else 0
    with _open(url, {"Range": f"bytes={have}-"} if have else {}) as response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        if total is not None and total > _LARGEST:
            raise OSError(f"it has {total} bytes, more than the {_LARGEST} that are expected at most")
        with (
            open(part, "ab" if resumed else "wb") as file,
            Progress(
                f"download {part.name[1:].rsplit('.', 2)[0]}", total or 0, "bytes", done=have
            ) as progress,
        ):
            while block := response.read(_BLOCK):
                file.write(block)
                progress.advance(len(block))
                if progress.done > _LARGEST:
                    raise OSError(f"it has more than the {_LARGEST} bytes that are expected at most")
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _open(url: str, headers: dict[str, str], *, method: str = "GET") -> HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "edm2", **headers}, method=method)
    response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    assert isinstance(response, HTTPResponse)
    return response
