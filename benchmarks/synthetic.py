"""Writes datasets and logit stores of any number of clips with the shape of AudioSet, cheaply.

The manifest and the store are real ones, row by row: ids of 11 characters, 527 classes from a million clips down to a
hundred, one part a shard. Only the sound is shared: all shards are hard links to one tar of a thousand clips, so two
million clips that can be decoded take a hundred megabytes.
"""

import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from pipeline.dataset.clips import Clip
from pipeline.dataset.manifest import Manifest, write_manifest
from pipeline.dataset.shards import open_shard
from pipeline.dataset.vocabulary import audioset_vocabulary
from pipeline.logits.stamp import StoreStamp, TeacherStamp
from pipeline.logits.store import part_stem, publish_part, write_stamp

CLIPS_PER_SHARD = 1000
CLASSES = 527
_UNLIKE_SOUNDS = 20
_DECAY = 1.47
"""Class r of 527 is r^-1.47 as frequent as the first: of two million clips a million and about a hundred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """The audio members of one tar, (clips,) each."""

    offsets: np.ndarray
    sizes: np.ndarray
    crc32s: np.ndarray


def write_dataset(folder: Path, clips: int, clips_per_shard: int = CLIPS_PER_SHARD) -> Manifest:
    """Write shards and manifest of `clips` clips; every clip is ten seconds of Ogg Vorbis at 32 kHz."""
    members = _write_tar(folder, min(clips, clips_per_shard))
    shards = [f"train-{number:06d}.tar" for number in range(-(-clips // clips_per_shard))]
    for shard in shards:
        (folder / shard).unlink(missing_ok=True)
        os.link(folder / "sounds.shared", folder / shard)
    return write_manifest(folder, _rows(clips, shards, members, clips_per_shard), audioset_vocabulary())


def write_store(folder: Path, manifest: Manifest) -> None:
    """Write a store with logits for every clip of a manifest, part by part as stage 1 does."""
    teacher = TeacherStamp(name="synthetic", weight=1.0, sha256="0" * 64, front_end="none")
    vocabulary = manifest.vocabulary
    stamp = StoreStamp(teachers=(teacher,), vocabulary_sha256=vocabulary.sha256, classes=CLASSES, precision="float32")
    write_stamp(str(folder), stamp)
    logits = np.random.default_rng(1).normal(-6, 3, (CLIPS_PER_SHARD, CLASSES)).astype(np.float16)
    for shard in manifest.shards:
        rows = manifest.rows_of_shard(shard)
        publish_part(
            str(folder),
            part_stem(shard),
            clip_ids=manifest.clip_ids.take(pa.array(rows)).to_pylist(),
            logits=logits[: len(rows)],
            stamp=stamp,
            shard_identity=manifest.shard_identity(shard),
        )


def long_tailed_labels(clips: int, random: np.random.Generator) -> pa.ListArray:
    """Draw 1 to 4 labels a clip, each once, as unevenly spread over the classes as AudioSet's."""
    chances = np.arange(1, CLASSES + 1) ** -_DECAY
    classes = random.permutation(CLASSES)  # frequent and rare ones in no order
    draws = random.choice(CLASSES, size=(clips, 4), p=chances / chances.sum())  # (clips, 4)
    drawn = np.arange(4) < random.integers(1, 5, clips)[:, None]  # (clips, 4)
    codes = np.unique((np.arange(clips)[:, None] * CLASSES + classes[draws])[drawn])
    indptr = np.searchsorted(codes, np.arange(clips + 1) * CLASSES)
    return pa.ListArray.from_arrays(indptr.astype(np.int32), (codes % CLASSES).astype(np.int16))


def _rows(clips: int, shards: list[str], members: Members, clips_per_shard: int) -> pa.Table:
    random = np.random.default_rng(0)
    digits = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)
    numbers = random.permutation(clips) * 2_654_435_761  # spread over the digits
    characters = np.stack([digits[(numbers >> (6 * place)) % 64] for place in range(11)], axis=1)  # (clips, 11)
    place = np.arange(clips) % clips_per_shard
    columns = {
        "clip_id": pa.array(characters.view("S11").ravel().astype(str)),
        "shard": pa.array(shards).take(pa.array(np.arange(clips) // clips_per_shard)),
        "offset": members.offsets[place],
        "size": members.sizes[place],
        "format": pa.array(["ogg"]).take(pa.array(np.zeros(clips, np.int32))),
        "labels": long_tailed_labels(clips, random),
        "sample_rate": np.full(clips, 32_000, np.int32),
        "frames": np.full(clips, 320_000),
        "start_seconds": np.full(clips, 30, np.float32),
        "end_seconds": np.full(clips, 40, np.float32),
        "crc32": members.crc32s[place],
    }
    return pa.table(columns)


def _write_tar(folder: Path, clips: int) -> Members:
    random = np.random.default_rng(2)
    sounds = [_encoded(random) for _ in range(_UNLIKE_SOUNDS)]
    with open_shard(str(folder), "sounds.shared") as writer:
        for number in range(clips):
            audio = sounds[number % len(sounds)]
            writer.write(Clip(clip_id=f"clip{number}", audio=audio, format="ogg"), {"labels": []})
    offsets, sizes = np.array(writer.ranges, dtype=np.int64).T
    checksums = [zlib.crc32(sound) for sound in sounds]
    crc32s = np.array([checksums[number % len(sounds)] for number in range(clips)], dtype=np.uint32)
    return Members(offsets=offsets, sizes=sizes, crc32s=crc32s)


def _encoded(random: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    noise = random.normal(0, 0.1, 320_000).cumsum() / 30  # ten seconds of brown noise
    soundfile.write(stream, np.clip(noise, -1, 1), 32_000, format="OGG", subtype="VORBIS")
    return stream.getvalue()


def write_random_bytes(folder: Path, *, shards: int, clips_per_shard: int) -> Manifest:
    """Write shards whose clips are 100 to 400 kB of noise of their own, as long as AudioSet's but not to be decoded."""
    random = np.random.default_rng(4)
    pieces = []
    for number in range(shards):
        sounds = [random.bytes(int(size)) for size in random.integers(100_000, 400_000, clips_per_shard)]
        ids = [f"{number:02d}-{clip:08d}" for clip in range(clips_per_shard)]
        with open_shard(str(folder), f"bytes-{number:06d}.tar") as writer:
            for clip_id, sound in zip(ids, sounds, strict=True):
                writer.write(Clip(clip_id=clip_id, audio=sound, format="flac"), {"labels": []})
        offsets, sizes = np.array(writer.ranges, dtype=np.int64).T
        columns = {
            "clip_id": pa.array(ids),
            "shard": pa.array([f"bytes-{number:06d}.tar"] * clips_per_shard),
            "offset": offsets,
            "size": sizes,
            "format": pa.array(["flac"] * clips_per_shard),
            "labels": pa.array([[]] * clips_per_shard, pa.list_(pa.int16())),
            "crc32": pa.array([zlib.crc32(sound) for sound in sounds], pa.uint32()),
        }
        pieces.append(pa.table(columns))
    return write_manifest(folder, pa.concat_tables(pieces), audioset_vocabulary())
