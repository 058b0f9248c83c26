"""Files from a folder or from the web: whole, continued, checked."""

import errno
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edm2.ema.storage.replacing import folder_lock
from edm2.extras import MissingExtra
from edm2.interop import fetch as fetching
from edm2.interop.fetch import check_there, fetch

CONTENT = bytes(range(256)) * 40


class Server:
    """A web server of one file that can be told to cut connections, change the file, or not to continue."""

    def __init__(self) -> None:
        self.content, self.cut, self.ranges, self.no_head = CONTENT, 0, True, 0
        self.tag: str | None = '"v1"'
        self.length: str | None = "right"
        self.pause = 0.0
        self.if_range = True
        self.drips_headers = False
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.reply(head=True)

            def do_GET(self) -> None:
                self.reply(head=False)

            def reply(self, *, head: bool) -> None:
                wanted = self.headers.get("Range")
                outer.requests.append(f"{self.command} {wanted or 'all'}")
                while outer.drips_headers:
                    self.wfile.write(b"H")
                    time.sleep(0.02)
                if self.path != "/folder/a%20file.pkl":
                    return self.send_error(404 if "busy" not in self.path else 503)
                if head and outer.no_head:
                    return self.send_error(outer.no_head)
                same = not outer.if_range or self.headers.get("If-Range") in (None, outer.tag)
                found = (
                    re.fullmatch(r"bytes=(\d+)-(\d*)", wanted) if wanted and outer.ranges and same else None
                )
                start = int(found[1]) if found else 0
                if start >= len(outer.content):
                    self.send_response(416)
                    if outer.length == "right":
                        self.send_header("Content-Range", f"bytes */{len(outer.content)}")
                    return self.end_headers()
                end = int(found[2]) + 1 if found and found[2] else len(outer.content)
                body = outer.content[start:end]
                self.send_response(206 if found else 200)
                if found:
                    whole = len(outer.content) if outer.length == "right" else "*"
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{whole}")
                if outer.length is not None:
                    right = outer.length == "right"
                    self.send_header("Content-Length", str(len(body)) if right else outer.length)
                if outer.tag is not None:
                    self.send_header("ETag", outer.tag)
                self.end_headers()
                for byte in [body[: outer.cut or None]] if not outer.pause else map(chr, body):
                    if not head:
                        self.wfile.write(byte if isinstance(byte, bytes) else byte.encode("latin1"))
                        time.sleep(outer.pause)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/folder"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", fetching.SOURCE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


NAME = "a file.pkl"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def cut_off(server: Server, folder: Path, **known: str) -> None:
    """A download that ends after 1000 bytes."""
    server.cut = 1000
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch(NAME, server.address, folder, **known)
    server.cut = 0


def test_download_is_whole_and_made_once(server: Server, tmp_path: Path) -> None:
    path = fetch(NAME, server.address + "/", tmp_path, sha256=SHA256.upper())
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == [NAME]
    assert fetch(NAME, server.address, tmp_path, sha256=SHA256) == path
    assert server.requests == ["GET all"]
    other = fetch(NAME, server.address, tmp_path)
    assert fetch(NAME, server.address, tmp_path) == other
    assert server.requests[1:] == ["HEAD all", "GET all", "HEAD all"]


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_download_is_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cut, server.ranges = 1000, ranges
    with pytest.raises(
        OSError, match=r"could not be downloaded \(.*1000.*\): give the same command again to continue"
    ):
        fetch(NAME, server.address, tmp_path)
    assert files_in(tmp_path) == [f"{NAME}.part"]
    server.cut = 0
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "GET bytes=1000-"


@pytest.mark.parametrize("if_range", [True, False])
def test_parts_of_two_versions_are_never_joined(server: Server, tmp_path: Path, if_range: bool) -> None:
    cut_off(server, tmp_path)
    server.tag, server.content = '"v2"', CONTENT[::-1]
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_file_that_changes_between_two_requests_is_not_joined(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(server, tmp_path)
    identify = fetching._identify

    def change_afterwards(url: str) -> Any:
        found = identify(url)
        server.tag, server.content, server.if_range = '"v2"', CONTENT[::-1], False
        return found

    monkeypatch.setattr(fetching, "_identify", change_afterwards)
    with pytest.raises(OSError, match="the file changed on its server meanwhile"):
        fetch(NAME, server.address, tmp_path)
    monkeypatch.undo()
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("tag", [None, 'W/"v1"'])
def test_without_a_validator_nothing_is_continued(server: Server, tmp_path: Path, tag: str | None) -> None:
    server.tag = tag
    cut_off(server, tmp_path)
    server.content = CONTENT[::-1]
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT[::-1]
    server.content = CONTENT
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert [request for request in server.requests if "bytes" in request] == []


def test_a_known_hash_allows_to_continue_without_a_validator(server: Server, tmp_path: Path) -> None:
    server.tag = None
    cut_off(server, tmp_path, sha256=SHA256)
    assert fetch(NAME, server.address, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert server.requests[-1] == "GET bytes=1000-"
    (tmp_path / "other").mkdir()
    cut_off(server, tmp_path / "other", sha256=SHA256)
    server.content = CONTENT[::-1]
    with pytest.raises(
        ValueError, match=r"is not .*: it is damaged or another file; the download was deleted"
    ):
        fetch(NAME, server.address, tmp_path / "other", sha256=SHA256)
    server.content = CONTENT
    assert fetch(NAME, server.address, tmp_path / "other", sha256=SHA256).read_bytes() == CONTENT


def test_part_that_is_whole_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    cut_off(server, tmp_path)
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(CONTENT)
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "HEAD all"


@pytest.mark.parametrize("length", [None, "right"])
@pytest.mark.parametrize("content", [CONTENT, CONTENT + b"more"])
def test_part_that_is_whole_or_too_long_ends(
    server: Server, tmp_path: Path, length: str | None, content: bytes
) -> None:
    cut_off(server, tmp_path, sha256=SHA256)
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(content)
    server.length = length
    assert fetch(NAME, server.address, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert files_in(tmp_path) == [NAME]


def test_a_server_that_gives_no_lengths(server: Server, tmp_path: Path, capsys: Any) -> None:
    server.length = None
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert f"downloading {server.address}/a%20file.pkl\n" in capsys.readouterr().err


@pytest.mark.parametrize("head", [0, 405])
def test_a_size_that_is_not_a_number(server: Server, tmp_path: Path, head: int) -> None:
    server.length, server.no_head = "abc", head
    server.ranges = not head
    with pytest.raises(
        OSError, match=r"its server gives the size 'abc', which is not a number.: give the same"
    ):
        fetch(NAME, server.address, tmp_path)


def test_a_connection_that_drips_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_WINDOW_SECONDS", 0.1)
    server.pause = 0.01
    started = time.monotonic()
    with pytest.raises(
        OSError, match=r"only \d+ bytes arrived in 0 s.: give the same command again to continue"
    ):
        fetch(NAME, server.address, tmp_path)
    assert time.monotonic() - started < 5
    server.pause = 0
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert re.fullmatch(r"GET bytes=\d+-", server.requests[-1])


def test_headers_that_drip_are_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_TIMEOUT_SECONDS", 0.3)
    server.drips_headers = True
    with pytest.raises(
        OSError, match=r"its server did not answer within 0\.3 s.: give the same command again"
    ):
        fetch(NAME, server.address, tmp_path)
    server.drips_headers = False
    monkeypatch.setattr(fetching, "_TIMEOUT_SECONDS", 30)
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT


def test_two_processes_do_not_write_one_part(server: Server, tmp_path: Path) -> None:
    cut_off(server, tmp_path)
    (part,) = tmp_path.rglob("*.part")
    with (
        folder_lock(part.parent),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        fetch(NAME, server.address, tmp_path)


def test_no_space_left_names_the_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetching, "_save", full)
    with pytest.raises(OSError, match=r"make room for .*a file\.pkl\.part and give the same command again"):
        fetch(NAME, server.address, tmp_path)


@pytest.mark.parametrize("code", [403, 405, 501])
@pytest.mark.parametrize("ranges", [True, False])
def test_servers_that_know_get_alone(server: Server, tmp_path: Path, code: int, ranges: bool) -> None:
    server.no_head, server.ranges, server.cut = code, ranges, 1000
    asked = ["HEAD all", "GET bytes=0-0"]
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch(NAME, server.address, tmp_path)
    server.cut = 0
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert server.requests == [*asked, "GET all", *asked, "GET bytes=1000-"]


def test_all_files_are_there_before_the_first_is_fetched(server: Server, tmp_path: Path) -> None:
    check_there([NAME], server.address)
    with pytest.raises(ValueError, match=r"there is no http.*/other\.pkl: check the name"):
        check_there([NAME, "other.pkl"], server.address)
    assert server.requests == ["HEAD all"] * 3
    (tmp_path / NAME).touch()
    check_there([NAME], str(tmp_path))
    with pytest.raises(ValueError, match=r"does not contain other\.pkl: download it there"):
        check_there([NAME, "other.pkl"], str(tmp_path))


def test_a_download_with_another_hash_is_deleted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not abc: .* the download was deleted; give"):
        fetch(NAME, server.address, tmp_path, sha256="abc")
    assert files_in(tmp_path) == []


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    commit = tmp_path / "models--me--release" / "snapshots" / ("0" * 40)
    (commit / "nets").mkdir(parents=True)
    (commit / "nets" / NAME).write_bytes(CONTENT)
    (tmp_path / "models--me--release" / "refs").mkdir()
    (tmp_path / "models--me--release" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = fetch(NAME, "hf://me/release/nets", tmp_path / "out")
    assert path.read_bytes() == CONTENT
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match=r"a file\.pkl could not be downloaded from hf://me/other \("):
        fetch(NAME, "hf://me/other", tmp_path / "out")
    with pytest.raises(
        ValueError, match="hf://me does not name a repository of the hub: write hf://OWNER/NAME"
    ):
        fetch(NAME, "hf://me", tmp_path / "out")


def test_hub_without_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingExtra, match=r"hf://me/release needs the package 'huggingface_hub', which the extra 'hub'"
    ):
        fetch(NAME, "hf://me/release", tmp_path)


def test_files_that_are_not_there_or_too_large(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"there is no http.*/other\.pkl: check the name, and the address"):
        fetch("other.pkl", server.address, tmp_path)
    with pytest.raises(OSError, match=r"could not be downloaded \(HTTP Error 503.*\): try again later"):
        fetch("busy.pkl", server.address, tmp_path)
    monkeypatch.setattr(fetching, "_LARGEST", 5000)
    with pytest.raises(OSError, match="it has 10240 bytes or more, and at most 5000 are expected"):
        fetch(NAME, server.address, tmp_path)


def test_no_server_no_folder_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fetching.SOURCE_VARIABLE, raising=False)
    with pytest.raises(OSError, match=r"could not be downloaded .*refused"):
        fetch(NAME, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(
        ValueError, match=r"is an address of the kind 'ftp': give an http or https address, hf"
    ):
        fetch(NAME, "ftp://127.0.0.1", tmp_path)
    with pytest.raises(ValueError, match=r"is an address of the kind 'file'"):
        fetch(NAME, "file:///etc", tmp_path)
    with pytest.raises(ValueError, match=r"where is a file\.pkl\? give --from \(or EDM2_RELEASED_FROM\)"):
        fetch(NAME, None, tmp_path)
    with pytest.raises(
        ValueError, match=r"does not contain a file\.pkl: download it there, or give another --from"
    ):
        fetch(NAME, str(tmp_path), tmp_path / "out")


def test_folders_are_used_in_place_and_hashes_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    monkeypatch.setenv(fetching.SOURCE_VARIABLE, str(tmp_path))
    assert fetch(NAME, None, tmp_path / "out") == tmp_path / NAME
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is not abc: it is damaged or another file"):
        fetch(NAME, None, tmp_path / "out", sha256="abc")
