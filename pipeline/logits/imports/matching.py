"""Which rows of foreign files speak of which clip of a dataset, and which of their classes is which."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.clip_ids import clip_id_of_path, without_extension
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipRows:
    """The rows of each clip."""

    clip_of_row: np.ndarray
    """(rows,), int64: the clip's place in the dataset, -1 where the dataset has no such clip."""
    order: np.ndarray
    """(matched rows,), int64: the rows that count, clip after clip, a clip's ascending."""
    bounds: np.ndarray
    """(clips + 1,), int64: clip c has the rows `order[bounds[c]:bounds[c + 1]]`."""
    repeated: int
    """Rows passed over because an earlier one is of the same clip."""

    def with_rows(self, clips: np.ndarray) -> np.ndarray:
        """Returns those of some clips that have a row."""
        return clips[self.bounds[clips + 1] > self.bounds[clips]]


def match_rows(names: pa.StringArray, clip_ids: pa.StringArray, *, averaged: bool) -> ClipRows:
    """Find each clip's rows by name.

    Args:
        names: a row's clip id, or what its sound is called, `Y<id>.mp3` and the like; null where it has none.
        clip_ids: of the dataset, each once.
        averaged: keep all rows of a clip, and not only the first.
    """
    clip_of_row = _clips_of_names(names, clip_ids)
    matched = np.flatnonzero(clip_of_row >= 0)
    order = matched[np.argsort(clip_of_row[matched], kind="stable")]
    bounds = np.searchsorted(clip_of_row[order], np.arange(len(clip_ids) + 1))
    if averaged:
        return ClipRows(clip_of_row=clip_of_row, order=order, bounds=bounds, repeated=0)
    has_row = np.diff(bounds) > 0
    first = order[bounds[:-1][has_row]]
    return ClipRows(
        clip_of_row=clip_of_row,
        order=first,
        bounds=np.concatenate([[0], np.cumsum(has_row)]),
        repeated=len(order) - len(first),
    )


def _clips_of_names(names: pa.StringArray, clip_ids: pa.StringArray) -> np.ndarray:
    """(rows,), int64. What is a clip's id to the letter is that clip; the one rule for names reads the others."""
    clip_of_row = _places(names, clip_ids)
    others = np.flatnonzero((clip_of_row < 0) & names.is_valid().to_numpy(zero_copy_only=False))
    if len(others):
        listed = frozenset(clip_ids.to_pylist())
        spelled = [_id_of(name, listed) for name in names.take(pa.array(others)).view(pa.binary()).to_pylist()]
        clip_of_row[others] = _places(pa.array(spelled, pa.string()), clip_ids)
    return clip_of_row


def _id_of(name: bytes, listed: frozenset[str]) -> str | None:
    try:
        return clip_id_of_path(without_extension(name.decode()), listed)
    except UnicodeDecodeError:  # Parquet's writers don't check; no clip's id is no text
        return None


def _places(names: pa.Array, clip_ids: pa.StringArray) -> np.ndarray:
    found = pc.call_function("index_in", [names], pc.SetLookupOptions(clip_ids))
    return found.fill_null(-1).to_numpy().astype(np.int64)


def renumber(own: Vocabulary, wanted: Vocabulary, location: str) -> np.ndarray:
    """Find the dataset's classes among those of the files, by mid or else by display name.

    Returns:
        (wanted classes,), int64: the number that each has in the files.

    Raises:
        UsageError: a class is missing, or two are the same one.
    """
    found = [own.index_by_mid.get(label.mid, own.index_by_name.get(label.name, -1)) for label in wanted.classes]
    if missing := [label for label, number in zip(wanted.classes, found, strict=True) if number < 0]:
        raise UsageError(
            f"--classes {location}: lacks {len(missing)} of the dataset's {len(wanted)} classes, such as "
            f"{missing[0].mid}, {missing[0].name}; logits that were never given can't be made up"
        )
    numbers = np.array(found, np.int64)
    if len(np.unique(numbers)) < len(numbers):
        number = int(np.flatnonzero(np.bincount(numbers) > 1)[0])
        raise UsageError(
            f"--classes {location}: {own.classes[number].name} is two of the dataset's classes; name them apart"
        )
    return numbers
