from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands.probe import ProbeConfig, run
from pipeline.dataset.manifest import Manifest
from pipeline.embeddings import probing
from pipeline.embeddings.store import EmbeddingStamp, claim, publish_part
from pipeline.errors import PipelineError, UsageError

STAMP = EmbeddingStamp(model="mn01", sha256="0", front_end="", layers="penultimate", size=4, precision="float32")
LabelledIds = list[tuple[str, tuple[int, ...]]]


@pytest.fixture
def made(tmp_path: Path, build_dataset: Callable[..., Manifest]) -> Callable[..., tuple[str, str]]:
    """Returns `make(name, clips, tells)`: a dataset, and embeddings that tell its clips' classes, or nothing."""

    def make(name: str, clips: LabelledIds, *, tells: bool = True, keep: int | None = None) -> tuple[str, str]:
        manifest = build_dataset(name, [(clip_id, labels, b"") for clip_id, labels in clips], clips_per_shard=1000)
        random = np.random.default_rng(0)
        values = random.normal(0, 0.3, (len(clips), 4)).astype(np.float16)
        for row, (_, labels) in enumerate(clips):
            values[row, list(labels)] += 1 if tells else 0
        out = str(tmp_path / f"{name}-embeddings")
        claim(out, STAMP, overwrite=False)
        ids = [clip_id for clip_id, _ in clips][:keep]
        publish_part(out, manifest.shards[0], ids, values[: len(ids)], STAMP, "", ())
        return str(manifest.location), out

    return make


def singles(count: int, prefix: str = "clip") -> LabelledIds:
    return [(f"{prefix}{number}", (number % 4,)) for number in range(count)]


def test_embeddings_that_tell_the_class_are_accurate_and_noise_is_chance(made: Callable[..., tuple[str, str]]) -> None:
    data, good = made("good", singles(120))
    scores = run(ProbeConfig(embeddings=(good,), data=(data,)))
    assert len(scores) == 5
    assert sum(one.clips for one in scores) == 120
    assert np.mean([one.score for one in scores]) > 0.9
    data, noise = made("noise", singles(120), tells=False)
    scores = run(ProbeConfig(embeddings=(noise,), data=(data,)))
    assert abs(np.mean([one.score for one in scores]) - 0.25) < 0.15


def test_clips_with_any_number_of_tags_are_scored_by_map(
    made: Callable[..., tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(1)
    clips = [(f"clip{number}", tuple(np.flatnonzero(random.random(4) < 0.4).tolist())) for number in range(100)]
    data, out = made("tags", clips)
    scores = run(ProbeConfig(embeddings=(out,), data=(data,), folds=3))
    assert all(one.score > one.chance + 0.3 for one in scores)
    assert "mAP" in capsys.readouterr().out
    with pytest.raises(UsageError, match="some clips have no class or several"):
        run(ProbeConfig(embeddings=(out,), data=(data,), task="single-label"))


def test_several_datasets_are_the_folds(made: Callable[..., tuple[str, str]]) -> None:
    folds = [made(f"fold{number}", singles(20 + 4 * number, f"fold{number}-")) for number in range(3)]
    scores = run(ProbeConfig(embeddings=tuple(out for _, out in folds), data=tuple(data for data, _ in folds)))
    assert [one.clips for one in scores] == [20, 24, 28]


def test_clips_without_an_embedding_are_counted(
    made: Callable[..., tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = made("some", singles(80), keep=60)
    run(ProbeConfig(embeddings=(out,), data=(data,)))
    assert "of 60 clips" in (printed := capsys.readouterr().out)
    assert "20 clips without embedding or label left out" in printed


def test_a_clip_is_of_the_same_fold_in_any_dataset() -> None:
    folds = [probing.fold_by_hash(f"clip{number}", 5) for number in range(1000)]
    assert folds[:6] == [probing.fold_by_hash(f"clip{number}", 5) for number in range(6)]
    assert min(np.bincount(folds)) > 150


def test_nothing_to_probe_says_why(made: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = made("one", [(f"clip{number}", (0,)) for number in range(20)])
    with pytest.raises(PipelineError, match="all of one class"):
        run(ProbeConfig(embeddings=(out,), data=(data,)))
    other, _ = made("other", singles(20, "other"))
    with pytest.raises(PipelineError, match="no clip of --data has an embedding"):
        run(ProbeConfig(embeddings=(out,), data=(other,)))
    with pytest.raises(UsageError, match="folds is 1"):
        ProbeConfig(embeddings=(out,), data=(data,), folds=1)
    monkeypatch.setattr(probing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"probe needs scikit-learn: pip install 'audioset-distill\[probe\]'"):
        ProbeConfig(embeddings=(out,), data=(data,))
