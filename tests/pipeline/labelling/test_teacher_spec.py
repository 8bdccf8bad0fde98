from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.errors import CheckpointError, UsageError
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.models.weights import sha256_of_file


@pytest.mark.parametrize(
    ("text", "name", "checkpoint", "weight"),
    [
        ("passt_s", "passt_s", None, 1.0),
        ("passt_s@2", "passt_s", None, 2.0),
        ("passt_s=a/b.pt", "passt_s", "a/b.pt", 1.0),
        ("passt_s=b.pt@2.5", "passt_s", "b.pt", 2.5),
        ("ast_base=s3://me@host/x=1/b.pt", "ast_base", "s3://me@host/x=1/b.pt", 1.0),
        ("ast_base=runs/a@b/last.pt@1e-1", "ast_base", "runs/a@b/last.pt", 0.1),
    ],
)
def test_spec_is_name_file_and_weight(text: str, name: str, checkpoint: str | None, weight: float) -> None:
    assert TeacherSpec.parse(text) == TeacherSpec(name=name, checkpoint=checkpoint, weight=weight)


@pytest.mark.parametrize("text", ["", "passt_s=", "=b.pt", "@2", "passt_s=@2", "passt_s@two"])
def test_spec_without_name_or_file_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write NAME for its released weights, or NAME=CHECKPOINT"):
        TeacherSpec.parse(text)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weight_that_is_no_positive_number_is_refused(weight: str) -> None:
    with pytest.raises(UsageError, match="choose a number above 0"):
        TeacherSpec.parse(f"passt_s=b.pt@{weight}")


@pytest.fixture
def manifest(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(2, 5))


def test_stamp_says_what_made_the_logits(manifest: Manifest, make_teacher: Callable[..., str]) -> None:
    specs = [TeacherSpec.parse(make_teacher("passt_tiny") + "@2"), TeacherSpec.parse(make_teacher("ast_tiny"))]
    stamp = stamp_teachers(specs, manifest, "bfloat16")
    assert [teacher.name for teacher in stamp.teachers] == ["passt_tiny", "ast_tiny"]
    assert [teacher.weight for teacher in stamp.teachers] == [2.0, 1.0]
    assert [teacher.sha256 for teacher in stamp.teachers] == [
        sha256_of_file(Path(str(spec.checkpoint))) for spec in specs
    ]
    assert "sample_rate_hz=32000" in stamp.teachers[0].front_end
    assert "sample_rate_hz=16000" in stamp.teachers[1].front_end
    assert (stamp.values, stamp.classes, stamp.precision) == ("logits", 5, "bfloat16")
    assert stamp.vocabulary_sha256 == manifest.vocabulary.sha256


def test_unknown_teacher_is_refused_with_its_neighbours(manifest: Manifest, make_teacher: Callable[..., str]) -> None:
    file = make_teacher("passt_tiny").partition("=")[2]
    with pytest.raises(UsageError, match=r"passt_tinny.*did you mean passt_tiny"):
        TeacherSpec.parse(f"passt_tinny={file}").load(manifest)


def test_weights_of_another_teacher_are_refused(manifest: Manifest, make_teacher: Callable[..., str]) -> None:
    file = make_teacher("passt_tiny").partition("=")[2]
    with pytest.raises(CheckpointError, match="holds the weights of passt_tiny, not of ast_tiny"):
        TeacherSpec.parse(f"ast_tiny={file}").load(manifest)


def test_missing_file_is_named(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt: no such file"):
        TeacherSpec.parse(f"passt_tiny={tmp_path}/absent.pt").load(manifest)
