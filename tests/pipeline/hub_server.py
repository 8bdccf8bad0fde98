"""A look-alike of the Hub's HTTP interface on this machine: repositories that are made, filled in commits, and read."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class Hub:
    """What it holds, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    """`models/ORG/NAME/FILE` → content."""
    made: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of requests that made a repository."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files, by their sha256."""
    asked: list[str] = field(default_factory=list)
    """Paths of what was posted."""
    refuses: bool = False
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            hub.asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.refuses or not self.headers.get("Authorization"):
                self._answer(403 if hub.refuses else 401, {"error": "no"})
            elif self.path == "/api/repos/create":
                hub.made.append(json.loads(body))
                kind = "datasets/" if hub.made[-1].get("type") == "dataset" else ""
                name = f"{hub.made[-1]['organization']}/{hub.made[-1]['name']}"
                self._answer(200, {"url": f"{hub.address}/{kind}{name}"})
            elif self.path == "/api/validate-yaml":
                front_matter = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
                self._answer(200 if isinstance(front_matter, dict) else 400, {"errors": [], "warnings": []})
            elif self.path.endswith("/preupload/main"):
                asked = json.loads(body)["files"]
                told = [{"path": one["path"], "shouldIgnore": False} for one in asked]
                large = [one["path"].endswith((".safetensors", ".tar", ".parquet")) for one in asked]
                modes = ["lfs" if one else "regular" for one in large]
                self._answer(
                    200, {"files": [one | {"uploadMode": mode} for one, mode in zip(told, modes, strict=True)]}
                )
            elif self.path.endswith("/info/lfs/objects/batch"):
                wanted = json.loads(body)["objects"]
                action = {"upload": {"href": f"{hub.address}/put"}}
                objects = [
                    one | {"actions": {"upload": {"href": f"{action['upload']['href']}/{one['oid']}"}}}
                    for one in wanted
                ]
                self._answer(200, {"transfer": "basic", "objects": objects})
            elif match := re.match(r"/api/(models|datasets)/(.+)/commit/main", self.path):
                self._commit(f"{match[1]}/{match[2]}", body)
            else:
                self._answer(404, {"error": self.path})

        def _commit(self, repository: str, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[f"{repository}/{value['path']}"] = hub.objects[value["oid"]]
            name = repository.removeprefix("models/")
            commit = {"commitUrl": f"{hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            self._answer(200, commit)

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            hub.objects[self.path.rpartition("/")[2]] = content
            self._answer(200, {})

        def do_HEAD(self) -> None:
            self._send_file()

        def do_GET(self) -> None:
            self._send_file()

        def _send_file(self) -> None:
            match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
            content = hub.files.get(f"{(match[1] or 'models/') + match[2]}/{match[3]}") if match else None
            if content is None:
                self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})
                return
            etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
            self._answer(200, content, etag)

        def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run it in a thread while the block lasts."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as http:
        hub.port = http.server_port
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            http.shutdown()
            thread.join()
