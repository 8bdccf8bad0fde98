"""HDF5 files of clips in rows: what the copies that PaSST and PANNs made have in common."""

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, cast

import h5py
import numpy as np

from pipeline.dataset.clip_ids import clip_id_of_path, is_youtube_id, without_extension
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import DecodeError, ManifestError, UsageError
from pipeline.ingest.file_marks import file_mark
from pipeline.ingest.labels import classes_of_vector
from pipeline.ingest.rejections import Rejection, UnusableClipError
from pipeline.ingest.sources import ClipReader, PlannedClip, ReadHandle, Source, from_folder, versioned_files
from pipeline.storage import files as storage

EXTENSIONS = (".hdf", ".hdf5", ".h5")
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True)
class Hdf5Source(Source):
    """Rows of HDF5 files: a name, a sound, and the classes as a vector of bits.

    HDF5 knows only a machine's own files, and one thread at a time; sounds are read row by row, so that no file is ever
    in memory.
    """

    paths: tuple[str, ...]
    """Files, or folders of them."""
    working_folder: str = field(default_factory=os.getcwd)
    """What paths that aren't absolute are relative to."""

    sound: ClassVar[str]
    """The dataset within the file that holds the sounds."""

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the rows of all files.

        Raises:
            ManifestError: a file is no HDF5, or its datasets are not those that are expected.
        """
        for location, version in _files(self.paths):
            path = from_folder(self.working_folder, location)
            with open(path, "rb") as stream:
                mark = file_mark(stream, location)
            with open_hdf5(path) as file:
                self.check(file, location, len(vocabulary))
                all_names = dataset(file, "audio_name")
                for start in range(0, len(all_names), _ROWS_AT_ONCE):
                    names = all_names[start : start + _ROWS_AT_ONCE]
                    targets = self.targets(file, slice(start, start + _ROWS_AT_ONCE), len(vocabulary))
                    for row, (name, target) in enumerate(zip(names, targets, strict=True), start=start):
                        text = bytes(name).rstrip(b"\0").decode("utf-8", "surrogateescape")
                        try:
                            yield self._clip(location, version, mark, row, text, target)
                        except UnusableClipError as error:
                            yield Rejection(None, f"{location}/{text or f'row {row}'}", error.reason, error.detail)

    @staticmethod
    def _clip(location: str, version: str, mark: str, row: int, name: str, target: np.ndarray) -> PlannedClip:
        if not name:
            raise UnusableClipError("empty row", "its name is empty: the clip was not there")
        clip_id = clip_id_of_path(without_extension(name))
        return PlannedClip(
            clip_id=clip_id,
            file=location,
            version=version,
            labels=classes_of_vector(target, len(target)),
            member=name,
            position=row,
            unique_id=None if is_youtube_id(clip_id) else f"{mark}/row {row}",
        )

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the files, each with its first clip."""
        return _open_reader(self.working_folder, self.read_row)

    def check(self, file: h5py.File, location: str, classes: int) -> None:
        """Check that a file has the datasets that are read; the subclass adds their widths.

        Raises:
            ManifestError: it has not.
        """
        needed = ("audio_name", self.sound, "target")
        missing = [name for name in needed if not isinstance(file.get(name), h5py.Dataset)]
        if missing:
            raise ManifestError(
                f"{location}: has no dataset {missing[0]}; it holds {', '.join(map(str, file)) or 'nothing'}"
            )
        lengths = {name: len(dataset(file, name)) for name in needed}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ManifestError(f"{location}: its datasets are not of one length ({told} rows)")

    @abstractmethod
    def targets(self, file: h5py.File, rows: slice, classes: int) -> np.ndarray:
        """Read the classes of some rows: (rows, classes), zeros and ones of any type."""

    @staticmethod
    @abstractmethod
    def read_row(file: h5py.File, row: int) -> bytes:
        """Read one row's sound as the bytes of an audio file."""


def dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Returns a dataset that `Hdf5Source.check` has seen."""
    return cast("h5py.Dataset", file[name])


@contextmanager
def open_hdf5(location: str) -> Iterator[h5py.File]:
    """Open a file for reading.

    Raises:
        ManifestError: it is no HDF5, or damaged where its list of contents is.
    """
    try:
        file = h5py.File(location, "r")
    except OSError as error:
        raise ManifestError(f"{location}: is no readable HDF5 file ({error})") from error
    with file:
        yield file


@contextmanager
def _open_reader(folder: str, read_row: Callable[[h5py.File, int], bytes]) -> Iterator[ClipReader]:
    with ExitStack() as stack:
        opened: dict[str, h5py.File] = {}

        def handles(clips: Sequence[PlannedClip]) -> Iterator[ReadHandle]:
            for clip in clips:
                if clip.file not in opened:
                    opened[clip.file] = stack.enter_context(open_hdf5(from_folder(folder, clip.file)))
                yield partial(_read, read_row, opened[clip.file], clip.position)

        yield handles


def _read(read_row: Callable[[h5py.File, int], bytes], file: h5py.File, row: int) -> bytes:
    try:
        return read_row(file, row)
    except (OSError, RuntimeError, ValueError) as error:  # what h5py raises for a damaged chunk
        raise DecodeError("unreadable row", str(error)) from error


def _files(paths: Sequence[str]) -> list[tuple[str, str]]:
    for path in paths:
        if storage.is_remote(path):
            raise UsageError(f"--hdf5 {path}: has to be on this machine; mount the bucket, or copy the files")
    return versioned_files(paths, EXTENSIONS, "--hdf5")
