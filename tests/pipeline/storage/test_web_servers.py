"""What web servers do that object stores don't: redirects, no HEAD, no byte ranges, users, tokens, odd names."""

import base64
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from pipeline.errors import PipelineError, StorageError
from pipeline.storage import files as storage
from pipeline.storage.remote import objects, stores

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class WebServer:
    """Serves CONTENT under every path of /data; the words `nohead`, `noranges`, `moved`, `private` in it say how."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path with query, Authorization."""
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                allowed = self.headers.get("Authorization")
                web.requests.append((self.command, self.path, allowed))
                if "moved" in self.path:
                    self.answer(302, b"", {"Location": self.path.replace("moved", "here")})
                elif "nohead" in self.path and self.command == "HEAD":
                    self.answer(405)
                elif "private" in self.path and allowed != f"Basic {base64.b64encode(b'anna:a b').decode()}":
                    self.answer(401)
                elif not urlsplit(self.path).path.startswith("/data"):
                    self.answer(404)
                elif "Range" in self.headers and "noranges" not in self.path:
                    first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                    last = min(last, len(CONTENT) - 1)
                    told = {"Content-Range": f"bytes {first}-{last}/{len(CONTENT)}"}
                    self.answer(206, CONTENT[first : last + 1], told) if first <= last else self.answer(416)
                else:
                    self.answer(200, CONTENT)

            def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
                self.send_response_only(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_GET = do_HEAD = handle_any  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.host}/data"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WebServer]:
    monkeypatch.setattr(stores, "_FIRST_PAUSE", timedelta(milliseconds=10))
    monkeypatch.setattr(stores, "_stores", {})
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web = WebServer()
    thread = threading.Thread(target=web.server.serve_forever, daemon=True)
    thread.start()
    yield web
    web.server.shutdown()
    web.server.server_close()
    thread.join()


@pytest.mark.parametrize("name", ["a.bin", "nohead.bin", "moved.bin", "noranges.bin", "moved nohead+noranges ü.bin"])
def test_a_file_is_read_whatever_the_server_can_not_do(
    web: WebServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = storage.join_path(web.url, name)
    for piece in (len(CONTENT) + 1, 300_000):
        monkeypatch.setattr(objects, "PIECE_BYTES", piece)
        assert storage.read_bytes(location) == CONTENT
        with storage.local_copy(location) as path:
            assert path.read_bytes() == CONTENT
    assert storage.exists(location)
    assert [file.size for file in storage.find_files(web.url, [name])] == [len(CONTENT)]
    if "noranges" not in name:
        assert storage.RangeReader(web.url).read(name, 1000, 10) == CONTENT[1000:1010]
        assert storage.RangeReader(web.url).read(name, len(CONTENT) + 10, 10) == b""
    assert {unquote(path) for _, path, _ in web.requests} <= {f"/data/{name}", f"/data/{name.replace('moved', 'here')}"}


def test_a_clip_behind_a_server_without_byte_ranges_is_an_error_that_says_so(web: WebServer) -> None:
    with pytest.raises(StorageError, match="ignores byte ranges") as caught:
        storage.RangeReader(web.url).read("noranges.tar", 1000, 10)
    assert "copy the folder here" in str(caught.value)


def test_what_is_not_there_or_not_allowed_is_told(web: WebServer) -> None:
    other = web.url.replace("/data", "/none")
    with pytest.raises(PipelineError, match="no such file"):
        storage.read_bytes(f"{other}/a.bin")
    assert not storage.exists(f"{other}/a.bin")
    assert storage.find_files(other, ["a.bin"]) == []
    with pytest.raises(StorageError, match=r"permission denied \(401\).*netrc"):
        storage.read_bytes(f"{web.url}/private.bin")
    for action in (storage.list_tree, storage.remove, lambda url: storage.publish_bytes(url, b"")):
        with pytest.raises(StorageError, match=r"web server|can only be read"):
            action(web.url)


def test_a_user_comes_from_the_url_or_from_netrc_and_a_token_goes_with_every_file(
    web: WebServer, tmp_path: Path
) -> None:
    with_user = web.url.replace("://", "://anna:a%20b@")
    assert storage.read_bytes(f"{with_user}/private.bin?token=x%2Fy") == CONTENT
    assert web.requests[-1][1] == "/data/private.bin?token=x%2Fy"
    folder = f"{with_user}/sub?token=x%2Fy"
    assert storage.RangeReader(folder).read("private one.tar", 5, 10) == CONTENT[5:15]
    assert web.requests[-1][1] == "/data/sub/private%20one.tar?token=x%2Fy"
    (tmp_path / "netrc").write_text('machine 127.0.0.1 login anna password "a b"\n')
    assert storage.read_bytes(f"{web.url}/private-too/a.bin") == CONTENT


@pytest.mark.parametrize("name", ["x%2Fy.bin", "x%2fy%20z.bin?sig=a%2Fb", "%FF.bin", "sub%2Fa/b.bin", "", "sub/"])
def test_a_signed_url_is_sent_as_it_is_spelt(web: WebServer, name: str) -> None:
    assert storage.read_bytes(f"{web.url}/{name}") == CONTENT
    assert web.requests[-1][1] == f"/data/{name}"


def test_requests_go_through_the_proxy_of_the_environment(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{web.host}")
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert storage.read_bytes("http://some.invalid/data/a.bin") == CONTENT
    assert web.requests[-1][1] == "http://some.invalid/data/a.bin"
