"""Tiny datasets of real shards and small teachers for the tests of what reads them, and a Ray that they share."""

import io
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from file_server import FileServer, serve
from torch import nn

import teacher
from pipeline.dataset.clips import Clip
from pipeline.dataset.manifest import SCHEMA, Manifest, read_manifest, write_manifest
from pipeline.dataset.shards import open_shard
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.training.checkpoints import save_weights

TinyClip = tuple[str, tuple[int, ...], bytes]
"""Clip id, labels, WAV bytes."""
DatasetBuilder = Callable[..., Manifest]
TeacherMaker = Callable[..., str]


def wav_of(samples: np.ndarray, sample_rate_hz: int = 32_000) -> bytes:
    """Returns (samples,) float32 as a 16-bit WAV."""
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
    """Returns `build(name, clips, …)`: writes shards and a manifest, and opens it."""

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


@pytest.fixture
def make_teacher(tmp_path: Path, five_classes: Vocabulary) -> TeacherMaker:
    """Returns `make(name, seed=0, change=…)`: writes a teacher's weights, spells it as `--teacher` takes it."""

    def make(name: str, *, seed: int = 0, change: Callable[[nn.Module], object] = lambda network: None) -> str:
        torch.manual_seed(seed)
        network = teacher.create_model(name, num_classes=len(five_classes))
        with torch.no_grad():
            network.get_classifier().get_parameter("bias").uniform_(-6, -1)  # logits apart, as trained ones are
            change(network)
        path = tmp_path / f"{name}-{seed}.safetensors"
        metadata = {
            "stage": "teacher",
            "model": name,
            "kwargs": {},
            "classes": len(five_classes),
            "vocabulary_sha256": five_classes.sha256,
        }
        save_weights(path, network.state_dict(), metadata)
        return f"{name}={path}"

    return make


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Starting Ray takes seconds, so runs join this one."""
    from pipeline.runtime.ray_session import running_ray

    with running_ray(None):
        yield
