import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.dataset.manifest import Manifest, read_manifest, write_manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.errors import UsageError
from pipeline.labelling.begun_stores import stamp_of_padded_clips, stamp_to_go_on_with
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import write_stamp


@pytest.fixture
def manifest(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(3, 5))


def of_lengths(manifest: Manifest, *seconds: float | None) -> Manifest:
    """Let the manifest say how long its clips are."""
    rows = manifest.table.to_pylist()
    for row, its in zip(rows, seconds, strict=True):
        row |= {"sample_rate": 44_100, "frames": None if its is None else round(its * 44_100)}
    write_manifest(manifest.location, pa.Table.from_pylist(rows), manifest.vocabulary)
    return read_manifest(manifest.location)


@pytest.fixture
def stamp(manifest: Manifest, make_teacher: Callable[..., str]) -> StoreStamp:
    names = ("passt_tiny", "ast_tiny", "ced_tiny")
    return stamp_teachers([TeacherSpec.parse(make_teacher(name)) for name in names], manifest, "float32")


def go_on(store: Path, stamp: StoreStamp, manifest: Manifest, **settings: bool) -> StoreStamp:
    given = {"any_precision": False, "overwrite": False, **settings}
    return stamp_to_go_on_with(str(store), stamp, manifest, **given)


def test_stamp_says_who_hears_clips_as_long_as_they_are(stamp: StoreStamp) -> None:
    passt, ast, ced = stamp.teachers
    assert (passt.clip_lengths, passt.front_end[-6:]) == (None, ", 10 s")
    assert ast.clip_lengths == "own; features are filled up with zeros, or cut"
    assert ced.clip_lengths == "own; whole"
    assert not any(one.front_end.endswith(" s") for one in (ast, ced))
    assert b"clip_lengths" not in replace(stamp, teachers=(passt,)).to_json(), "what earlier versions read"


def test_store_of_a_teacher_that_pads_goes_on_whatever_the_clips(
    tmp_path: Path, stamp: StoreStamp, manifest: Manifest
) -> None:
    passt = replace(stamp, teachers=stamp.teachers[:1])
    assert stamp_of_padded_clips(passt) == passt
    write_stamp(str(tmp_path / "store"), passt)
    assert go_on(tmp_path / "store", passt, of_lengths(manifest, 1.0, 10.0, None)) == passt


def test_store_made_before_goes_on_where_every_clip_has_the_length_that_all_were_given(
    tmp_path: Path, stamp: StoreStamp, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    before = stamp_of_padded_clips(stamp)
    assert [one.front_end[-6:] for one in before.teachers] == [", 10 s"] * 3
    write_stamp(str(tmp_path / "store"), before)
    with caplog.at_level(logging.INFO):
        assert go_on(tmp_path / "store", stamp, of_lengths(manifest, 10.0, 10.0, 10.0)) == before
    assert "goes on as an earlier version began it, since all clips last 10 s" in caplog.text


def test_auto_precision_goes_on_in_a_store_made_before(tmp_path: Path, stamp: StoreStamp, manifest: Manifest) -> None:
    before = replace(stamp_of_padded_clips(stamp), precision="bfloat16")
    write_stamp(str(tmp_path / "store"), before)
    whole = of_lengths(manifest, 10.0, 10.0, 10.0)
    assert go_on(tmp_path / "store", stamp, whole, any_precision=True) == before
    assert go_on(tmp_path / "store", stamp, whole) == stamp, "another precision was asked for"


@pytest.mark.parametrize(
    ("seconds", "count"), [((10.0, 9.99, 10.0), 1), ((4.0, 10.0, None), 2), ((10.01, 30.0, 1.0), 3)]
)
def test_store_made_before_is_refused_in_one_line_where_clips_would_be_heard_otherwise(
    tmp_path: Path, stamp: StoreStamp, manifest: Manifest, seconds: tuple[float, ...], count: int
) -> None:
    write_stamp(str(tmp_path / "store"), stamp_of_padded_clips(stamp))
    mixed = of_lengths(manifest, *seconds)
    with pytest.raises(
        UsageError, match=rf"to 10 s for ast_tiny, ced_tiny; .* and {count} of 3 get other.*--overwrite"
    ):
        go_on(tmp_path / "store", stamp, mixed)
    assert go_on(tmp_path / "store", stamp, mixed, overwrite=True) == stamp


def test_views_made_before_are_all_of_other_lengths(tmp_path: Path, stamp: StoreStamp, manifest: Manifest) -> None:
    stamp = replace(stamp, views=ViewsStamp(count=2, config=ViewConfig()))
    write_stamp(str(tmp_path / "store"), stamp_of_padded_clips(stamp))
    with pytest.raises(UsageError, match="3 of 3 get other logits"):
        go_on(tmp_path / "store", stamp, of_lengths(manifest, 10.0, 10.0, 10.0))


def test_store_that_differs_otherwise_is_left_to_whoever_claims_it(
    tmp_path: Path, stamp: StoreStamp, manifest: Manifest
) -> None:
    assert go_on(tmp_path / "absent", stamp, manifest) == stamp
    write_stamp(str(tmp_path / "store"), replace(stamp_of_padded_clips(stamp), top_k=2))
    assert go_on(tmp_path / "store", stamp, manifest) == stamp
