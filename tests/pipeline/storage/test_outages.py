"""A server that is away for a while costs the wait, and not what was to be done."""

import time
from datetime import timedelta

import pytest
from object_servers import Fault, Proxy

from pipeline.errors import PipelineError, StorageUnavailableError
from pipeline.storage import files as storage
from pipeline.storage import outages
from pipeline.storage.outages import outlast


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.remote.stores._TRIES", 2)
    monkeypatch.setattr("pipeline.storage.remote.stores._FIRST_PAUSE", timedelta(milliseconds=10))
    monkeypatch.setattr("pipeline.storage.remote.stores._stores", {})
    monkeypatch.setattr(outages, "_PAUSE_SECONDS", 0.05)


def test_an_outage_is_waited_out_and_told(s3_proxy: Proxy, s3_folder: str) -> None:
    storage.publish_bytes(f"{s3_folder}/x", b"content")
    s3_proxy.faults = [Fault("status", 503, 9, "GET")]
    told: list[str] = []
    found = outlast(lambda: storage.read_bytes(f"{s3_folder}/x"), 20, lambda error: told.append(str(error)))
    assert found == b"content"
    assert len(told) == 4
    assert "answers 503" in told[0]


def test_one_that_lasts_longer_than_the_patience_is_an_error(s3_proxy: Proxy, s3_folder: str) -> None:
    s3_proxy.faults = [Fault("status", 503, 10_000, "GET")]
    asked = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="answers 503"):
        outlast(lambda: storage.read_bytes(f"{s3_folder}/x"), 0.5)
    assert time.monotonic() - asked >= 0.3


def test_whatever_else_goes_wrong_is_told_at_once(s3_folder: str) -> None:
    with pytest.raises(PipelineError, match="no such file"):
        outlast(lambda: storage.read_bytes(f"{s3_folder}/missing"), 1000)
