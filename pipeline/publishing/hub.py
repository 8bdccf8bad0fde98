"""Files → a repository of the Hugging Face Hub, in one commit. Nothing else of this room opens a connection."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import StorageError, StorageUnavailableError, UsageError

_TARGET = re.compile(r"hf://(?P<kind>datasets/|models/)?(?P<name>[\w.-]+/[\w.-]+)/?")


@dataclass(frozen=True, slots=True)
class Repository:
    """Where on the Hub."""

    name: str
    """ORG/NAME."""
    kind: Literal["model", "dataset"]


def repository_of(target: str, kind: Literal["model", "dataset"]) -> Repository | None:
    """Returns the repository that `hf://ORG/NAME` means; None for a folder.

    Args:
        target: as it was given.
        kind: what is published; `hf://datasets/…` says so itself.

    Raises:
        UsageError: it is a URL, but not one of these, or of the other kind.
    """
    if "://" not in target:
        return None
    found = _TARGET.fullmatch(target)
    if found is None:
        raise UsageError(f"--to {target}: publish to a folder, or to hf://ORG/NAME")
    if found["kind"] and not found["kind"].startswith(kind):
        raise UsageError(f"--to {target}: what is published is a {kind}; write hf://{found['name']}")
    return Repository(found["name"], kind)


def upload(repository: Repository, files: Mapping[str, Path | bytes], *, public: bool) -> str:
    """Put files into a repository, which is made if it is not there; others that it holds stay.

    The token is that of `hf auth login`, or HF_TOKEN.

    Args:
        repository: where to.
        files: name there → a file here, or its bytes.
        public: whether a repository that is made can be seen by everybody.

    Returns:
        The address of the commit.

    Raises:
        StorageError: there is no token, or the Hub refuses it.
        StorageUnavailableError: the Hub can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    sources = {name: source if isinstance(source, bytes) else str(source) for name, source in files.items()}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in sources.items()]
    where = f"hf://{repository.name}"
    try:
        api.create_repo(repository.name, repo_type=repository.kind, private=not public, exist_ok=True)
        commit = api.create_commit(
            repository.name,
            operations,
            commit_message=f"Publish {len(operations)} files with audioset-distill",
            repo_type=repository.kind,
        )
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise StorageError(f"{where}: {_first_line(error)}. Run `hf auth login`, or set HF_TOKEN, online") from error
    except HfHubHTTPError as error:
        raise StorageError(f"{where}: the Hub refuses: {_first_line(error)}") from error
    except Exception as error:  # the Hub's client raises errors of several libraries
        raise StorageUnavailableError(f"{where}: the Hub can't be reached ({_first_line(error)})") from error
    return commit.commit_url


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
