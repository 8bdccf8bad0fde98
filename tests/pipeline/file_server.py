"""A web server on this machine, in place of the hosts of released weights, that can be told to misbehave."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong in one answer."""

    status: int = 200
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    length_error: int = 0
    """Added to the length that is announced."""
    wrong_start: bool = False
    """Send the range from its neighbour on."""


@dataclass
class Asked:
    """One request."""

    method: str
    target: str
    first_byte: int


@dataclass
class FileServer:
    """Serves `files`, whole or from a byte on; each answer takes the next of `faults`, if there is one."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with every answer."""
    port: int = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            content = server.files.get(re.sub(r"^http://[^/]+", "", self.path))
            etag = f'"{hashlib.sha256(content or b"").hexdigest()}"'
            if wanted and self.headers["If-Range"] not in (None, etag):
                wanted = None
            start = int(wanted[1]) if wanted else 0
            server.asked.append(Asked(self.command, self.path, start))
            fault = server.faults.pop(0) if with_body and server.faults else Fault()
            if content is None or fault.status >= 400 or start > len(content):
                self.send_error(fault.status if fault.status >= 400 else 404 if content is None else 416)
                return
            body = content[start + 1 if fault.wrong_start else start :]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header(
                    "Content-Range", f"bytes {start + fault.wrong_start}-{len(content) - 1}/{len(content)}"
                )
            self.send_header("Content-Length", str(len(body) + fault.length_error))
            self.send_header("ETag", etag)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                with suppress(ConnectionError):  # the reader may have given up
                    self.wfile.write(body[: fault.cut_after])

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serve() -> Iterator[FileServer]:
    """Run a server in a thread while the block lasts."""
    server = FileServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as http:
        server.port = http.server_port
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
