"""What the json beside a clip's audio says: its id and its labels, in the spellings that are in use."""

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any

from pipeline.dataset.clip_ids import clip_id_of_path, has_control_characters
from pipeline.dataset.clips import from_shard_key
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.ingest.rejections import UnusableClipError

ID_FIELDS = ("clip_id", "id", "ytid", "video_id")
LABEL_FIELDS = ("labels", "mids", "label", "human_labels", "label_id", "label_ids")
"""Each holds one class or a list of them; a class is its mid, its display name, or its index."""
MASK_FIELDS = ("label_mask", "judged")
"""Each holds the classes whose label is known; earlier versions wrote the second."""

MAX_BYTES = 1 << 20
_MAX_ID_CHARACTERS = 1024

Description = Mapping[str, Any]


def parse_description(content: bytes) -> Description:
    """Read the json of one clip.

    Raises:
        UnusableClipError: it is no json object.
    """
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableClipError("unreadable json", str(error)) from error
    if not isinstance(description, dict):
        raise UnusableClipError("unreadable json", f"holds a {type(description).__name__}, not an object")
    return description


def clip_id_of(description: Description, key: str, listed: Container[str] = ()) -> str:
    """Returns a clip's id: what its json says, else what its name in the tar says.

    Args:
        description: the clip's json.
        key: its members' common name in the tar, with folders, without the extension.
        listed: the ids of the official list, where there is one.

    Raises:
        UnusableClipError: the json's id is nothing that can be one.
    """
    for field in ID_FIELDS:
        value = description.get(field)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value):
            break
    else:
        value = clip_id_of_path(from_shard_key(key), listed)
    return usable_clip_id(str(value))


def usable_clip_id(text: str) -> str:
    """Returns the id.

    Raises:
        UnusableClipError: it is nothing that can be one.
    """
    if not text or len(text) > _MAX_ID_CHARACTERS or has_control_characters(text):
        raise UnusableClipError("unusable clip id", ascii(text)[:100])
    return text


def labels_of(description: Description, vocabulary: Vocabulary, *, may_lack: bool = False) -> tuple[int, ...]:
    """Returns a clip's class indices, ascending.

    Args:
        description: the clip's json.
        vocabulary: the classes.
        may_lack: whether a json without any field of labels means a clip without labels.

    Raises:
        UnusableClipError: the json has no labels, unknown ones, or two fields of labels that contradict each other.
    """
    found: dict[str, tuple[int, ...]] = {}
    faults: list[UnusableClipError] = []
    for field in LABEL_FIELDS:
        if description.get(field) is not None:
            try:
                value = description[field]
                found[field] = indices_of(value if isinstance(value, list) else [value], vocabulary)
            except UnusableClipError as error:
                faults.append(error)
    if len(set(found.values())) > 1:
        raise UnusableClipError("label fields disagree", ", ".join(found))
    if faults and not any(found.values()):  # an empty field beside one of unknown labels names nothing
        raise faults[0]
    if not found:
        if may_lack:
            return ()
        raise UnusableClipError("no labels", f"none of {', '.join(LABEL_FIELDS)}")
    return next(iter(found.values()))


def facts_of(description: Description) -> dict[str, int | float]:
    """Returns what a json of `pipeline ingest` says of the sound itself; anyone else's may mean other things."""
    if "clip_id" not in description:
        return {}
    wanted = {"sample_rate": int, "frames": int, "start_seconds": float, "end_seconds": float}
    values = {field: _number(description.get(field), kind) for field, kind in wanted.items()}
    return {field: value for field, value in values.items() if value is not None}


def label_mask_of(description: Description, vocabulary: Vocabulary) -> tuple[int, ...] | None:
    """Returns the classes whose label is known by a json of `pipeline ingest`, ascending; None where all are.

    Raises:
        UnusableClipError: one is none of the classes.
    """
    known = next((description[field] for field in MASK_FIELDS if field in description), None)
    return indices_of(known, vocabulary) if "clip_id" in description and isinstance(known, list) else None


def _number(value: Any, kind: type) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return None
    return value if 0 <= value < 2**31 else None


def indices_of(labels: Iterable[object], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Returns the class indices, ascending, of labels that are mids, display names or indices.

    Raises:
        UnusableClipError: one is none of the classes.
    """
    return tuple(sorted({_index_of(label, vocabulary) for label in labels}))


def _index_of(label: object, vocabulary: Vocabulary) -> int:
    index = None
    if isinstance(label, str):
        index = vocabulary.index_by_mid.get(label, vocabulary.index_by_name.get(label))
    elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(vocabulary):
        index = label
    if index is None:
        raise UnusableClipError("unknown label", ascii(label)[:100])
    return index
