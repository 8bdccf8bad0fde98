"""A released file is fetched once into the user's cache, and compared with what was recorded on every later use."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import FileServer
from filelock import FileLock
from huggingface_hub import constants
from safetensors.numpy import save

from pipeline.errors import CheckpointError
from pipeline.models import weights_cache
from pipeline.models.weights_cache import cached_path, fetch
from pipeline.runtime import threads

HUB_URL = "https://huggingface.co/ORG/net-small/resolve/main/model.safetensors"
SAFETENSORS = save({"weight": np.arange(30_000, dtype=np.float32)})


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "torch"


@pytest.fixture
def url(file_server: FileServer, tmp_path: Path) -> str:
    torch.save({"weight": torch.arange(30_000.0)}, tmp_path / "whole.pt")
    file_server.files["/v1/net(2).pt"] = (tmp_path / "whole.pt").read_bytes()
    return file_server.url("/v1/net(2).pt")


@pytest.fixture
def hub(file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    file_server.files["/ORG/net-small/resolve/main/model.safetensors"] = SAFETENSORS
    file_server.headers["X-Repo-Commit"] = "0" * 40
    monkeypatch.setattr(constants, "ENDPOINT", file_server.url(""))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_server.url("/{repo_id}/resolve/{revision}/{filename}")
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return file_server


def test_a_file_goes_where_torch_keeps_its_own_with_its_hash_beside_it(
    file_server: FileServer, url: str, torch_home: Path
) -> None:
    assert cached_path(url) is None
    fetched = fetch(url)
    assert fetched.path == torch_home / "hub/checkpoints/net(2).pt" == cached_path(url)
    assert fetched.sha256 == hashlib.sha256(file_server.files["/v1/net(2).pt"]).hexdigest()
    checked = subprocess.run(["sha256sum", "-c", "net(2).pt.sha256"], cwd=fetched.path.parent, capture_output=True)
    assert checked.returncode == 0
    assert fetch(url, offline=True) == fetched
    assert len(file_server.asked) == 1


def test_what_another_program_fetched_is_used_and_recorded(file_server: FileServer, url: str, torch_home: Path) -> None:
    path = torch_home / "hub/checkpoints/net(2).pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(file_server.files["/v1/net(2).pt"])
    assert fetch(url).path == path
    assert not file_server.asked
    assert path.with_name("net(2).pt.sha256").exists()


def test_a_cached_file_that_changed_is_refused(url: str) -> None:
    path = fetch(url).path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        CheckpointError, match=r"net\(2\)\.pt: hashes to \w{12}, but to \w{12} when it was fetched"
    ) as error:
        fetch(url)
    assert f"Delete {path} and net(2).pt.sha256 to fetch it again" in str(error.value)


def test_a_login_page_is_no_checkpoint(file_server: FileServer, url: str) -> None:
    file_server.files["/v1/net(2).pt"] = b"<html>Welcome to the hotel's network</html>"
    with pytest.raises(CheckpointError, match=r"what the server sent is no good: it begins with b'<html>Wel'"):
        fetch(url)
    assert cached_path(url) is None


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-40], lambda content: content.replace(b"\0\0\x80?", b"abcd")]
)
def test_a_file_that_was_cut_or_garbled_on_its_way_is_not_kept(file_server: FileServer, url: str, damage) -> None:
    file_server.files["/v1/net(2).pt"] = damage(file_server.files["/v1/net(2).pt"])
    with pytest.raises(CheckpointError, match=r"no good: .*(cut short or damaged|does not match its checksum)"):
        fetch(url)
    assert cached_path(url) is None


def test_offline_says_where_to_put_the_file(
    file_server: FileServer, url: str, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="not in the cache, and --offline or HF_HUB_OFFLINE forbids") as error:
        fetch(url)
    assert str(torch_home / "hub/checkpoints/net(2).pt") in str(error.value)
    assert not file_server.asked


def test_a_cache_for_reading_alone_serves(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(url).path
    path.with_name("net(2).pt.sha256").unlink()
    path.with_name("net(2).pt.sha256").symlink_to("/proc/nobody-writes-here")
    assert fetch(url).path == path


def test_a_file_on_the_hub_goes_to_its_own_cache_once(hub: FileServer, tmp_path: Path) -> None:
    assert cached_path(HUB_URL) is None
    fetched = fetch(HUB_URL)
    assert fetched.path.is_relative_to(tmp_path / "hub")
    assert fetched.sha256 == hashlib.sha256(SAFETENSORS).hexdigest()
    asked = len(hub.asked)
    assert fetch(HUB_URL) == fetched
    assert len(hub.asked) == asked
    assert cached_path(HUB_URL) == fetched.path


def test_a_file_of_the_hub_that_changed_is_refused(hub: FileServer) -> None:
    path = fetch(HUB_URL).path.resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=rf"when it was fetched: .* Delete {path} to fetch it again"):
        fetch(HUB_URL)


def test_a_file_that_the_hub_does_not_have_is_one_line(hub: FileServer) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: can't be fetched: .*404") as error:
        fetch(HUB_URL.replace("model", "absent"))
    assert "\n" not in str(error.value)


def test_no_way_to_the_hub_is_told_at_once(hub: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1:9 can't be reached"):
        fetch(HUB_URL)


def test_a_file_of_the_hub_that_another_program_keeps_locked_and_does_not_fetch_is_one_line(
    hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "PATIENCE_SECONDS", 1.0)
    locks = tmp_path / "hub/.locks/models--ORG--net-small"
    locks.mkdir(parents=True)
    with FileLock(locks / f"{hashlib.sha256(SAFETENSORS).hexdigest()}.lock"), pytest.raises(CheckpointError) as error:
        fetch(HUB_URL)
    assert "can't be fetched: its client: nothing has come of it for 1 s: it is at " in str(error.value)


def test_the_hubs_own_variables_are_respected(file_server: FileServer, hub: FileServer, tmp_path: Path) -> None:
    script = f"from pipeline.models.weights_cache import fetch; print(fetch({HUB_URL!r}).path)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": file_server.url("")}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "home/hub/models--ORG--net-small"))
    assert not done.stderr
    again = subprocess.run(
        [sys.executable, "-c", script], env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=True
    )
    assert again.stdout.decode() == done.stdout


@pytest.mark.parametrize(
    "variables", [{}, {"TORCH_HOME": "/somewhere/torch"}, {"XDG_CACHE_HOME": "/caches"}, {"TORCH_HOME": "~/t"}]
)
def test_torch_s_own_folder_is_found_without_importing_torch(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    expected = Path(torch.hub.get_dir())
    monkeypatch.delitem(sys.modules, "torch")
    assert weights_cache._torch_hub_folder() == expected
