"""The HDF5 files of PANNs: a waveform a row."""

import io
from dataclasses import dataclass
from typing import ClassVar

import h5py
import numpy as np
import soundfile

from pipeline.dataset.sound_decoders import HIGHEST_RATE_HZ, LOWEST_RATE_HZ
from pipeline.errors import DecodeError, ManifestError
from pipeline.ingest.hdf5_files import Hdf5Source, dataset
from pipeline.ingest.transcoding import quantise


@dataclass(frozen=True, slots=True)
class PannsHdf5Source(Hdf5Source):
    """Rows of `audio_name` (`Y<id>.wav`), `waveform` and `target` (bool); the attribute `sample_rate` in Hz.

    Waveforms are int16; the first versions wrote float32, which becomes 24 bits. Clips that were not there when a file
    was made are rows of zeros with an empty name.
    """

    sound: ClassVar[str] = "waveform"

    def check(self, file: h5py.File, location: str, classes: int) -> None:
        """Check that a file has the datasets, a sample rate, and as many classes as the class list.

        Raises:
            ManifestError: it has not.
        """
        Hdf5Source.check(self, file, location, classes)
        waveform, target = dataset(file, "waveform"), dataset(file, "target")
        if waveform.ndim != 2 or waveform.dtype not in (np.int16, np.float32):
            raise ManifestError(
                f"{location}: waveform is {waveform.dtype} {waveform.shape}; int16 (rows, samples) is read"
            )
        if target.ndim != 2 or target.shape[1] != classes:
            raise ManifestError(
                f"{location}: target is {target.shape}, but the class list has {classes} classes. Give the one that it "
                "was made with by --classes"
            )
        if not LOWEST_RATE_HZ <= _rate_hz(file) <= HIGHEST_RATE_HZ:
            found = file.attrs.get("sample_rate", "missing")
            raise ManifestError(
                f"{location}: the attribute sample_rate is {found}, so nobody can say how fast it plays"
            )

    def targets(self, file: h5py.File, rows: slice, classes: int) -> np.ndarray:
        """Read the classes of some rows: (rows, classes), bool in PANNs' own files."""
        return dataset(file, "target")[rows]

    @staticmethod
    def read_row(file: h5py.File, row: int) -> bytes:
        """Returns the waveform of one row as a FLAC file; nothing of int16 is lost."""
        samples = dataset(file, "waveform")[row]  # (samples,)
        if samples.dtype != np.int16 and not np.isfinite(samples).all():
            raise DecodeError("non-finite samples")
        is_16_bit = samples.dtype == np.int16
        stream, subtype = io.BytesIO(), "PCM_16" if is_16_bit else "PCM_24"
        samples = samples if is_16_bit else quantise(samples, 24)
        soundfile.write(stream, samples, _rate_hz(file), format="FLAC", subtype=subtype)
        return stream.getvalue()


def _rate_hz(file: h5py.File) -> int:
    rate = file.attrs.get("sample_rate", 0)
    return int(rate) if isinstance(rate, int | float | np.number) else 0
