"""What reading and joining clips needs of a manifest, as NumPy columns: processes share them, and need no Arrow."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class RaggedColumn:
    """Any number of values in each row: row r has `values[starts[r]:starts[r + 1]]`."""

    starts: np.ndarray
    """(rows + 1,), integers, ascending."""
    values: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values of some rows, (values,), and for each of them which of these rows it is from, from 0."""
        first = self.starts[rows].astype(np.int64)
        counts = self.starts[np.asarray(rows) + 1] - first  # (rows,)
        index = np.repeat(np.arange(len(counts)), counts)  # (values,)
        within = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.values[np.repeat(first, counts) + within], index


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipTable:
    """A dataset's clips in the manifest's order."""

    location: str
    """The dataset folder, a path or a URL."""
    shards: list[str]
    """The shards' names relative to it."""
    shard_of_clip: np.ndarray
    """(clips,) int32, positions in `shards`."""
    offsets: np.ndarray
    """(clips,) int64, where each clip's audio begins in its shard, in bytes."""
    sizes: np.ndarray
    """(clips,) int64, in bytes."""
    crc32s: np.ndarray
    """(clips,) int64, the checksum of each clip's bytes; -1 where none is known."""
    ids: RaggedColumn
    """UTF-8 bytes."""
    classes: int
    """How many there are."""
    labels: RaggedColumn
    """int16, each clip's classes."""
    known_classes: RaggedColumn | None
    """int16, the classes whose labels are known of clips that `are_masked`; None where all labels are known."""
    are_masked: np.ndarray | None
    """(clips,) bool: clips of which only some labels are known."""

    def __len__(self) -> int:
        return len(self.offsets)

    def clip_id(self, row: int) -> str:
        """Returns the id of the clip at `row`."""
        return self.ids[row].tobytes().decode()

    def label_matrix(self, rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """Returns the labels of `rows` as a multi-hot matrix (rows, classes)."""
        classes, index = self.labels.take(rows)
        matrix = np.zeros((len(rows), self.classes), dtype=dtype)
        matrix[index, classes] = 1
        return matrix

    def label_mask(self, rows: np.ndarray) -> np.ndarray | None:
        """Returns where the labels of `rows` are known: (rows, classes) bool; None where all of all clips are.

        A class whose label is unknown is neither there nor absent: nothing is learned from it, and nothing scored.
        """
        if self.known_classes is None or self.are_masked is None:
            return None
        classes, index = self.known_classes.take(rows)
        matrix = np.repeat(~self.are_masked[rows][:, None], self.classes, axis=1)
        matrix[index, classes] = True
        return matrix
