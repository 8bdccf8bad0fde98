"""What a store was begun with, and whether a run today may go on with it."""

import logging
from dataclasses import replace

import numpy as np

from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import read_stamp

_PADDED_SECONDS = 10.0
"""What earlier versions padded or cut every clip to, also for teachers that now hear clips as long as they are."""

_log = logging.getLogger(__name__)


def stamp_to_go_on_with(
    store: str, stamp: StoreStamp, manifest: Manifest, *, any_precision: bool, overwrite: bool
) -> StoreStamp:
    """Return the stamp that a store was begun with, where a run today gives the same numbers, else `stamp`.

    Args:
        store: the store's folder, there or not.
        stamp: what this run would write into a new store.
        manifest: of the dataset.
        any_precision: go on in the precision that the store was begun with, so that no resume on another machine makes
            it anew.
        overwrite: a store that was made otherwise may be replaced.

    Raises:
        UsageError: an earlier version made the store, gave these teachers clips of other lengths, and it may not be
            replaced. What else may differ is the affair of whoever claims the store.
    """
    found = read_stamp(store)
    if found is None:
        return stamp
    if any_precision and found.precision != stamp.precision:
        same = replace(stamp, precision=found.precision)
        stamp = same if found in (same, stamp_of_padded_clips(same)) else stamp
    if found == stamp or found != stamp_of_padded_clips(stamp):
        return stamp
    differing = _clips_heard_otherwise(stamp, manifest)
    if not differing:
        _log.info("%s: goes on as an earlier version began it, since all clips last %g s", store, _PADDED_SECONDS)
        return found
    if not overwrite:
        names = ", ".join(teacher.name for teacher in stamp.teachers if teacher.clip_lengths is not None)
        raise UsageError(
            f"{store}: was made by an earlier version, which padded or cut every clip to {_PADDED_SECONDS:g} s for "
            f"{names}; now clips are heard as long as they are, and {differing} of {len(manifest)} get other logits. "
            "Give another --store, or --overwrite to replace it."
        )
    return stamp


def stamp_of_padded_clips(stamp: StoreStamp) -> StoreStamp:
    """Return the stamp that earlier versions wrote for the same teachers."""
    teachers = (
        teacher
        if teacher.clip_lengths is None
        else replace(teacher, clip_lengths=None, front_end=f"{teacher.front_end}, {_PADDED_SECONDS:g} s")
        for teacher in stamp.teachers
    )
    return replace(stamp, teachers=tuple(teachers))


def _clips_heard_otherwise(stamp: StoreStamp, manifest: Manifest) -> int:
    """Count the clips of other or unknown length than the one that all were brought to."""
    if stamp.views is not None:  # a view is shifted, and so has another length than its clip
        return len(manifest)
    return int(np.count_nonzero(manifest.seconds != _PADDED_SECONDS))
