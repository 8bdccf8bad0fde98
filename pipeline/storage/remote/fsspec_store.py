"""What obstore does not know, such as `hf://`: those calls of its stores that are in use here, through fsspec."""

from collections.abc import Callable, Iterator, Sequence
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

    def __init__(self, protocol: str, **_: Any) -> None:
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
