"""Decoded waveforms on the local disk, so that a small dataset is decoded once and not once an epoch.

One sparse file holds a record for every clip of a manifest: how many samples, a checksum, then the samples as float32,
exactly as they were decoded, so that a run gives the same weights with and without the cache. Any number of processes
may read and fill it at the same time; a record that was not written, or only in part, fails its checksum and is decoded
again.
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

_HEADER = struct.Struct("<II")
"""Samples, at least one, so that it never reads as a hole in the file does; CRC of their bytes."""
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
        UsageError: the disk or the limit has no room for the whole dataset.
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
        self._record_bytes = _HEADER.size + 4 * samples
        self._descriptor: int | None = None
        key = [manifest.rows_identity, decoding_identity(), str(sample_rate_hz), str(samples)]
        key += ["own lengths"] if own_lengths else []
        self.path = cache.folder / f"waveforms-{hashlib.sha256(' '.join(key).encode()).hexdigest()[:32]}.f32"
        self._check_room(len(manifest), cache)
        self._open()
        cache.hold(self.path)
        cache.make_room(len(manifest) * self._record_bytes - bytes_on_disk(self.path.stat()))

    def _check_room(self, clips: int, cache: CacheFolder) -> None:
        cache.make()
        used = bytes_on_disk(self.path.stat()) if self.path.exists() else 0
        full, free = clips * self._record_bytes, shutil.disk_usage(self.path.parent).free
        if full > cache.max_bytes:
            raise UsageError(
                f"{self.path.parent}: {clips} decoded clips take {full / 1e9:.3g} GB, but --cache-size allows "
                f"{cache.max_bytes / 1e9:g} GB. Allow more, or leave --cache-audio off"
            )
        if full - used > free:
            raise UsageError(
                f"{self.path.parent}: {clips} decoded clips take {full / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are "
                "free. Choose another --cache-dir, or leave --cache-audio off"
            )
        _log.info("decoded audio is kept in %s: %.2f GB when complete, now %.2f", self.path, full / 1e9, used / 1e9)

    def read(self, row: int) -> np.ndarray | None:
        """Returns the waveform, (samples,) float32, of the clip at `row`; None where it is not there yet."""
        record = read_at(self._open(), self._record_bytes, row * self._record_bytes)
        samples = _HEADER.unpack_from(record)[0] if len(record) > _HEADER.size else 0
        content = record[_HEADER.size : _HEADER.size + 4 * samples]
        if not samples or record[: _HEADER.size] != _HEADER.pack(len(content) // 4, zlib.crc32(content)):
            return None
        return np.frombuffer(content, dtype=np.float32)

    def holds(self, row: int) -> bool:
        """Whether something was written for the clip at `row`; only `read` knows whether it is whole."""
        start = read_at(self._open(), _HEADER.size, row * self._record_bytes)
        return any(start)

    def write(self, row: int, waveform: np.ndarray) -> None:
        """Keep the waveform of the clip at `row`; one that is too long, or finds the disk full, is not kept."""
        if not 0 < len(waveform) <= self._samples:
            return
        content = np.ascontiguousarray(waveform, dtype=np.float32).tobytes()
        try:
            write_at(self._open(), _HEADER.pack(len(waveform), zlib.crc32(content)) + content, row * self._record_bytes)
        except OSError as error:
            _log.warning("%s: a decoded clip could not be kept (%s)", self.path, error)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_descriptor(self.path, os.O_RDWR | os.O_CREAT)
        return self._descriptor

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # pyright: ignore[reportArgumentType]
