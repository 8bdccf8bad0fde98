"""Tiny datasets of real shards for the tests of what reads them."""

import io
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from file_server import FileServer, serve

from pipeline.clips import Clip
from pipeline.manifest import SCHEMA, Manifest, read_manifest, write_manifest
from pipeline.shards import open_shard
from pipeline.vocabulary import LabelClass, Vocabulary

TinyClip = tuple[str, tuple[int, ...], bytes]
"""Clip id, labels, WAV bytes."""
DatasetBuilder = Callable[..., Manifest]


def wav_of(samples: np.ndarray, sample_rate_hz: int = 32_000) -> bytes:
    """Spell (samples,) float32 as a 16-bit WAV."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(sample_rate_hz)
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def noises(count: int, classes: int, *, seconds: float = 0.2) -> list[TinyClip]:
    """Make clips of noise, each of its own loudness, with random labels of all classes but the last."""
    random = np.random.default_rng(7)
    clips = []
    for number in range(count):
        samples = random.uniform(-1, 1, round(seconds * 32_000)) * random.uniform(0.01, 0.9)
        labels = np.flatnonzero(random.random(classes - 1) < 0.4)
        clips.append((f"-clip.{number:02}", tuple(labels.tolist()), wav_of(samples.astype(np.float32))))
    return clips


@pytest.fixture
def make_noises() -> Callable[..., list[TinyClip]]:
    return noises


@pytest.fixture
def five_classes() -> Vocabulary:
    return Vocabulary(tuple(LabelClass(index, f"/m/{index}", f"Sound {index}") for index in range(5)))


@pytest.fixture
def build_dataset(tmp_path: Path, five_classes: Vocabulary) -> DatasetBuilder:
    """Give `build(name, clips, …)`: writes shards and a manifest, and opens it."""

    def build(
        name: str, clips: Iterable[TinyClip], *, vocabulary: Vocabulary = five_classes, clips_per_shard: int = 5
    ) -> Manifest:
        folder, clips = str(tmp_path / name), list(clips)
        rows = []
        for start in range(0, len(clips), clips_per_shard):
            chunk, shard = clips[start : start + clips_per_shard], f"tiny-{start // clips_per_shard:06}.tar"
            with open_shard(folder, shard) as writer:
                for clip_id, labels, audio in chunk:
                    writer.write(Clip(clip_id=clip_id, audio=audio, format="wav"), {"labels": labels})
            for (clip_id, labels, audio), (offset, size) in zip(chunk, writer.ranges, strict=True):
                row = {"clip_id": clip_id, "shard": shard, "offset": offset, "size": size, "format": "wav"}
                rows.append(row | {"labels": list(labels), "crc32": zlib.crc32(audio)})
        write_manifest(folder, pa.Table.from_pylist(rows, schema=SCHEMA), vocabulary)
        return read_manifest(folder)

    return build


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A web server on this machine; requests go to it without any proxy."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve() as server:
        yield server
