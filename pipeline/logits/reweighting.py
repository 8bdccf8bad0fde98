"""A store made from a store that keeps its members: other weights, or a smaller copy. No teacher runs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.errors import UsageError
from pipeline.logits.forms import mean_of_members
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import (
    LogitPart,
    LogitStore,
    finished_parts,
    other_parts,
    publish_part,
    read_stamp,
    write_failures,
    write_stamp,
)
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.progress import ProgressBar, progress_bar
from pipeline.runtime.threads import Threads
from pipeline.storage import files as storage


def reweighted_stamp(
    source: LogitStore, weights: Sequence[float], *, keep_members: bool, top_k: int | None
) -> StoreStamp:
    """Returns the stamp of a store that is made from another one.

    Args:
        source: the other one.
        weights: one for each teacher, 0 or more; none keeps the store's.
        keep_members: take each teacher's own logits along where the store has them.
        top_k: how many logits of a clip are kept, without the teachers' own; None keeps all.

    Raises:
        UsageError: the store does not hold what this needs, or nothing would change.
    """
    old = source.stamp
    if weights and old.members is None:
        raise UsageError(
            f"{source.location}: holds only the mean of its teachers' logits, which can't be weighed anew. "
            "Make it with `pipeline teacher-logits --keep-members`"
        )
    if weights and len(weights) != len(old.teachers):
        names = ", ".join(teacher.name for teacher in old.teachers)
        raise UsageError(f"{len(weights)} weights for {len(old.teachers)} teachers; give one for each: {names}")
    if old.top_k is not None:
        raise UsageError(f"{source.location}: holds only the {old.top_k} largest logits; start from the store it is of")
    if top_k is not None and top_k >= old.classes:
        raise UsageError(f"top_k is {top_k}, but the store has {old.classes} classes; choose fewer")
    weights = weights or old.weights
    keep = keep_members and top_k is None
    stamp = replace(
        old,
        teachers=tuple(replace(teacher, weight=weight) for teacher, weight in zip(old.teachers, weights, strict=True)),
        members=old.members if keep else None,
        top_k=top_k,
    )
    if stamp == old:
        raise UsageError("nothing would change: give --weights other than the store's, --top-k or --no-keep-members")
    return stamp


def reweight(source: LogitStore, out: str, stamp: StoreStamp) -> None:
    """Make a store from another one, or go on where that was stopped.

    Args:
        source: the other one; it stays as it is.
        out: folder or URL of the new one.
        stamp: its stamp, from `reweighted_stamp`.

    Raises:
        UsageError: there is a store that was made otherwise.
        LostProcessError: reading or writing a part stands still.
    """
    _check_place(out, stamp)
    finished = finished_parts(out, stamp)
    missing = [
        part
        for part in source.parts
        if part.stem not in finished or finished[part.stem].shard_identity != part.shard_identity
    ]
    storage.remove_staged(out)
    left = sum(part.clips for part in missing)
    with (
        progress_bar("reweighting", source.clip_count, done=source.clip_count - left) as bar,
        Threads(usable_cores(), "reweight") as threads,
    ):
        for _ in threads.map(lambda part: _copy(source, part, stamp, out, bar), missing, name=lambda part: part.stem):
            pass
    write_failures(out, source.parts)
    write_stamp(out, stamp)  # after all parts: this makes it a store
    storage.write_listing(out)


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


def weight_changes(old: StoreStamp, new: StoreStamp) -> Iterator[str]:
    """Yields a line for each teacher whose weight is another one."""
    for number, (before, after) in enumerate(zip(old.teachers, new.teachers, strict=True), start=1):
        if before.weight != after.weight:
            yield f"teacher {number}, {after.name}: weight {before.weight:g} → {after.weight:g}"
