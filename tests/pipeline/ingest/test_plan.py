import pickle
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pyarrow as pa
import pytest

from pipeline.dataset.vocabulary import LabelClass, Vocabulary, audioset_vocabulary
from pipeline.ingest.plan import Plan, PlannedShard, make_plan, plan_shards
from pipeline.ingest.rejections import Rejection
from pipeline.ingest.sources import ClipReader, PlannedClip, Source

CLIP = PlannedClip("a", "one.tar", "5 7", (3, 5), "m.wav", 512, 44, 30.0, 32.361)
CLIPS = [CLIP, PlannedClip("b", "two.wav", "1 1", ()), replace(CLIP, clip_id="c", member="n.wav", position=1024)]


@dataclass(frozen=True)
class ListedSource(Source):
    items: tuple[PlannedClip | Rejection, ...]

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        yield from self.items

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        raise AssertionError("a plan is made without reading a sound")


def plan(*items: PlannedClip | Rejection, held: tuple[str, ...] = ()) -> Plan:
    return make_plan(ListedSource(items), audioset_vocabulary(), pa.array(held, pa.string()))


def shards(*clips: PlannedClip, clips_per_shard: int = 2, **settings: object) -> list[PlannedShard]:
    return plan_shards("train", plan(*clips).clips, clips_per_shard, audioset_vocabulary(), **settings)  # pyright: ignore[reportArgumentType]


def test_a_plan_gives_its_clips_back() -> None:
    assert [clip for shard in shards(*CLIPS) for clip in shard.clips()] == CLIPS
    assert [shard.name for shard in shards(*CLIPS, first_number=7)] == ["train-000007.tar", "train-000008.tar"]


def test_the_first_of_each_id_is_taken_and_the_rest_told() -> None:
    again = [replace(CLIPS[1], clip_id="a"), replace(CLIPS[1], file="three.wav"), replace(CLIPS[2], member="x")]
    made = plan(Rejection("z", "z.wav", "file missing"), *CLIPS, *again, held=("c", "other"))
    assert made.clips["clip_id"].to_pylist() == ["a", "b"]
    assert [tuple(row.values()) for row in made.rejected.to_pylist()] == [
        ("z", "z.wav", "file missing", ""),
        ("c", "one.tar/n.wav", "repeated clip id", "what the dataset held already was taken"),
        ("a", "two.wav", "repeated clip id", "one.tar/m.wav was taken"),
        ("b", "three.wav", "repeated clip id", "two.wav was taken"),
        ("c", "one.tar/x", "repeated clip id", "what the dataset held already was taken"),
    ]


def test_a_plan_keeps_no_python_object_for_each_clip() -> None:
    class Many(ListedSource):
        def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
            for number in range(25_000):
                yield replace(CLIP, clip_id=f"clip {number}", member=f"{number}.wav", position=number)
                yield Rejection(f"gone {number}", None, "file missing")

    seen: list[int] = []
    tracemalloc.start()
    made = make_plan(Many(()), audioset_vocabulary(), pa.array([], pa.string()), on_items=seen.append)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (made.clips.num_rows, made.rejected.num_rows) == (25_000, 25_000)
    assert 48_000 < sum(seen) <= 50_000
    assert held < 1e6  # bytes
    assert peak < 12e6  # as objects, clips and rejections take 25 MB


@pytest.mark.parametrize("clip_id", ["", "a\nb", "x" * 2000])
def test_what_can_be_no_id_is_refused(clip_id: str) -> None:
    made = plan(CLIP, replace(CLIP, clip_id=clip_id))
    assert made.clips.num_rows == 1
    assert made.rejected["reason"].to_pylist() == ["unusable clip id"]


def test_a_shards_fingerprint_is_that_of_its_own_clips_alone() -> None:
    in_a_row = shards(CLIPS[1], *CLIPS)[1]
    alone = shards(CLIPS[2], clips_per_shard=2)[0]
    assert in_a_row.clips() == alone.clips()
    assert in_a_row.fingerprint() == replace(alone, name=in_a_row.name).fingerprint()
    assert pickle.loads(pickle.dumps(in_a_row.alone())).fingerprint() == in_a_row.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"clip_id": "x"},
        {"file": "x"},
        {"version": "5 8"},
        {"member": ""},
        {"labels": (3, 6)},
        {"labels": ()},
        {"position": 0},
        {"size": None},
        {"start_seconds": None},
        {"end_seconds": 32.3},
    ],
)
def test_a_fingerprint_changes_with_whatever_a_shard_is_made_from(change: dict) -> None:
    before = shards(CLIPS[0], CLIPS[1])[0].fingerprint()
    assert shards(replace(CLIPS[0], **change), CLIPS[1])[0].fingerprint() != before


def test_a_fingerprint_changes_with_the_classes_and_the_recipe() -> None:
    shard = shards(CLIPS[0])[0]
    others = Vocabulary((LabelClass(0, "a", "a"),))
    found = {
        shard.fingerprint(),
        replace(shard, vocabulary=others).fingerprint(),
        replace(shard, recipe="opus").fingerprint(),
    }
    assert len(found) == 3
