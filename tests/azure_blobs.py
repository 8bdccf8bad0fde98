"""A small server on loopback that answers as Azure's blob storage does, as far as obstore asks; signatures are checked.

Where `azurite-blob` (npm: azurite), Microsoft's own, is on the PATH, the same tests run against that as well.
"""

import base64
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen
from xml.etree import ElementTree

from object_servers import free_port, wait_until_it_answers

ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = base64.b64encode(b"a key of the tests, which opens nothing else").decode()
CONTAINER = "distill"


@contextmanager
def blob_server() -> Iterator[str]:
    """Serve one empty container while the block lasts; gives the account's URL."""
    blobs: dict[str, bytes] = {}
    blocks: dict[tuple[str, str], bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            container, _, name = unquote(parts.path).removeprefix(f"/{ACCOUNT}/").partition("/")
            if self.headers.get("Authorization") != _signed(
                self.command, parts.path, query, dict(self.headers.items())
            ):
                self.fail(403, "AuthenticationFailed")
            elif container != CONTAINER:
                self.fail(404, "ContainerNotFound")
            elif query.get("comp") == "list":
                self.list_blobs(query)
            elif query.get("comp") == "batch":
                self.remove(re.findall(rf"^DELETE /(?:{ACCOUNT}/)?{CONTAINER}/(\S+) HTTP", body.decode(), re.MULTILINE))
            elif self.command == "PUT":
                self.put(name, query, body)
            elif name not in blobs:
                self.fail(404, "BlobNotFound")
            elif self.command == "DELETE":
                del blobs[name]
                self.answer(202)
            else:
                self.get(blobs[name])

        def put(self, name: str, query: dict[str, str], body: bytes) -> None:
            if query.get("comp") == "block":
                blocks[name, query["blockid"]] = body
            elif query.get("comp") == "blocklist":
                blobs[name] = b"".join(blocks[name, one.text or ""] for one in ElementTree.fromstring(body))
            else:
                assert self.headers["x-ms-blob-type"] == "BlockBlob"
                blobs[name] = body
            self.answer(201, b"", {"ETag": _tag(body)})

        def get(self, content: bytes) -> None:
            known = {"ETag": _tag(content), "Last-Modified": formatdate(usegmt=True)}
            asked = re.fullmatch(
                r"bytes=(\d+)-(\d+)", self.headers.get("Range") or self.headers.get("x-ms-range") or ""
            )
            if not asked:
                self.answer(200, content, known)
                return
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            if first >= len(content):
                self.fail(416, "InvalidRange")
            else:
                known["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                self.answer(206, content[first : last + 1], known)

        def list_blobs(self, query: dict[str, str]) -> None:
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
            names = sorted(name for name in blobs if name.startswith(prefix) and name > query.get("marker", ""))
            rows, folders = [], set()
            for name in names:
                below = name.removeprefix(prefix)
                if delimiter and delimiter in below:
                    folders.add(prefix + below.partition(delimiter)[0] + delimiter)
                    continue
                told = {"Last-Modified": formatdate(usegmt=True), "Content-Length": len(blobs[name])}
                told |= {"Content-Type": "application/octet-stream", "Etag": _tag(blobs[name])}
                facts = "".join(f"<{key}>{value}</{key}>" for key, value in told.items())
                rows.append(f"<Blob><Name>{name}</Name><Properties>{facts}</Properties></Blob>")
            rows += [f"<BlobPrefix><Name>{folder}</Name></BlobPrefix>" for folder in sorted(folders)]
            self.answer(200, f"<EnumerationResults><Blobs>{''.join(rows)}</Blobs></EnumerationResults>".encode())

        def remove(self, names: list[str]) -> None:
            lines = []
            for number, name in enumerate(names):
                found = blobs.pop(unquote(name), None)
                lines += ["--many", "Content-Type: application/http", f"Content-ID: {number}", ""]
                lines += [f"HTTP/1.1 {404 if found is None else 202} Told", "x-ms-version: 2023-11-03", "", ""]
            content = "\r\n".join([*lines, "--many--", ""]).encode()
            self.answer(202, content, {"Content-Type": "multipart/mixed; boundary=many"})

        def fail(self, status: int, code: str) -> None:
            self.answer(status, f"<Error><Code>{code}</Code><Message>{code}.\nMore.</Message></Error>".encode())

        def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response_only(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/{ACCOUNT}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _signed(command: str, path: str, query: dict[str, str], headers: dict[str, str]) -> str:
    """Sign a request as the storage services' documentation says of `SharedKey`."""
    named = ["Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type", "Date"]
    named += ["If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range"]
    sent = {name.lower(): value for name, value in headers.items()}
    plain = [sent.get(name.lower(), "") for name in named]
    plain[2] = "" if plain[2] == "0" else plain[2]
    own = [f"{name}:{sent[name]}" for name in sorted(sent) if name.startswith("x-ms-")]
    lines = [command, *plain, *own, f"/{ACCOUNT}{path}", *(f"{name}:{query[name]}" for name in sorted(query))]
    made = hmac.digest(base64.b64decode(ACCOUNT_KEY), "\n".join(lines).encode(), "sha256")
    return f"SharedKey {ACCOUNT}:{base64.b64encode(made).decode()}"


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@contextmanager
def azurite() -> Iterator[str]:
    """Serve the same by Microsoft's emulator, with an empty container; gives the account's URL."""
    program = shutil.which("azurite-blob")
    assert program
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="azurite-") as folder:
        command = [program, "--blobPort", str(port), "--location", folder, "--silent", "--skipApiVersionCheck"]
        environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
        with subprocess.Popen(command, env=environment) as process:
            try:
                wait_until_it_answers(process, port)
                path, headers = (
                    f"/{ACCOUNT}/{CONTAINER}",
                    {"x-ms-version": "2023-11-03", "x-ms-date": formatdate(usegmt=True)},
                )
                headers["Authorization"] = _signed("PUT", path, {"restype": "container"}, headers)
                url = f"http://127.0.0.1:{port}{path}?restype=container"
                urlopen(Request(url, method="PUT", headers=headers), timeout=10).close()
                yield f"http://127.0.0.1:{port}/{ACCOUNT}"
            finally:
                process.terminate()
                process.wait(10)
