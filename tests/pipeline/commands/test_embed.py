from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from embedding_models import write_student, write_teacher

from pipeline.commands.embed import EmbedConfig, run
from pipeline.dataset.audio import load_waveform
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.embeddings.layers import Embedder
from pipeline.embeddings.store import read_embeddings
from pipeline.errors import PipelineError, TooManyFailuresError, UsageError
from pipeline.models.loading import load_model

TinyClip = tuple[str, tuple[int, ...], bytes]


@pytest.fixture
def clips(make_noises: Callable[..., list[TinyClip]]) -> list[TinyClip]:
    return make_noises(12, 5)


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], clips: list[TinyClip]) -> str:
    return str(build_dataset("data", clips).location)


@pytest.fixture
def checkpoint(tmp_path: Path, five_classes: Vocabulary) -> str:
    return write_student(tmp_path / "mn.safetensors", five_classes)


def embed(data: str, out: Path | str, **settings) -> None:
    run(EmbedConfig(data=data, out=str(out), workers=0, device="cpu", **settings))


def test_every_clip_gets_the_vector_that_its_model_makes_of_it(
    tmp_path: Path, data: str, clips: list[TinyClip], checkpoint: str
) -> None:
    embed(data, tmp_path / "out", checkpoint=checkpoint, batch_size=4)
    found = read_embeddings(str(tmp_path / "out"))
    assert found.clip_ids == [clip_id for clip_id, _, _ in clips]
    assert found.values.dtype == np.float16
    embedder = Embedder(load_model(checkpoint).network)
    sounds = [torch.from_numpy(load_waveform(audio, sample_rate_hz=32_000, seconds=10)) for _, _, audio in clips]
    wanted = torch.cat([embedder(sound[None]) for sound in sounds]).numpy()
    np.testing.assert_allclose(found.values, wanted, rtol=2e-3, atol=2e-3)
    table = pq.read_table(tmp_path / "out" / "tiny-000000.parquet")  # as any Parquet reader sees it
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list")
    assert len(table) == 5


@pytest.mark.parametrize("name", ["passt_tiny", "ced_tiny"])
def test_a_teacher_embeds_clips_of_a_dataset_with_other_classes(
    tmp_path: Path, build_dataset: Callable[..., Manifest], clips: list[TinyClip], five_classes: Vocabulary, name: str
) -> None:
    data = str(build_dataset("data", clips[:6]).location)
    own = Vocabulary(five_classes.classes[:3])
    spec = f"{name}={write_teacher(tmp_path / 'teacher.safetensors', own, name)}"
    embed(data, tmp_path / "out", teacher=spec)
    found = read_embeddings(str(tmp_path / "out"))
    assert found.values.shape == (6, 32)
    assert found.stamp.model == name


def test_the_same_command_does_only_what_is_missing(tmp_path: Path, data: str, checkpoint: str) -> None:
    out = tmp_path / "out"
    embed(data, out, checkpoint=checkpoint)
    parts = sorted(out.glob("tiny-*.parquet"))
    before = [part.stat().st_mtime_ns for part in parts]
    content = parts[1].read_bytes()
    parts[1].unlink()
    embed(data, out, checkpoint=checkpoint)
    after = [part.stat().st_mtime_ns for part in parts]
    assert parts[1].read_bytes() == content
    assert [place for place in range(3) if before[place] != after[place]] == [1]


def test_another_layer_needs_another_folder_or_leave_to_overwrite(tmp_path: Path, data: str, checkpoint: str) -> None:
    out = tmp_path / "out"
    embed(data, out, checkpoint=checkpoint)
    with pytest.raises(UsageError, match="layers penultimate instead of features"):
        embed(data, out, checkpoint=checkpoint, layer="features")
    embed(data, out, checkpoint=checkpoint, layer="features", overwrite=True)
    assert read_embeddings(str(out)).stamp.layers == "features"


def test_a_clip_that_does_not_decode_is_listed_and_too_many_end_the_command(
    tmp_path: Path, build_dataset: Callable[..., Manifest], clips: list[TinyClip], checkpoint: str
) -> None:
    broken = [
        (clip_id, labels, b"no sound" if place == 3 else audio) for place, (clip_id, labels, audio) in enumerate(clips)
    ]
    data, out = str(build_dataset("data", broken).location), tmp_path / "out"
    with pytest.raises(TooManyFailuresError, match=r"1 of 12 clips .* have no embedding"):
        embed(data, out, checkpoint=checkpoint)
    embed(data, out, checkpoint=checkpoint, max_failed=0.2)
    assert pq.read_table(out / "failed.parquet")["clip_id"].to_pylist() == [clips[3][0]]
    assert len(read_embeddings(str(out)).clip_ids) == 11


def test_embeddings_may_lie_behind_a_url(data: str, checkpoint: str) -> None:
    embed(data, "memory://embed-test/out", checkpoint=checkpoint)
    embed(data, "memory://embed-test/out", checkpoint=checkpoint)
    assert len(read_embeddings("memory://embed-test/out").clip_ids) == 12


def test_a_folder_without_embeddings_says_so(tmp_path: Path, data: str) -> None:
    with pytest.raises(PipelineError, match="this is no store of embeddings; make one with `pipeline embed`"):
        read_embeddings(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give --checkpoint or --teacher"),
        ({"checkpoint": "a", "teacher": "b"}, "one of them"),
        ({"checkpoint": "a", "batch_size": 0}, "batch_size is 0"),
        ({"checkpoint": "a", "max_failed": 2}, "max_failed is 2"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EmbedConfig(data="data", out="out", **settings)
