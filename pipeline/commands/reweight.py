"""`pipeline reweight`: another store from a store that keeps its members, without asking a teacher anything again."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import UsageError
from pipeline.logits.forms import mean_of_members
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import (
    LogitPart,
    LogitStore,
    finished_parts,
    open_store,
    other_parts,
    publish_part,
    read_stamp,
    write_failures,
    write_stamp,
)
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.progress import ProgressBar, console, progress_bar
from pipeline.storage import files as storage


@dataclass(frozen=True, slots=True)
class ReweightConfig:
    """Which store becomes which."""

    store: str
    """Logit store to start from, a folder or URL, made with --keep-members where weights are to change."""
    _: KW_ONLY
    out: str
    """Folder or URL of the new store; the old one stays as it is."""
    weights: tuple[float, ...] = ()
    """One weight for each teacher, in the order that `pipeline inspect` shows, 0 or more; 0 leaves a teacher out, and
    only the ratios count. Without it they stay."""
    keep_members: bool = True
    """Take each teacher's own logits along where the store has them."""
    top_k: int | None = None
    """Keep only this many logits of a clip, the largest; the teachers' own are left out then."""

    def __post_init__(self) -> None:
        if self.out.rstrip("/") == self.store.rstrip("/"):
            raise UsageError(
                f"out is the store itself, {self.out}. A store changed halfway would be of no use, so a new one is "
                "made: give it a folder of its own"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise UsageError(f"weights are {self.weights}; choose numbers of 0 or more")
        if self.weights and not any(self.weights):
            raise UsageError("weights are all 0; leave at least one teacher in")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}; choose 1 or more")


def run(config: Annotated[ReweightConfig, Parameter(name="*")]) -> None:
    """Weigh a store's teachers anew, or make a smaller copy of a store, from what it holds: no teacher runs.

    The new store is one when its last file is written, and nothing before: until then readers refuse it, and the same
    command goes on where it was stopped.

    Raises:
        PipelineError: the store does not hold what this needs, or the new one can't be written.
    """
    source = open_store(config.store)
    stamp = _new_stamp(source, config)
    _check_place(config.out, stamp)
    finished = finished_parts(config.out, stamp)
    missing = [
        part
        for part in source.parts
        if part.stem not in finished or finished[part.stem].shard_identity != part.shard_identity
    ]
    storage.remove_staged(config.out)
    with (
        progress_bar("reweighting", source.clip_count, done=source.clip_count - _clips(missing)) as bar,
        ThreadPoolExecutor(usable_cores(), thread_name_prefix="reweight") as threads,
    ):
        for _ in threads.map(lambda part: _copy(source, part, stamp, config.out, bar), missing):
            pass
    write_failures(config.out, source.parts)
    write_stamp(config.out, stamp)  # after all parts: this makes it a store
    storage.write_listing(config.out)
    for line in _changes(source.stamp, stamp):
        console().print(line, highlight=False, markup=False)
    console().print(
        f"wrote {config.out}: logits of {source.clip_count:,} clips", highlight=False, markup=False, soft_wrap=True
    )


def _clips(parts: list[LogitPart]) -> int:
    return sum(part.clips for part in parts)


def _new_stamp(source: LogitStore, config: ReweightConfig) -> StoreStamp:
    old = source.stamp
    if config.weights and old.members is None:
        raise UsageError(
            f"{source.location}: holds only the mean of its teachers' logits, which can't be weighed anew. "
            "Make it with `pipeline teacher-logits --keep-members`"
        )
    if config.weights and len(config.weights) != len(old.teachers):
        names = ", ".join(teacher.name for teacher in old.teachers)
        raise UsageError(f"{len(config.weights)} weights for {len(old.teachers)} teachers; give one for each: {names}")
    if old.top_k is not None:
        raise UsageError(f"{source.location}: holds only the {old.top_k} largest logits; start from the store it is of")
    if config.top_k is not None and config.top_k >= old.classes:
        raise UsageError(f"top_k is {config.top_k}, but the store has {old.classes} classes; choose fewer")
    weights = config.weights or old.weights
    keep = config.keep_members and config.top_k is None
    stamp = replace(
        old,
        teachers=tuple(replace(teacher, weight=weight) for teacher, weight in zip(old.teachers, weights, strict=True)),
        members=old.members if keep else None,
        top_k=config.top_k,
    )
    if stamp == old:
        raise UsageError("nothing would change: give --weights other than the store's, --top-k or --no-keep-members")
    return stamp


def _check_place(out: str, stamp: StoreStamp) -> None:
    """Refuse a folder that holds something else than a part of the new store."""
    others = other_parts(out, stamp)
    found = read_stamp(out) or (others[0].stamp if others else stamp)
    if others or found != stamp:
        raise UsageError(
            f"{out}: holds a store that was made otherwise ({found.differences_from(stamp)}). Give another --out, or "
            "delete it"
        )


def _copy(source: LogitStore, part: LogitPart, stamp: StoreStamp, out: str, bar: ProgressBar) -> None:
    members = None if source.stamp.members is None else source.part_members(part)  # (teachers, rows, classes)
    if members is None:
        logits = source.part_views(part).reshape(-1, stamp.classes)  # (rows, classes)
    else:
        logits = mean_of_members(members, stamp.weights)
    publish_part(
        out,
        part.stem,
        source.part_clip_ids(part).to_pylist(),
        logits,
        stamp,
        part.shard_identity,
        part.failures,
        members=members if stamp.members else None,
    )
    bar.advance(part.clips)


def _changes(old: StoreStamp, new: StoreStamp) -> Iterator[str]:
    for number, (before, after) in enumerate(zip(old.teachers, new.teachers, strict=True), start=1):
        if before.weight != after.weight:
            yield f"teacher {number}, {after.name}: weight {before.weight:g} → {after.weight:g}"
