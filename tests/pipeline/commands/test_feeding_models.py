"""Commands that only run models feed them as a training does: with all the cores, in large batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_models import write_student

from pipeline.batches import join
from pipeline.batches.join import scoring_batch
from pipeline.commands import compare, embed, evaluate, report, tag
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.sound_sources import find_sounds
from pipeline.decoding import pool
from pipeline.embeddings import extracting

Start = Callable[[Manifest, str, Path], object]


def start_evaluate(data: Manifest, checkpoint: str, out: Path) -> object:
    return evaluate.run(evaluate.EvaluateConfig(data=data.location, checkpoint=(checkpoint,), device="cpu"))


def start_embed(data: Manifest, checkpoint: str, out: Path) -> object:
    return embed.run(embed.EmbedConfig(data=data.location, checkpoint=checkpoint, out=str(out), device="cpu"))


@pytest.mark.parametrize("start", [start_evaluate, start_embed])
def test_a_command_decodes_with_the_cores_that_there_are(
    start: Start,
    build_dataset: Callable[..., Manifest],
    make_noises: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []

    class Pool(pool.DecodingPool):
        def __init__(self, processes: int, **more: Any) -> None:
            started.append(processes)
            super().__init__(0, **more)

    monkeypatch.setattr(join, "usable_cores", lambda: 3)
    for module in (join, extracting):
        monkeypatch.setattr(module, "DecodingPool", Pool)
    data = build_dataset("data", make_noises(4, 5))
    start(data, write_student(tmp_path / "mn.safetensors", data.vocabulary), tmp_path / "out")
    assert started == [3]


@pytest.mark.parametrize(
    "settings", [compare.CompareConfig, embed.EmbedConfig, evaluate.EvaluateConfig, report.ReportConfig, tag.TagConfig]
)
def test_cores_and_batches_follow_the_device_unless_somebody_says(settings: Any) -> None:
    defaults = {name: field.default for name, field in settings.__dataclass_fields__.items()}
    assert (defaults["workers"], defaults["batch_size"]) == (None, None)


def test_a_gpu_is_given_as_many_clips_at_once_as_it_is_busy_with() -> None:
    assert scoring_batch(None, torch.device("cuda")) == 64
    assert scoring_batch(None, torch.device("cpu")) == 32
    assert scoring_batch(7, torch.device("cuda")) == 7


@pytest.mark.parametrize(("on_gpu", "sounds", "expected"), [(True, 99, 16), (False, 99, 4), (True, 3, 3)])
def test_sounds_for_a_gpu_are_decoded_with_all_cores(
    on_gpu: bool, sounds: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tag, "usable_cores", lambda: 16)
    for number in range(sounds):
        (tmp_path / f"{number}.wav").touch()
    config = tag.TagConfig((str(tmp_path),), checkpoint="mn10_as")
    found = find_sounds(config.files)
    assert len(found) == sounds
    assert tag._workers(config, found, on_gpu=on_gpu) == expected
