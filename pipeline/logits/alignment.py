"""Logits in the order of a manifest: one memory-mapped array that every loader worker and rank shares.

Opening costs the pages that are touched, not the gigabytes that the array holds, and processes share those pages.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.storage import files as storage
from pipeline.storage.mapped_arrays import forget_pages, reserve

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AlignedLogits:
    """The logits of every clip of a manifest, by row."""

    logits: np.ndarray
    """(clips, classes), or (clips, views, classes) where all views were asked for; float16, memory-mapped, read-only;
    zeros where the store has none."""
    has_logits: np.ndarray
    """(clips,), bool."""
    repeated: int
    """Rows of the store passed over, because an earlier part holds the same clip."""
    path: Path
    """Where the array lies, until somebody clears the cache."""

    def take(self, rows: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Copy the logits of some clips: (some, classes), float16.

        Args:
            rows: (some,), of the manifest.
            views: (some,), which view of each clip, where there are several; None where there is one.
        """
        taken = self.logits[rows] if views is None else self.logits[rows, views]
        forget_pages(self.logits)
        return taken

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        # NumPy pickles a mapped array by value; a loader worker must map the file instead of receiving gigabytes.
        return load_aligned, (self.path,)


def target_rows(store_ids: "pa.ChunkedArray", clip_ids: "pa.Array | pa.ChunkedArray") -> tuple[np.ndarray, int]:
    """Find the manifest row of each row of a store.

    Args:
        store_ids: the store's clip ids, part after part, in the order of precedence.
        clip_ids: the manifest's clip ids, each once.

    Returns:
        (store rows,), int64: the manifest row, or -1 where the manifest has no such clip or an earlier row of the
        store has it already; and the number of such repeats.
    """
    import pyarrow as pa  # processes that only map the array need not wait for it
    import pyarrow.compute as pc

    clips = pa.chunked_array([clip_ids]) if isinstance(clip_ids, pa.Array) else clip_ids
    options = pc.SetLookupOptions(clips.combine_chunks())
    found = pc.call_function("index_in", [store_ids], options).fill_null(-1)
    rows = found.to_numpy().astype(np.int64)  # (store rows,)
    known = np.flatnonzero(rows >= 0)
    first = np.full(len(clips), -1, dtype=np.int64)  # (clips,), the store row that a clip's logits come from
    first[rows[known[::-1]]] = known[::-1]  # NumPy keeps the last assignment: backwards, the first row wins
    repeats = known[first[rows[known]] != known]
    rows[repeats] = -1
    return rows, len(repeats)


def write_aligned(
    path: Path,
    shape: tuple[int, ...],
    has_logits: np.ndarray,
    repeated: int,
    pieces: Iterable[tuple[np.ndarray, np.ndarray]],
) -> AlignedLogits:
    """Write the array, publish it whole and map it.

    Args:
        path: a `.npy` file; its mask lies beside it.
        shape: (clips, classes) or (clips, views, classes).
        has_logits: (clips,), bool.
        repeated: see `AlignedLogits.repeated`.
        pieces: rows (some,) and their logits (some, …), part by part; only one is held at a time.
    """
    with storage.publish(_mask_path(path)) as staged:
        np.savez(staged, has_logits=has_logits, repeated=repeated)
    with storage.publish(path) as staged:
        target = np.lib.format.open_memmap(staged, mode="w+", dtype=np.float16, shape=shape)
        with staged.open("r+b") as stream:
            reserve(stream.fileno(), staged.stat().st_size, staged.parent)
        for rows, logits in pieces:
            target[rows] = logits
        target.flush()
        del target  # Windows gives no other name to a file that somebody has mapped
    return AlignedLogits(logits=np.load(path, mmap_mode="r"), has_logits=has_logits, repeated=repeated, path=path)


def load_aligned(path: Path) -> AlignedLogits:
    """Map an array that `write_aligned` published.

    Raises:
        FileNotFoundError: it was never made, or the cache was cleared.
    """
    logits = np.load(path, mmap_mode="r")
    with np.load(_mask_path(path)) as mask:
        return AlignedLogits(logits=logits, has_logits=mask["has_logits"], repeated=int(mask["repeated"]), path=path)


def _mask_path(path: Path) -> Path:
    return path.with_suffix(".mask.npz")
