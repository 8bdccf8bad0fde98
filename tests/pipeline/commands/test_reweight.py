import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands.reweight import ReweightConfig, run
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.errors import LogitStoreError, UsageError
from pipeline.logits.forms import largest, mean_of_members
from pipeline.logits.stamp import StoreStamp, TeacherStamp
from pipeline.logits.store import (
    FAILED_NAME,
    STORE_NAME,
    ClipFailure,
    list_parts,
    open_store,
    publish_part,
    write_failures,
    write_stamp,
)
from pipeline.storage.files import LISTING_NAME

CLASSES = 6
TEACHERS = tuple(
    TeacherStamp(name=name, weight=weight, sha256=name * 8, front_end="mel")
    for name, weight in (("passt", 2.0), ("ast", 1.0), ("ced", 1.0))
)
STAMP = StoreStamp(
    teachers=TEACHERS, vocabulary_sha256="c" * 64, classes=CLASSES, precision="float32", members="float16"
)
MEMBERS = np.random.default_rng(0).normal(-4, 2, (3, 8, CLASSES)).astype(np.float16)
"""(teachers, rows, classes): of two parts of four rows."""

StoreMaker = Callable[..., Path]


@pytest.fixture
def make_store(tmp_path: Path) -> StoreMaker:
    """Write a store of two parts with a failure."""

    def make(name: str = "store", stamp: StoreStamp = STAMP) -> Path:
        folder = tmp_path / name
        write_stamp(str(folder), stamp)
        for number, stem in enumerate(("a", "b")):
            members = MEMBERS[:, 4 * number : 4 * number + 4]
            ids = [f"-{stem}{clip}" for clip in range(4 // stamp.view_count)]
            publish_part(
                str(folder),
                stem,
                ids,
                mean_of_members(members, stamp.weights),
                stamp,
                f"identity of {stem}",
                [ClipFailure(clip_id=f"bad {stem}", reason="not audio")],
                members=members if stamp.members else None,
            )
        write_failures(str(folder), list_parts(str(folder)))
        return folder

    return make


def contents(store: Path) -> dict[str, bytes]:
    # The listing for web servers names modification times.
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != LISTING_NAME}


@pytest.mark.parametrize("views", [None, ViewsStamp(count=2, config=ViewConfig())])
def test_new_weights_give_the_store_that_they_would_have_made(make_store: StoreMaker, views: ViewsStamp | None) -> None:
    stamp = replace(STAMP, views=views)
    weights = (1.0, 0.0, 3.0)
    weighed = replace(
        stamp, teachers=tuple(replace(one, weight=weight) for one, weight in zip(TEACHERS, weights, strict=True))
    )
    store, expected = make_store("store", stamp), make_store("expected", weighed)
    before = contents(store)
    run(ReweightConfig(str(store), out=str(store.parent / "new"), weights=weights))
    assert contents(store.parent / "new") == contents(expected)
    assert contents(store) == before


def test_old_weights_again_give_back_every_byte(make_store: StoreMaker, capsys: pytest.CaptureFixture) -> None:
    store = make_store()
    run(ReweightConfig(str(store), out=str(store.parent / "other"), weights=(1, 1, 1)))
    assert "teacher 1, passt: weight 2 → 1" in capsys.readouterr().out
    run(ReweightConfig(str(store.parent / "other"), out=str(store.parent / "back"), weights=(2, 1, 1)))
    assert contents(store.parent / "back") == contents(store)


def test_small_copy_keeps_the_largest_and_leaves_the_members_out(make_store: StoreMaker) -> None:
    store = make_store()
    run(ReweightConfig(str(store), out=str(store.parent / "small"), top_k=2))
    small = open_store(str(store.parent / "small"))
    assert small.stamp == replace(STAMP, members=None, top_k=2)
    assert (small.clip_count, {failure.clip_id for part in small.parts for failure in part.failures}) == (
        8,
        {"bad a", "bad b"},
    )
    top = largest(mean_of_members(MEMBERS[:, :4], STAMP.weights), 2)
    found = small.part_logits(small.parts[0])
    np.testing.assert_array_equal(np.take_along_axis(found, top.classes.astype(int), 1), top.logits)
    assert small.size < open_store(str(store)).size


def test_copy_without_members_has_the_same_mean(make_store: StoreMaker) -> None:
    store = make_store()
    run(ReweightConfig(str(store), out=str(store.parent / "plain"), keep_members=False))
    plain, whole = open_store(str(store.parent / "plain")), open_store(str(store))
    assert plain.stamp == replace(STAMP, members=None)
    for ours, theirs in zip(plain.parts, whole.parts, strict=True):
        np.testing.assert_array_equal(plain.part_logits(ours), whole.part_logits(theirs))


def test_unfinished_store_is_none_and_the_same_command_finishes_it(make_store: StoreMaker) -> None:
    store = make_store()
    config = ReweightConfig(str(store), out=str(store.parent / "new"), weights=(1, 1, 1))
    run(config)
    whole = contents(store.parent / "new")
    (store.parent / "new" / STORE_NAME).unlink()  # as if it had been stopped before its end
    (store.parent / "new" / "b.parquet").unlink()
    kept = (store.parent / "new" / "a.parquet").stat().st_mtime_ns
    with pytest.raises(LogitStoreError, match=r"no store\.json"):
        open_store(str(store.parent / "new"))
    run(config)
    assert contents(store.parent / "new") == whole
    assert (store.parent / "new" / "a.parquet").stat().st_mtime_ns == kept


def test_damaged_part_leaves_no_store(make_store: StoreMaker) -> None:
    store = make_store()
    content = bytearray((store / "b.parquet").read_bytes())
    content[100:200] = bytes(100)
    (store / "b.parquet").write_bytes(content)
    with pytest.raises(LogitStoreError, match=r"b\.parquet: damaged"):
        run(ReweightConfig(str(store), out=str(store.parent / "new"), weights=(1, 1, 1)))
    assert not (store.parent / "new" / STORE_NAME).exists()
    assert not (store.parent / "new" / FAILED_NAME).exists()


def test_store_made_otherwise_is_not_overwritten(make_store: StoreMaker) -> None:
    store, other = make_store(), make_store("other", replace(STAMP, precision="bfloat16"))
    before = contents(other)
    with pytest.raises(UsageError, match="made otherwise"):
        run(ReweightConfig(str(store), out=str(other), weights=(1, 1, 1)))
    (other / STORE_NAME).unlink()
    with pytest.raises(UsageError, match="precision is bfloat16, not float32"):
        run(ReweightConfig(str(store), out=str(other), weights=(1, 1, 1)))
    del before[STORE_NAME]
    assert contents(other) == before


def test_store_without_members_can_be_made_smaller(make_store: StoreMaker) -> None:
    stamp = replace(STAMP, members=None)
    store = make_store("plain", stamp)
    run(ReweightConfig(str(store), out=str(store.parent / "small"), top_k=3))
    assert json.loads((store.parent / "small" / STORE_NAME).read_bytes())["top_k"] == 3


@pytest.mark.parametrize(
    ("stamp", "settings", "complaint"),
    [
        (replace(STAMP, members=None), {"weights": (1, 1, 1)}, "--keep-members"),
        (STAMP, {"weights": (1, 1)}, "2 weights for 3 teachers; give one for each: passt, ast, ced"),
        (STAMP, {}, "nothing would change"),
        (STAMP, {"weights": (2, 1, 1)}, "nothing would change"),
        (STAMP, {"top_k": 6}, "has 6 classes"),
        (replace(STAMP, members=None, top_k=2), {"top_k": 1}, "only the 2 largest"),
    ],
)
def test_what_the_store_cannot_give_is_refused(
    make_store: StoreMaker, stamp: StoreStamp, settings: dict, complaint: str
) -> None:
    store = make_store("store", stamp)
    with pytest.raises(UsageError, match=complaint):
        run(ReweightConfig(str(store), out=str(store.parent / "new"), **settings))
    assert not (store.parent / "new").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"out": "store/"}, "a folder of its own"),
        ({"weights": (1.0, -1.0)}, "0 or more"),
        ({"weights": (0.0, 0.0)}, "all 0"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ReweightConfig("store", **{"out": "new", **settings})
