"""Released files of weights in the user's caches: fetched once, hashed, compared on every later use.

A file on the Hugging Face Hub lies in the Hub's own cache (`HF_HOME`), any other one where `torch.hub` and timm keep
theirs (`TORCH_HOME`, `hub/checkpoints`), so that what other programs have fetched is used, and the other way round.
"""

import logging
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from pipeline.errors import CheckpointError, StorageError
from pipeline.models.fetching import ask_host, download
from pipeline.models.weights import check_whole, sha256_of_file
from pipeline.runtime.threads import Threads
from pipeline.storage.files import publish_bytes

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
"""Set to 1 it forbids all fetching, as it does in Hugging Face's own programs."""

_log = logging.getLogger(__name__)
_HUB_FILE = re.compile(r"https://huggingface\.co/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<filename>.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedFile:
    """A released file on this machine."""

    path: Path
    sha256: str
    """Of its bytes; the one that was recorded when it came."""


def is_offline() -> bool:
    """Whether the environment forbids fetching."""
    return os.environ.get(OFFLINE_VARIABLE, "").upper() in {"1", "ON", "YES", "TRUE"}


def fetch(url: str, *, offline: bool | None = None) -> FetchedFile:
    """Returns a released file, from the cache or, the first time, from its host.

    Args:
        url: where its authors put it.
        offline: use what is in the cache alone; None asks the environment.

    Raises:
        CheckpointError: it isn't to be had, there is no room for it, or the cached file is no longer the one that was
            fetched.
    """
    path = cached_path(url)
    if path is None:
        if is_offline() if offline is None else offline:
            raise CheckpointError(
                f"{url}: is not in the cache, and --offline or {OFFLINE_VARIABLE} forbids fetching it. Run once with "
                f"network, or put the file at {_place(url)}"
            )
        path = _fetch_from_hub(url) if _HUB_FILE.fullmatch(url) else _fetch_from_web(url)
    return FetchedFile(path=path, sha256=_compare_with_record(path))


def fetch_path(url: str) -> Path:
    """Returns the path alone; `teacher` and `student` find this function as their way to fetch pretrained weights."""
    return fetch(url).path


def cached_path(url: str) -> Path | None:
    """Returns a released file if it is on this machine, without asking anybody."""
    if hub_file := _HUB_FILE.fullmatch(url):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(hub_file["repo_id"], hub_file["filename"], revision=hub_file["revision"])
        return Path(found) if isinstance(found, str) else None
    path = _place(url)
    return path if path.is_file() else None


def cached_weights(url: str | None) -> str | None:
    """Returns where released weights lie on this machine; None where they don't, or where none were released."""
    path = None if url is None else cached_path(url)
    return None if path is None else str(path)


def _place(url: str) -> Path:
    """Where a file will lie once it is fetched; for the Hub's files the folder that its cache is in."""
    if _HUB_FILE.fullmatch(url):
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE)
    return _torch_hub_folder() / "checkpoints" / unquote(PurePosixPath(urlsplit(url).path).name)


def _torch_hub_folder() -> Path:
    """Returns `torch.hub.get_dir()`, without importing torch, which takes seconds, where nobody has."""
    if "torch" in sys.modules:
        from torch.hub import get_dir  # a program may have set another

        return Path(get_dir())
    caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return Path(os.environ.get("TORCH_HOME", caches / "torch")).expanduser() / "hub"


def _fetch_from_web(url: str) -> Path:
    path = _place(url)
    _log.info("fetching %s to %s", url, path)
    download(url, path, check=check_whole)
    return path


def _fetch_from_hub(url: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import disable_progress_bars

    hub_file = _HUB_FILE.fullmatch(url)
    assert hub_file, url
    if not sys.stderr.isatty():
        disable_progress_bars()
    _log.info("fetching %s to %s", url, _place(url))
    ask_host(constants.ENDPOINT)  # the client would try for half a minute
    repository = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=hub_file["repo_id"], repo_type="model"))
    # The client waits without a limit where another program holds its lock, and wakes up from time to time meanwhile.
    threads = Threads(1, "fetch")
    try:
        job = threads.submit(
            "its client",
            lambda: Path(hf_hub_download(hub_file["repo_id"], hub_file["filename"], revision=hub_file["revision"])),
            sign=lambda: _arrived(repository),
        )
        path = job.result()
    except Exception as error:  # the Hub's client raises errors of several libraries
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{url}: can't be fetched: {reason[0].rstrip('.')}. Or fetch the file elsewhere and give it instead of its "
            "name"
        ) from error
    finally:
        threads.leave()  # who interrupts this does not wait for the client
    return path


def _arrived(repository: Path) -> object:
    """Returns what changes as bytes of a repository's files arrive, whichever program fetches them."""
    with suppress(OSError):
        return {entry.name: entry.stat().st_size for entry in os.scandir(repository / "blobs")}
    return None


def _compare_with_record(path: Path) -> str:
    """Hash a cached file and compare with what was recorded when it came; the first time, record it.

    Raises:
        CheckpointError: it was damaged or replaced since then.
    """
    record = path.with_name(f"{path.name}.sha256")
    found, expected = sha256_of_file(path), _recorded(path, record)
    if expected is None:
        if not path.is_symlink():  # the Hub's cache is its own affair
            _try_to_record(record, f"{found}  {path.name}\n")  # as sha256sum writes and checks it
    elif found != expected:
        files = f"{path.resolve()} and {record.name}" if record.exists() else str(path.resolve())
        raise CheckpointError(
            f"{path}: hashes to {found[:12]}, but to {expected[:12]} when it was fetched: it was damaged or replaced. "
            f"Delete {files} to fetch it again."
        )
    return found


def _try_to_record(record: Path, line: str) -> None:
    try:
        publish_bytes(record, line.encode())
    except (OSError, StorageError) as error:  # a cache that many share may be for reading alone
        _log.debug("%s: can't be written (%s)", record, error)


def _recorded(path: Path, record: Path) -> str | None:
    blob = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(blob):
        return blob  # the Hub's cache names a file's bytes by their hash
    words = record.read_text(encoding="utf-8").split() if record.is_file() else []
    return words[0] if words and _SHA256.fullmatch(words[0]) else None
