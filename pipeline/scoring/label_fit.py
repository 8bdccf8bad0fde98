"""Whether logits that came from elsewhere belong to the clips that they are said to belong to.

The test is one of permutation. If rows were shuffled, a clip's logits would say no more about its own labels than about
any other clip's; so the mAP on the clips' own labels would be one draw out of the mAPs with the labels dealt out anew.
It has to stand above these by `_DEVIATIONS` of their standard deviations, in every stretch of the rows: a file whose
second half is shifted fits well as a whole. And no neighbouring row's labels may fit better, which is how rows that are
one off look where clips are sorted by class.
"""

import logging
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ForeignLogitsError
from pipeline.logits.imports.clip_logits import ClipLogits
from student import tagging_scores

_log = logging.getLogger(__name__)

_MAX_CLIPS = 8_000
"""Clips in a sample, over all stretches."""

_STRETCHES = 8
_MIN_STRETCH = 500
_DEALS = 16
"""How often labels are dealt out anew."""
_DEVIATIONS = 5.0
_OFFSETS = (-2, -1, 1, 2)
_MIN_NEIGHBOURS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFit:
    """How well the logits of one stretch of rows fit."""

    clips: int
    first_row: int
    last_row: int
    mean_average_precision: float
    """On the clips' own labels, 0 to 1."""
    dealt_mean: float
    """The mean mAP with the same labels dealt out at random: chance."""
    dealt_deviation: float
    offset: int | None
    """How many rows further the clips are whose labels fit better than their own; None where none do."""

    @property
    def fits(self) -> bool:
        """Whether the logits are their clips'."""
        above_chance = self.mean_average_precision - self.dealt_mean > _DEVIATIONS * self.dealt_deviation
        return above_chance and self.offset is None

    def __str__(self) -> str:
        """Returns one line for people."""
        moved = ""
        if self.offset is not None:
            moved = f"; the labels of the clip {abs(self.offset)} rows {'on' if self.offset > 0 else 'back'} fit better"
        return (
            f"mAP {self.mean_average_precision:.4f} on {self.clips:,} clips of the rows {self.first_row:,} to "
            f"{self.last_row:,}, and {self.dealt_mean:.4f} ± {self.dealt_deviation:.4f} with their labels dealt out at "
            f"random{moved}"
        )


def stretches(rows: np.ndarray) -> list[np.ndarray]:
    """Cut a sample of rows, ascending, where it is large enough to be measured piece by piece."""
    return np.array_split(rows, min(_STRETCHES, max(1, len(rows) // _MIN_STRETCH)))


def measure_fit(
    logits: np.ndarray, rows: np.ndarray, labels: np.ndarray, neighbours: dict[int, tuple[np.ndarray, np.ndarray]]
) -> LabelFit:
    """Returns how well the logits of one stretch fit.

    Args:
        logits: (clips, classes), finite.
        rows: (clips,), where they lie in the files.
        labels: (clips, classes), 0 or 1, of the clips that the rows are said to be.
        neighbours: from `offsets`: for each offset the clips, (some,), whose neighbour that far away is known, and the
            neighbours' labels, (some, classes).
    """
    own = _mean_average_precision(logits, labels)
    random = np.random.default_rng(0)
    dealt = [_mean_average_precision(logits, labels[random.permutation(len(labels))]) for _ in range(_DEALS)]
    deviation = float(np.std(dealt, ddof=1))
    better: dict[int, float] = {}
    for offset, (clips, their_labels) in neighbours.items():
        if len(clips) >= min(_MIN_NEIGHBOURS, len(rows) // 2):
            gain = _mean_average_precision(logits[clips], their_labels) - _mean_average_precision(
                logits[clips], labels[clips]
            )
            if gain > _DEVIATIONS * deviation:
                better[offset] = gain
    return LabelFit(
        clips=len(rows),
        first_row=int(rows[0]),
        last_row=int(rows[-1]),
        mean_average_precision=own,
        dealt_mean=float(np.mean(dealt)),
        dealt_deviation=deviation,
        offset=max(better, key=better.__getitem__, default=None),
    )


def offsets(rows: np.ndarray, clip_of_row: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Find the sampled rows with a known neighbour: offset → their places in `rows`, and the neighbours' clips.

    Args:
        rows: (sample,), of the files.
        clip_of_row: (rows,), -1 where a row's clip is not known.
    """
    found = {}
    for offset in _OFFSETS:
        inside = np.flatnonzero((rows + offset >= 0) & (rows + offset < len(clip_of_row)))
        clips = clip_of_row[rows[inside] + offset]
        found[offset] = inside[clips >= 0], clips[clips >= 0]
    return found


def _mean_average_precision(logits: np.ndarray, labels: np.ndarray) -> float:
    return tagging_scores(logits, labels).mean_average_precision


def check_fit(clips: ClipLogits, *, allow_misfit: bool) -> None:
    """Refuse logits that are not of their clips, or are no logits.

    Args:
        clips: the logits, and the clips that they are said to be of.
        allow_misfit: log a misfit instead.

    Raises:
        ForeignLogitsError: they are not.
    """
    bounds, _ = clips.manifest.labels_csr
    labelled = clips.wanted[bounds[clips.wanted + 1] > bounds[clips.wanted]]
    sample = np.random.default_rng(0).permutation(labelled)[:_MAX_CLIPS]
    sample = sample[np.argsort(clips.first_rows(sample))]
    faults = [] if len(sample) else [f"none of their {len(clips.wanted)} clips has a label to check them by"]
    for piece in stretches(sample) if len(sample) else ():
        fit = _fit(clips, piece)
        if fit is None:
            faults.append(f"none of {len(piece)} clips has finite numbers")
            continue
        _log.info("%s", fit)
        if not fit.fits:
            faults.append(str(fit))
    if not faults:
        return
    files, location = ", ".join(clips.source.files[:2]), clips.manifest.location
    complaint = f"{files}: the logits do not fit the labels of {location}: {faults[0]}"
    if allow_misfit:
        _log.warning("%s; imported all the same", complaint)
        return
    raise ForeignLogitsError(
        f"{complaint}. Their rows are not of the clips that they are named for, or the classes are in another order: "
        "get all files anew, of one release, or name the classes by --classes. --allow-misfit imports them all the same"
    )


def _fit(clips: ClipLogits, piece: np.ndarray) -> LabelFit | None:
    logits = clips.logits(piece).astype(np.float32)
    finite = np.isfinite(logits).all(axis=1)
    logits, piece = logits[finite], piece[finite]
    if not len(piece):
        return None
    if clips.source.held == "logits" and logits.min() >= 0 and logits.max() <= 1:
        raise ForeignLogitsError(
            f"{clips.source.files[0]}: all numbers of {len(piece)} clips are within 0 and 1, so they are no logits. "
            "Say --held probabilities"
        )
    rows = clips.first_rows(piece)
    label = clips.manifest.label_matrix
    near = {offset: (who, label(their)) for offset, (who, their) in offsets(rows, clips.found.clip_of_row).items()}
    return measure_fit(logits, rows, label(piece), near)
