"""Decoded waveforms on the local disk, so that a small dataset is decoded once and not once an epoch.

One sparse file has room for a record of every clip of a manifest: how many samples, a checksum, how large one step is,
then the samples in 16 bits. Sound that had 16 bits at this rate comes back exactly. Other sound is rounded (-98 dB),
and a run with the cache is given it rounded whether it was kept or has just been decoded: it is the same run however
much is kept. Where not all fits, a fixed share of the clips has records. Any number of processes may read and fill the
file at the same time; a record that was not written, or only in part, fails its checksum and is decoded again.
"""

import hashlib
import logging
import os
import shutil
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from pipeline.dataset.audio import decoding_identity
from pipeline.errors import UsageError
from pipeline.storage.cache import CacheFolder, bytes_on_disk
from pipeline.storage.descriptors import open_descriptor, read_at, write_at

if TYPE_CHECKING:
    from pipeline.dataset.manifest import Manifest

_HEADER = struct.Struct("<IIf")
"""Samples, at least one, so that it never reads as a hole in the file does; CRC of their bytes; size of one step."""
_STEP = 2.0**-15
"""Of 16-bit samples between -1 and 1."""
_LARGEST = 2**15 - 1
_SPREAD = 2_654_435_761
"""Knuth's multiplier: spreads the rows that are kept evenly, and a larger share contains a smaller one."""
_LEFT_FREE = 0.05
"""Share of a disk that is not filled."""
_log = logging.getLogger(__name__)


class WaveformCache:
    """Waveforms of one dataset at one rate and length.

    Args:
        cache: the folder, and its limit; it may be cleared when no run uses it.
        manifest: the dataset; other bytes or other rows have another file, and so has what was decoded otherwise.
        sample_rate_hz: of the waveforms.
        samples: a waveform's length.
        own_lengths: clips are as long as they are, and those of more than `samples` are not kept.

    Raises:
        UsageError: the disk or the limit has no room for a single clip.
    """

    def __init__(
        self,
        cache: CacheFolder,
        manifest: "Manifest",
        *,
        sample_rate_hz: int,
        samples: int,
        own_lengths: bool = False,
    ) -> None:
        self._samples = samples
        self._record_bytes = _HEADER.size + 2 * samples
        self._descriptor: int | None = None
        key = [manifest.rows_identity, decoding_identity(), str(sample_rate_hz), str(samples)]
        key += ["own lengths"] if own_lengths else []
        self.path = cache.folder / f"waveforms-{hashlib.sha256(' '.join(key).encode()).hexdigest()[:32]}.i16"
        self._share = self._share_with_room(len(manifest), cache)
        self._open()
        cache.hold(self.path)
        cache.make_room(round(self._share * len(manifest)) * self._record_bytes - bytes_on_disk(self.path.stat()))

    def _share_with_room(self, clips: int, cache: CacheFolder) -> float:
        """Returns which share of the clips there is room for, above 0 to 1."""
        cache.make()
        used = bytes_on_disk(self.path.stat()) if self.path.exists() else 0
        full, disk = clips * self._record_bytes, shutil.disk_usage(self.path.parent)
        room = min(cache.max_bytes, used + disk.free - round(_LEFT_FREE * disk.free))
        if room < self._record_bytes:
            raise UsageError(
                f"{self.path.parent}: has no room for a decoded clip of {self._record_bytes / 1e6:.3g} MB: "
                f"--cache-size allows {cache.max_bytes / 1e9:g} GB, and {disk.free / 1e9:.3g} GB are free. Make room, "
                "choose another --cache-dir, or leave --cache-audio off"
            )
        share = 1.0 if full <= room else room / full
        kept = "" if share == 1 else f"{100 * share:.0f} % of the clips, the others are decoded each time: "
        sizes = share * full / 1e9, used / 1e9
        _log.info("decoded audio is kept in %s: %s%.2f GB when complete, now %.2f", self.path, kept, *sizes)
        return share

    def keeps(self, row: int) -> bool:
        """Whether there is room for the clip at `row`."""
        return self._share == 1 or (row * _SPREAD) % 2**32 < self._share * 2**32

    def read(self, row: int) -> np.ndarray | None:
        """Returns the waveform, (samples,) float32, of the clip at `row`; None where it is not there yet."""
        if not self.keeps(row):
            return None
        record = read_at(self._open(), self._record_bytes, row * self._record_bytes)
        samples, checksum, step = _HEADER.unpack_from(record) if len(record) > _HEADER.size else (0, 0, 0.0)
        content = record[_HEADER.size : _HEADER.size + 2 * samples]
        if not samples or len(content) != 2 * samples or checksum != _checksum(content, step):
            return None
        return _as_float(np.frombuffer(content, dtype="<i2"), step)

    def holds(self, row: int) -> bool:
        """Whether something was written for the clip at `row`; only `read` knows whether it is whole."""
        if not self.keeps(row):
            return False
        start = read_at(self._open(), _HEADER.size, row * self._record_bytes)
        return any(start)

    def write(self, row: int, waveform: np.ndarray) -> np.ndarray:
        """Keep the waveform of the clip at `row`, unless it is too long, has no room, or finds the disk full.

        Returns:
            The waveform, (samples,) float32, as it is read again.
        """
        if not 0 < len(waveform) <= self._samples:
            return waveform
        samples, step = _as_16_bits(waveform)
        if self.keeps(row):
            content = samples.tobytes()
            record = _HEADER.pack(len(samples), _checksum(content, step), step) + content
            try:
                write_at(self._open(), record, row * self._record_bytes)
            except OSError as error:
                _log.warning("%s: a decoded clip could not be kept (%s)", self.path, error)
        return _as_float(samples, step)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_descriptor(self.path, os.O_RDWR | os.O_CREAT)
        return self._descriptor

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # pyright: ignore[reportArgumentType]


def _as_16_bits(waveform: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns samples, (samples,) int16, and the size of their step: larger where a sound goes beyond -1 to 1."""
    peak = float(np.abs(waveform).max())
    step = float(np.float32(_STEP if not peak > 1 else peak / _LARGEST))
    return np.clip(np.rint(waveform / np.float32(step)), -_LARGEST - 1, _LARGEST).astype("<i2"), step


def _as_float(samples: np.ndarray, step: float) -> np.ndarray:
    return samples.astype(np.float32) * np.float32(step)


def _checksum(content: bytes, step: float) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<f", step)))
