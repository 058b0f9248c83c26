"""Files from a folder or from the web, whole and checked."""

import hashlib
import os
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from edm2.files import sha256_of
from edm2.progress import Progress

SOURCE_VARIABLE = "EDM2_RELEASED_FROM"
_BLOCK = 1 << 20
_LARGEST = 16 << 30
_TIMEOUT_SECONDS = 60


def fetch(name: str, source: str | None, folder: str | Path, *, sha256: str | None = None) -> Path:
    """Find a file in a folder, or download it.

    A download that was cut off continues where it ended, if the file there is still the same.

    Args:
        name: the file's name.
        source: a folder, or an http(s) address to which `/name` is added. Default: the environment's
            EDM2_RELEASED_FROM.
        folder: where a download goes.
        sha256: expected hash, hexadecimal.

    Returns:
        The file: in the source folder, or downloaded.

    Raises:
        ValueError: if no source is known, the file is not in it, or its hash is another.
        OSError: if the download fails; the part that came is kept.
    """
    source = source or os.environ.get(SOURCE_VARIABLE)
    if not source:
        raise ValueError(
            f"{name} has to come from somewhere: give --from (or {SOURCE_VARIABLE}) the folder that you downloaded it "
            "to, or the http(s) address of the folder that its authors publish it in"
        )
    if "://" in source:
        path = _download(f"{source.rstrip('/')}/{urllib.parse.quote(name)}", Path(folder) / name)
    else:
        path = Path(source) / name
        if not path.is_file():
            raise ValueError(f"{source} holds no {name}: download it there, or give another --from")
    if sha256 is not None and sha256_of(path) != sha256.lower():
        raise ValueError(
            f"{path} has another sha256 than {sha256}: it is damaged or another file; delete it and get it again"
        )
    return path


def _download(url: str, path: Path) -> Path:
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ("http", "https"):
        raise ValueError(
            f"address {url} is of the kind {scheme!r}: give an http or https address, or a folder"
        )
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # The part's name holds what identifies the file there, so that parts of two versions are never joined.
    try:
        with _open(url, {}, method="HEAD") as head:
            identity = f"{url} {head.headers['Content-Length']} {head.headers['ETag']} {head.headers['Last-Modified']}"
        part = path.with_name(f".{path.name}.{hashlib.sha256(identity.encode()).hexdigest()[:12]}.part")
        if not (part.exists() and str(part.stat().st_size) == head.headers["Content-Length"]):
            _receive(url, part)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise ValueError(f"there is no {url}: check the name, and the address given as --from") from None
        raise OSError(f"{url} could not be downloaded ({error}): try again later") from error
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{url} could not be downloaded ({error}): give the same command again to continue, or download it by"
            " other means and give its folder as --from"
        ) from error
    os.replace(part, path)
    return path


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
