"""CED's logits: for each epoch and process an HDF5 file of the largest numbers, and a Parquet of file names beside it.

Each row is of a clip as one augmented view, drawn from the row's seed by CED's own transforms with torch's generator,
which nothing outside that program draws again. So the rows stand for the clip itself: where there are several, their
mean probabilities do, which is what an ensemble over views would say.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ForeignLogitsError
from pipeline.logits.imports.foreign_logits import (
    ForeignLogits,
    Held,
    OnRows,
    RowReader,
    damage_told,
    local_file,
    to_logits,
    to_probabilities,
)
from pipeline.storage import files as storage
from pipeline.storage.mapped_arrays import forget_pages, scratch_array

_ROWS_AT_ONCE = 1 << 14
_DATASETS = {"topk_values": ("f", 2), "topk_indexes": ("i", 2), "seeds": ("i", 1)}
"""Name → kind of number, and axes."""
_MAX_LATER_CHUNKS = 0.01
_DAMAGE = (OSError, RuntimeError, ValueError, KeyError)
"""What h5py raises."""


@dataclass(frozen=True, slots=True)
class _EpochFile:
    location: str
    table: str
    rows: int
    top_k: int


class CedLogits(ForeignLogits):
    """Files `logits_ep<epoch>_<process>.h5`, each with its `.parquet` of filename, start and end.

    A clip's other classes get what CED gives them in training: each the smallest probability kept, divided by how many
    classes were left out.

    Args:
        files: the HDF5 files of one epoch or of several.
        held: what the numbers are; the released models give probabilities.
        classes: of the models, which the files don't say.

    Raises:
        ForeignLogitsError: a file is damaged, or two do not fit each other.
        UsageError: a file is not on this machine.
    """

    layout: ClassVar[str] = "ced-hdf5"
    averaged: ClassVar[bool] = True

    def __init__(self, files: tuple[str, ...], held: Held, classes: int) -> None:
        self.held = held
        self.classes = classes
        self._epochs = [_check(file) for file in files]
        widths = {epoch.top_k for epoch in self._epochs}
        if len(widths) > 1:
            raise ForeignLogitsError(f"{files[0]}: and others keep {sorted(widths)} numbers of a row; give one kind")
        [self.top_k] = widths
        if not 1 <= self.top_k <= classes:
            raise ForeignLogitsError(
                f"{files[0]}: keeps {self.top_k} numbers of a row, but there are {classes} classes"
            )
        left_out = classes - self.top_k
        self.conversion = "augmented views stand for the clip, several by their mean probability" + (
            f"; each of the {left_out} classes left out has 1/{left_out} of the smallest probability kept"
            if left_out
            else ""
        )
        self.files = tuple(name for epoch in self._epochs for name in (epoch.location, epoch.table))

    def names(self) -> pa.StringArray:
        """Returns each row's file name, null where the row is of a later chunk of a sound than its first."""
        return cast("pa.StringArray", pa.concat_arrays([_names(epoch) for epoch in self._epochs]))

    @contextmanager
    def open_rows(self, rows: np.ndarray, on_rows: OnRows) -> Iterator[RowReader]:
        """Copy what is wanted into a scratch file, 4 bytes a number; HDF5 is slow at rows here and there."""
        assert self.top_k is not None
        values = scratch_array((len(rows), self.top_k), np.float16)
        indexes = scratch_array((len(rows), self.top_k), np.int16)
        first_row, place = 0, 0
        for epoch in self._epochs:
            for start in range(0, epoch.rows, _ROWS_AT_ONCE):
                wanted = rows[place : np.searchsorted(rows, first_row + min(start + _ROWS_AT_ONCE, epoch.rows))]
                if len(wanted):
                    here = slice(place, place + len(wanted))
                    slab = slice(start, start + _ROWS_AT_ONCE)
                    values[here], indexes[here] = self._slab(epoch, slab, wanted - first_row - start)
                    place += len(wanted)
                    on_rows(len(wanted))
            first_row += epoch.rows

        def read(asked: np.ndarray) -> np.ndarray:
            places = np.searchsorted(rows, asked)
            found = self._dense(values[places], indexes[places].astype(np.int64))
            forget_pages(values)
            forget_pages(indexes)
            return found

        yield read

    def _slab(self, epoch: _EpochFile, slab: slice, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with damage_told(epoch.location, "HDF5 file", *_DAMAGE), h5py.File(epoch.location, "r") as file:
            values, indexes = _dataset(file, "topk_values")[slab], _dataset(file, "topk_indexes")[slab]
        indexes = indexes[rows]
        if indexes.min() < 0 or indexes.max() >= self.classes:
            raise ForeignLogitsError(
                f"{epoch.location}: topk_indexes holds {indexes.min()} to {indexes.max()}, but there are "
                f"{self.classes} classes. Give the list of its classes by --classes"
            )
        return values[rows].astype(np.float16), indexes.astype(np.int16)

    def _dense(self, values: np.ndarray, indexes: np.ndarray) -> np.ndarray:
        """(rows, K) twice → (rows, classes) logits."""
        kept = to_logits(values, self.held, self._epochs[0].location)
        probabilities = to_probabilities(kept)
        left_out = max(self.classes - kept.shape[1], 1)
        rest = to_logits(probabilities.min(axis=1) / left_out, "probabilities", self._epochs[0].location)  # (rows,)
        dense = np.repeat(rest[:, None], self.classes, axis=1)
        np.put_along_axis(dense, indexes, kept, axis=1)
        return dense


def _check(location: str) -> _EpochFile:
    path = local_file(location, "--hdf5")
    table = local_file(str(path.with_suffix(".parquet")), f"--hdf5 {location}, whose names are in")
    with damage_told(location, "HDF5 file", *_DAMAGE), h5py.File(path, "r") as file:
        shapes = {name: _shape(file, name, location) for name in _DATASETS}
    rows, top_k = shapes["topk_values"]
    if shapes["topk_indexes"] != (rows, top_k) or shapes["seeds"] != (rows,):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ForeignLogitsError(f"{location}: its datasets do not fit each other: {told}")
    with damage_told(str(table), "Parquet file", pa.ArrowException, OSError):
        named = pq.read_metadata(table).num_rows
    if named != rows:
        raise ForeignLogitsError(f"{location}: has {rows} rows, but {table} beside it names {named}. Pair them anew")
    return _EpochFile(location, str(table), rows, top_k)


def _shape(file: h5py.File, name: str, location: str) -> tuple[int, ...]:
    found, (kind, axes) = file.get(name), _DATASETS[name]
    if not isinstance(found, h5py.Dataset):
        raise ForeignLogitsError(
            f"{location}: has no dataset {name}; it holds {', '.join(map(str, file)) or 'nothing'}"
        )
    if found.dtype.kind != kind or found.ndim != axes:
        wanted = "floats" if kind == "f" else "integers"
        raise ForeignLogitsError(f"{location}: {name} is {found.dtype} {found.shape}; expected {wanted} on {axes} axes")
    return found.shape


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    return cast("h5py.Dataset", file[name])


def _names(epoch: _EpochFile) -> pa.StringArray:
    with damage_told(epoch.table, "Parquet file", pa.ArrowException, OSError):
        columns = set(pq.read_schema(epoch.table).names)
        if "filename" not in columns:
            raise ForeignLogitsError(f"{epoch.table}: has no column filename; it has {', '.join(sorted(columns))}")
        table = pq.read_table(epoch.table, columns=[name for name in ("filename", "start") if name in columns])
        names = table["filename"].cast(pa.string()).combine_chunks()
    if "start" not in columns:
        return names
    later = table["start"].cast(pa.float64()).to_numpy() > 0  # (rows,); null, which is NaN here, is no later chunk
    if later.mean() > _MAX_LATER_CHUNKS:
        raise ForeignLogitsError(
            f"{epoch.table}: {int(later.sum())} of {len(later)} rows are of later chunks of sounds cut into pieces. A "
            "store has one row for a whole clip of ten seconds; make the files with chunk_length 10"
        )
    return names.take(pa.array(np.arange(len(names)), mask=later))


def file_pairs(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the HDF5 files that `paths` name; a folder stands for all that it holds, by name."""
    found: list[str] = []
    for path in paths:
        inside = [] if storage.is_remote(path) else sorted(map(str, storage.local_path(path).glob("*.h5")))
        found += inside or [path]
    return tuple(found)
