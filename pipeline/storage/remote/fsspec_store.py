"""What obstore does not know, such as `hf://`: those calls of its stores that are in use here, through fsspec."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import UsageError


class FsspecStore:
    """The file system of a scheme; its paths are whole URLs, its methods those of obstore's stores.

    Raises:
        UsageError: nobody knows the scheme.
        ImportError: its package is missing.
    """

    def __init__(self, protocol: str, client_options: Mapping[str, Any], **_: Any) -> None:
        if protocol == "hf":
            _limit_waits(*(client_options[name].total_seconds() for name in ("connect_timeout", "read_timeout")))
        # A listing that is kept would not show what other processes publish.
        fresh = {} if protocol == "memory" else {"skip_instance_cache": True, "use_listings_cache": False}
        try:
            self._filesystem = fsspec.filesystem(protocol, **fresh)
        except ValueError as error:
            raise UsageError(f"{error}. s3://, gs://, az://, hf:// and https:// are known") from error

    def get_range(self, path: str, *, start: int, length: int) -> bytes:
        """Read a stretch of a file; fewer bytes where it ends before."""
        with self._filesystem.open(path, "rb", cache_type="none") as stream:
            stream.seek(start)
            return stream.read(length)

    def head(self, path: str) -> dict[str, Any]:
        """Describe a file."""
        info = self._filesystem.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        return info

    def list_with_delimiter(self, prefix: str) -> dict[str, Any]:
        """Describe the files directly inside a folder."""
        return {"objects": self._describe(self._filesystem.ls, prefix)}

    def list(self, prefix: str) -> Iterator[Sequence[dict[str, Any]]]:
        """Describe the files inside a folder and all below it."""
        yield self._describe(self._filesystem.find, prefix)

    def _describe(self, ask: Callable[..., Any], prefix: str) -> Sequence[dict[str, Any]]:
        try:
            found = ask(prefix, detail=True)
        except FileNotFoundError:
            return []
        root = self._filesystem._strip_protocol(prefix)
        return [
            {
                "path": prefix + info["name"].removeprefix(root),
                "size": info["size"] or 0,
                "e_tag": str(info.get("blob_id") or info.get("created")),
            }
            for info in (found.values() if isinstance(found, dict) else found)
            if info["type"] == "file"
        ]

    def put(self, path: str, file: Path, **_: Any) -> None:
        """Put a file in its place."""
        self._filesystem.put_file(str(file), path)

    def delete(self, paths: Sequence[str]) -> None:
        """Remove files, and folders with all that they hold."""
        for path in paths:
            self._filesystem.rm(path, recursive=True)


def _limit_waits(connect_seconds: float, silence_seconds: float) -> None:
    """Give requests of the Hub's client limits where it has none: for most answers it would wait for ever."""
    limits = {"connect": connect_seconds, "read": silence_seconds, "write": silence_seconds, "pool": silence_seconds}

    def limit(request: Any) -> None:
        given = {name: seconds for name, seconds in request.extensions["timeout"].items() if seconds is not None}
        request.extensions["timeout"] = {**limits, **given}

    def make_client() -> Any:
        client = default_client_factory()
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
        return client

    with suppress(ImportError):  # no such package, which fsspec tells, or one from before 1.0
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        set_client_factory(make_client)
