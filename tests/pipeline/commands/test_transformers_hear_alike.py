"""Training a transformer, its evaluation, `evaluate` and stage 1 hear a clip alike, whatever its length."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from original_teachers import fades
from torch import Tensor, nn

import student
import teacher
from pipeline.batches.join import TrainingBatch
from pipeline.commands import evaluate as evaluate_command
from pipeline.commands import train_teacher as train_command
from pipeline.commands.evaluate import EvaluateConfig
from pipeline.commands.teacher_logits import TeacherLogitsConfig
from pipeline.commands.teacher_logits import run as label
from pipeline.commands.train_teacher import PatchoutConfig, TeacherAverageConfig, TrainTeacherConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.logits.store import open_store
from pipeline.scoring.scoring import System
from pipeline.training.checkpoints import save_weights
from pipeline.training.teacher_learner import TeacherLearner

SECONDS = (2.3, 8.1, 10.0, 12.5, 23.0)
RATE_HZ = 16_000
FAMILIES = ("passt_tiny", "ast_tiny", "ced_tiny")

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray", "one_thread")]


@pytest.fixture
def manifest(build_dataset: Callable[..., Manifest]) -> Manifest:
    clips = []
    for place, noise in enumerate(fades(RATE_HZ, SECONDS)):
        stream = io.BytesIO()
        soundfile.write(stream, noise.numpy(), RATE_HZ, format="FLAC", subtype="PCM_16")
        clips.append((f"clip{place}", (place % 2,), stream.getvalue()))
    return build_dataset("data", clips, clips_per_shard=9)


@pytest.fixture
def weights(tmp_path: Path, five_classes: Vocabulary) -> list[str]:
    """Transformers whose logits differ where features do, as `--teacher` and `--checkpoint` spell them."""
    about = {"stage": "teacher", "classes": 5, "vocabulary_sha256": five_classes.sha256, "kwargs": {}}
    generator = torch.Generator().manual_seed(1)
    for name in FAMILIES:
        network = teacher.create_model(name, num_classes=5)
        with torch.no_grad():
            for weight in network.parameters():
                scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
                weight.add_(torch.randn(weight.shape, generator=generator) * scale)
        save_weights(tmp_path / f"{name}.safetensors", network.state_dict(), {**about, "model": name})
    return [f"{name}={tmp_path / name}.safetensors" for name in FAMILIES]


def stage_1(manifest: Manifest, folder: Path, specs: Sequence[str]) -> list[np.ndarray]:
    """Returns each teacher's logits from the store: (clips, classes), float16."""
    label(
        TeacherLogitsConfig(
            data=manifest.location,
            teacher=tuple(specs),
            store=str(folder / "store"),
            keep_members=True,
            precision="float32",
            batch_size=4,
            cpus_per_actor=1,
        )
    )
    store = open_store(str(folder / "store"))
    numbers = range(1, len(specs) + 1)
    return [np.array(store.align(manifest, folder / "aligned", member=number).logits) for number in numbers]


def evaluate(manifest: Manifest, specs: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Returns what `pipeline evaluate` scores: the logits of each checkpoint, (clips, classes)."""
    scored: list[System] = []
    real = evaluate_command.score

    def score(systems: Sequence[System], *args: Any, **more: Any) -> Any:
        scored.extend(systems)
        return real(systems, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_command, "score", score)
        evaluate_command.run(
            EvaluateConfig(data=manifest.location, checkpoint=tuple(specs), batch_size=3, device="cpu")
        )
    assert not any(system.failures for system in scored)
    return [system.logits for system in scored[: len(specs)]]


class Witness(TeacherLearner):
    """Learns as ever; notes the logits that are evaluated, and those of the first step's clips with all patches."""

    evaluated: list[np.ndarray]
    learned: dict[int, np.ndarray]

    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        self.evaluated.append(logits)
        return super().score(logits, labels, label_mask)

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        if not self.learned:
            network.eval()
            with torch.inference_mode():
                shown = self.show(batch, torch.Generator())
                self.learned.update(zip(batch.rows.tolist(), self.tag(network, shown, generator).numpy(), strict=True))
            network.train()
        return super().loss(network, batch, generator)


def train(manifest: Manifest, spec: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[Witness]:
    name, _, path = spec.partition("=")
    witness = type("Witness", (Witness,), {"evaluated": [], "learned": {}})
    config = TrainTeacherConfig(
        data=manifest.location,
        eval_data=manifest.location,
        run=str(folder / name),
        cache=str(folder / "cache"),
        checkpoint=path,
        model=name,
        epochs=2,
        batch_size=4,
        learning_rate=1e-12,
        workers=2,
        sampling="uniform",
        device="cpu",
        patchout=PatchoutConfig(time=5, frequency=0),
        mixup=student.MixupConfig(alpha=0),
        average=TeacherAverageConfig(kind="none"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "TeacherLearner", witness)
        assert train_command.run(config).finished
    return witness


def assert_same(logits: np.ndarray, stored: np.ndarray) -> None:
    """What float32 gives is, but for the order of its sums, what the store rounds to float16."""
    off = np.abs(logits.astype(np.float64) - stored.astype(np.float64))  # (clips, classes)
    assert (off <= 0.5001 * np.spacing(np.abs(stored)).astype(np.float64) + 2e-5).all()


def test_training_its_evaluation_and_evaluate_hear_clips_as_stage_1_does(
    manifest: Manifest, weights: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stage_1(manifest, tmp_path, weights)
    for logits, ours in zip(evaluate(manifest, weights, monkeypatch), stored, strict=True):
        assert_same(logits, ours)
    for spec, ours in zip(weights, stored, strict=True):
        witness = train(manifest, spec, tmp_path, monkeypatch)
        rows = sorted(witness.learned)
        assert len(rows) == 4
        # A PaSST hears jittered bands while it learns; nothing of its clips' lengths is in question.
        if not spec.startswith("passt"):
            assert_same(np.stack([witness.learned[row] for row in rows]), ours[rows])
        # CED's normalisation has learned by then, so the run's own weights tell what its evaluation heard.
        [again] = evaluate(manifest, [str(tmp_path / spec.partition("=")[0] / "last.safetensors")], monkeypatch)
        np.testing.assert_allclose(witness.evaluated[-1], again, atol=2e-5)
