"""The HDF5 files of PaSST and EfficientAT: an MP3 file a row."""

from dataclasses import dataclass
from typing import ClassVar

import h5py
import numpy as np

from pipeline.errors import ManifestError
from pipeline.ingest.hdf5_files import Hdf5Source, dataset


@dataclass(frozen=True, slots=True)
class PasstHdf5Source(Hdf5Source):
    """Rows of `audio_name` (`Y<id>.mp3`, `NN/Y<id>.mp3`), `mp3` (bytes) and `target` (bits, eight classes a byte)."""

    sound: ClassVar[str] = "mp3"

    def check(self, file: h5py.File, location: str, classes: int) -> None:
        """Check that a file has the datasets, and as many classes as the class list.

        Raises:
            ManifestError: it has not.
        """
        Hdf5Source.check(self, file, location, classes)
        target = dataset(file, "target")
        if target.dtype != np.uint8 or target.ndim != 2 or target.shape[1] != -(-classes // 8):
            raise ManifestError(
                f"{location}: target is {target.dtype} {target.shape}; {classes} classes are {-(-classes // 8)} bytes "
                "a row. Give the class list that it was made with by --classes"
            )

    def targets(self, file: h5py.File, rows: slice, classes: int) -> np.ndarray:
        """Read the classes of some rows: (rows, classes), 0 and 1.

        Raises:
            ManifestError: a bit stands for a class that is not in the list.
        """
        bits = np.unpackbits(dataset(file, "target")[rows], axis=1, bitorder="big")  # (rows, classes and padding)
        if bits[:, classes:].any():
            raise ManifestError(
                f"{file.filename}: target has bits for more than {classes} classes. Give the class list that it was "
                "made with by --classes"
            )
        return bits[:, :classes]

    @staticmethod
    def read_row(file: h5py.File, row: int) -> bytes:
        """Returns the MP3 file of one row, byte for byte."""
        return dataset(file, "mp3")[row].astype(np.uint8, copy=False).tobytes()
