"""WebDataset shards: written with fixed bytes for fixed clips, read in place by byte range."""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.dataset.clips import Clip, to_shard_key
from pipeline.dataset.tar_index import iter_members
from pipeline.errors import PipelineError, ShardError, StorageUnavailableError
from pipeline.storage import files as storage

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

    from pipeline.dataset.clip_table import ClipTable
    from pipeline.dataset.manifest import Manifest

DOWNLOADED_FORMATS = frozenset({"aac", "m4a", "m4b", "mp4", "mov", "3gp", "webm", "mka", "mkv"})
"""Extensions of what downloaders write; other files of the same clip are often made from them, and read faster."""

AUDIO_FORMATS = DOWNLOADED_FORMATS | frozenset(
    {
        "wav",
        "wave",
        "rf64",
        "w64",
        "aiff",
        "aif",
        "aifc",
        "au",
        "snd",
        "caf",
        "flac",
        "mp3",
        "mp2",
        "ogg",
        "oga",
        "opus",
    }
)
"""Extensions of the members that hold a clip's sound."""

UNREADABLE_FORMATS = frozenset({"wma", "flv", "avi", "ts", "ac3", "amr", "ape", "wv", "tta", "mpc", "dsf", "ra", "rm"})
"""Extensions of sounds that nothing here decodes; they are named in rejections, not passed over."""


class ShardWriter:
    """Writes the clips of one shard; made by `open_shard`."""

    def __init__(self, tar: "TarWriter") -> None:
        self._tar = tar
        self.audio_names: list[str] = []
        """The audio members' names in the order of writing."""
        self.ranges: list[tuple[int, int]] = []
        """(offset, size) of each of them in the tar; known once the shard is finished."""

    def write(self, clip: Clip, facts: Mapping[str, Any]) -> None:
        """Add a clip as `<key>.<format>` and `<key>.json`; the json holds `clip_id` and then `facts`."""
        self.write_described(clip, json.dumps({"clip_id": clip.clip_id, **facts}, ensure_ascii=False).encode())

    def write_described(self, clip: Clip, described: bytes) -> None:
        """Add a clip whose json is spelled already."""
        key = to_shard_key(clip.clip_id)
        self._tar.write({"__key__": key, clip.format: clip.audio, "json": described})
        self.audio_names.append(f"{key}.{clip.format}")


@contextmanager
def open_shard(dataset: str, shard: str) -> Iterator[ShardWriter]:
    """Write one shard; it appears in the dataset, whole, when the block ends without an error.

    The same clips in the same order give the same bytes: times, owners and modes are fixed.

    Args:
        dataset: the folder, a path or a URL.
        shard: the tar's name in it.
    """
    from webdataset.writer import TarWriter  # imports torch, which readers of shards should not wait for

    with storage.publish(storage.join_path(dataset, shard)) as staged:
        with (
            staged.open("wb") as stream,
            TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            writer = ShardWriter(tar)
            yield writer
        # Found by the reader that indexes anybody's tars, so that a manifest made now equals one made later.
        with staged.open("rb") as stream:
            found = {member.name: (member.offset, member.size) for member in iter_members(stream, shard)}
        writer.ranges = [found[name] for name in writer.audio_names]


def read_ahead(reader: storage.RangeReader, clips: "ClipTable | Manifest", rows: np.ndarray) -> None:
    """Fetch the clips at `rows`, (clips,), side by side if the dataset is remote; `read_clip_bytes` then has them."""
    reader.read_ahead(
        [
            storage.StoredRange(clips.shards[shard], offset, size, crc32)
            for shard, offset, size, crc32 in zip(
                clips.shard_of_clip[rows].tolist(),
                clips.offsets[rows].tolist(),
                clips.sizes[rows].tolist(),
                clips.crc32s[rows].tolist(),
                strict=True,
            )
        ]
    )


def read_clip_bytes(reader: storage.RangeReader, clips: "ClipTable | Manifest", row: int) -> bytes:
    """Read the encoded audio of one clip.

    Args:
        reader: opened on `clips.location`.
        clips: the dataset's.
        row: which of them.

    Raises:
        ShardError: the shard is missing, ends too early, or holds other bytes than the manifest was made from.
        StorageUnavailableError: the server can't be reached: no fault of the clip's.
    """
    shard = clips.shards[clips.shard_of_clip[row]]
    offset, size = int(clips.offsets[row]), int(clips.sizes[row])
    try:
        data = reader.read(shard, offset, size, int(clips.crc32s[row]))
    except StorageUnavailableError:
        raise
    except (PipelineError, OSError) as error:
        raise ShardError(f"{clips.location}: can't read {shard} ({error})") from error
    check_clip_bytes(clips, row, data)
    return data


def check_clip_bytes(clips: "ClipTable | Manifest", row: int, data: bytes) -> None:
    """Compare what was read of a clip with what the manifest says of it.

    Raises:
        ShardError: it has another length or checksum.
    """
    size, checksum = int(clips.sizes[row]), int(clips.crc32s[row])
    if len(data) != size or (checksum >= 0 and zlib.crc32(data) != checksum):
        shard, offset = clips.shards[clips.shard_of_clip[row]], clips.offsets[row]
        raise ShardError(
            f"{shard}: the bytes of clip {clips.clip_id(row)} ({size} at {offset}) are not those that the manifest "
            f"was made from. If the shard was replaced on purpose, run `pipeline index {clips.location}`."
        )
