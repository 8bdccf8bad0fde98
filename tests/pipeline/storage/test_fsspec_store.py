"""What goes through fsspec: the Hub's client, too, is not waited for without a limit."""

import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http as hub_client

from pipeline.errors import StorageUnavailableError
from pipeline.storage import files as storage
from pipeline.storage.remote import stores

REPOSITORY = {
    "id": "ORG/sounds",
    "sha": "0" * 40,
    "siblings": [],
    "private": False,
    "downloads": 0,
    "likes": 0,
    "tags": [],
}


class Silent(BaseHTTPRequestHandler):
    """Knows a repository, but says nothing when it is asked what files that has."""

    over = threading.Event()

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self.over.wait(60)
            return
        answer = json.dumps(REPOSITORY).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stores, "_SILENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(hub_client.time, "sleep", lambda seconds: None)  # between its tries
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield
        Silent.over.set()
        server.shutdown()


def test_a_hub_that_does_not_answer_is_told(silent_hub: None) -> None:
    started = time.monotonic()
    with pytest.raises(StorageUnavailableError, match=r"hf://datasets/ORG/sounds: .* does not answer \(timed out\)"):
        storage.list_files("hf://datasets/ORG/sounds")
    assert time.monotonic() - started < 30
