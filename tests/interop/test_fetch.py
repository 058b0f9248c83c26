"""Files from a folder or from the web: whole, continued, checked."""

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edm2.extras import MissingExtra
from edm2.interop import fetch as fetching
from edm2.interop.fetch import check_there, fetch

CONTENT = bytes(range(256)) * 40


class Server:
    """A web server of one file that can be told to cut connections, change the file, or not to continue."""

    def __init__(self) -> None:
        self.content, self.tag, self.cut, self.ranges, self.no_head = CONTENT, "v1", 0, True, 0
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
                if self.path != "/folder/a%20file.pkl":
                    return self.send_error(404 if "busy" not in self.path else 503)
                if head and outer.no_head:
                    return self.send_error(outer.no_head)
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted) if wanted and outer.ranges else None
                start = int(found[1]) if found else 0
                end = int(found[2]) + 1 if found and found[2] else len(outer.content)
                body = outer.content[start:end]
                self.send_response(206 if found else 200)
                if found:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(outer.content)}")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", outer.tag)
                self.end_headers()
                if not head:
                    self.wfile.write(body[: outer.cut] if outer.cut else body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/folder"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", fetching.SOURCE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


NAME = "a file.pkl"


def test_download_is_whole_and_made_once(server: Server, tmp_path: Path) -> None:
    path = fetch(NAME, server.address + "/", tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest().upper())
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert fetch(NAME, server.address, tmp_path) == path
    assert server.requests == ["HEAD all", "GET all"]


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_download_is_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cut, server.ranges = 1000, ranges
    with pytest.raises(
        OSError, match=r"could not be downloaded \(.*1000.*\): give the same command again to continue"
    ):
        fetch(NAME, server.address, tmp_path)
    assert not (tmp_path / NAME).exists()
    server.cut = 0
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "GET bytes=1000-"


def test_parts_of_two_versions_are_never_joined(server: Server, tmp_path: Path) -> None:
    server.cut = 1000
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch(NAME, server.address, tmp_path)
    server.cut, server.tag, server.content = 0, "v2", CONTENT[::-1]
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT[::-1]


def test_part_that_is_whole_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.cut = 1000
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch(NAME, server.address, tmp_path)
    (part,) = tmp_path.iterdir()
    part.write_bytes(CONTENT)
    assert fetch(NAME, server.address, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "HEAD all"


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
    with pytest.raises(ValueError, match=r"holds no other\.pkl: download it there"):
        check_there([NAME, "other.pkl"], str(tmp_path))


def test_a_download_with_another_hash_is_deleted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another sha256 than abc: .* the download was deleted; give"):
        fetch(NAME, server.address, tmp_path, sha256="abc")
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(ValueError, match="hf://me names no repository of the hub: write hf://OWNER/NAME"):
        fetch(NAME, "hf://me", tmp_path / "out")


def test_hub_without_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingExtra, match=r"hf://me/release needs the package 'huggingface_hub', .*\.\[hub\]"
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
    with pytest.raises(OSError, match="it has 10240 bytes, more than the 5000 that are expected at most"):
        fetch(NAME, server.address, tmp_path)


def test_no_server_no_folder_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fetching.SOURCE_VARIABLE, raising=False)
    with pytest.raises(OSError, match=r"could not be downloaded .*refused"):
        fetch(NAME, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(ValueError, match=r"is of the kind 'ftp': give an http or https address, hf"):
        fetch(NAME, "ftp://127.0.0.1", tmp_path)
    with pytest.raises(ValueError, match=r"is of the kind 'file'"):
        fetch(NAME, "file:///etc", tmp_path)
    with pytest.raises(
        ValueError, match=r"has to come from somewhere: give --from \(or EDM2_RELEASED_FROM\)"
    ):
        fetch(NAME, None, tmp_path)
    with pytest.raises(ValueError, match=r"holds no a file\.pkl: download it there, or give another --from"):
        fetch(NAME, str(tmp_path), tmp_path / "out")


def test_folders_are_used_in_place_and_hashes_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    monkeypatch.setenv(fetching.SOURCE_VARIABLE, str(tmp_path))
    assert fetch(NAME, None, tmp_path / "out") == tmp_path / NAME
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has another sha256 than abc: it is damaged or another file"):
        fetch(NAME, None, tmp_path / "out", sha256="abc")
