"""The clips of a dataset that is added to: which of them a new clip is, and which have only its name."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.dataset.audio import inspect_sound
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.string_columns import first_rows
from pipeline.errors import DecodeError
from pipeline.ingest.checking import Encoding
from pipeline.ingest.sources import KnownSound, PlannedClip, ReadHandle, Source


@dataclass(frozen=True, slots=True)
class HeldClips:
    """What a dataset held before."""

    manifest: Manifest
    source: Source
    """Where the new clips are."""
    encode: Encoding | None = None
    """What is done to the new clips' bytes."""

    def are_held(self, clips: Sequence[PlannedClip]) -> list[bool]:
        """Returns of each clip whether the dataset's clip of that id has its bytes, as they are or encoded.

        Args:
            clips: of the source; the dataset has a clip with each one's id.
        """
        rows = first_rows(pa.array([clip.clip_id for clip in clips], pa.string()), self.manifest.clip_ids)
        with self.source.open_reader() as read:
            return [self._is_held(row, handle) for row, handle in zip(rows.tolist(), read(clips), strict=True)]

    def _is_held(self, row: int, handle: ReadHandle) -> bool:
        try:
            read = handle()
            audio = read.audio if isinstance(read, KnownSound) else read
            if self._has_bytes(row, audio):
                return True
            return self.encode is not None and self._has_bytes(row, self.encode(audio, inspect_sound(audio)))
        except DecodeError:  # it is left out for that, later
            return False

    def _has_bytes(self, row: int, audio: bytes) -> bool:
        checksum = int(self.manifest.crc32s[row])
        return len(audio) == self.manifest.sizes[row] and checksum in (-1, zlib.crc32(audio))
