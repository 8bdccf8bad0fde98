"""Foreign logits by the clips of a dataset, and the parts of a store that they become."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.dataset.manifest import Manifest
from pipeline.logits.imports.foreign_logits import ForeignLogits, RowReader, to_logits, to_probabilities
from pipeline.logits.imports.matching import ClipRows
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import ClipFailure, part_stem, publish_part
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.progress import ProgressBar, progress_bar
from pipeline.runtime.threads import Threads


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipLogits:
    """Foreign logits by the clips of a dataset, open for reading in any order and from several threads."""

    manifest: Manifest
    source: ForeignLogits
    found: ClipRows
    numbers: np.ndarray | None
    """(classes,): which number of a row is which of the dataset's classes."""
    read: RowReader
    wanted: np.ndarray
    """The clips that are open, ascending."""

    def first_rows(self, clips: np.ndarray) -> np.ndarray:
        """Returns the first row in the files of clips that have rows: (clips,)."""
        return self.found.order[self.found.bounds[clips]]

    def logits(self, clips: np.ndarray) -> np.ndarray:
        """Returns the logits of clips that have rows: (clips, classes), float16; infinite where too large."""
        starts = self.found.bounds[clips]
        counts = self.found.bounds[clips + 1] - starts  # (clips,), 1 or more
        if counts.max(initial=1) == 1:
            logits = self.read(self.found.order[starts])
        else:
            total = np.zeros((len(clips), self.source.classes))
            for view in range(counts.max()):
                has = counts > view
                total[has] += to_probabilities(self.read(self.found.order[starts[has] + view]))
            logits = to_logits(total / counts[:, None], "probabilities", self.source.files[0])
        with np.errstate(over="ignore"):
            return (logits if self.numbers is None else logits[:, self.numbers]).astype(np.float16)


@contextmanager
def open_clip_logits(
    source: ForeignLogits, found: ClipRows, numbers: np.ndarray | None, manifest: Manifest, shards: Sequence[str]
) -> Iterator[ClipLogits]:
    """Open the rows of some shards' clips for as long as the block lasts.

    Args:
        source: the files.
        found: which rows are of which clip.
        numbers: see `ClipLogits`; None where the classes are the same.
        manifest: the dataset.
        shards: their names in it.
    """
    of_shards = np.concatenate([np.zeros(0, np.int64), *(manifest.rows_of_shard(shard) for shard in shards)])
    wanted = np.sort(found.with_rows(of_shards))
    has = np.zeros(len(manifest) + 1, bool)
    has[wanted] = True
    rows = np.sort(found.order[has[found.clip_of_row[found.order]]])
    with progress_bar("laying out", len(rows), unit="rows") as bar, source.open_rows(rows, bar.advance) as read:
        yield ClipLogits(manifest=manifest, source=source, found=found, numbers=numbers, read=read, wanted=wanted)


def write_parts(store: str, stamp: StoreStamp, clips: ClipLogits, shards: Sequence[str]) -> None:
    """Publish the parts of some shards, several at a time; clips whose numbers are not finite are listed as failed.

    Raises:
        LostProcessError: reading the files or writing a part stands still.
    """
    left = sum(len(clips.manifest.rows_of_shard(shard)) for shard in shards)
    with (
        progress_bar("importing", len(clips.manifest), done=len(clips.manifest) - left) as bar,
        Threads(usable_cores(), "import") as threads,
    ):
        for _ in threads.map(lambda shard: _write_part(store, stamp, clips, shard, bar), shards):
            pass


def _write_part(store: str, stamp: StoreStamp, clips: ClipLogits, shard: str, bar: ProgressBar) -> None:
    manifest = clips.manifest
    of_shard = manifest.rows_of_shard(shard)
    known = clips.found.with_rows(of_shard)
    logits = clips.logits(known)  # (known clips, classes)
    finite = np.isfinite(logits).all(axis=1)
    failures = [
        ClipFailure(clip_id=clip_id, reason="non-finite logits", detail="in the files that were imported")
        for clip_id in manifest.clip_ids.take(pa.array(known[~finite])).to_pylist()
    ]
    ids = manifest.clip_ids.take(pa.array(known[finite])).to_pylist()
    publish_part(store, part_stem(shard), ids, logits[finite], stamp, manifest.shard_identity(shard), failures)
    bar.advance(len(of_shard))
