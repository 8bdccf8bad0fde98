"""What the json beside a clip's audio says: its id and its labels, in the spellings that are in use."""

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

from pipeline.dataset.clip_ids import clip_id_of_path, has_control_characters, is_youtube_id
from pipeline.dataset.clips import from_shard_key
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.ingest.labels import LabelField
from pipeline.ingest.rejections import UnusableClipError

ID_FIELDS = ("clip_id", "id", "ytid", "video_id")
LABEL_FIELDS = ("labels", "mids", "label", "human_labels", "label_id", "label_ids")
"""Each holds one class or a list of them, or a vector with a number for each class; see `LabelField`."""
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
    return usable_clip_id(stated_id(description) or clip_id_of_path(from_shard_key(key), listed))


def stated_id(description: Description) -> str:
    """Returns the id that a json states; empty where it states none."""
    for field in ID_FIELDS:
        value = description.get(field)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value):
            return str(value)
    return ""


def is_certain(clip_id: str, description: Description | None) -> bool:
    """Whether an id means one clip in all files: the clip's json states it, or YouTube gave it."""
    return is_youtube_id(clip_id) or bool(stated_id(description or {}))


def usable_clip_id(text: str) -> str:
    """Returns the id.

    Raises:
        UnusableClipError: it is nothing that can be one.
    """
    if not text or len(text) > _MAX_ID_CHARACTERS or has_control_characters(text):
        raise UnusableClipError("unusable clip id", ascii(text)[:100])
    return text


def label_fields(
    vocabulary: Vocabulary, *, numbered: bool, names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, LabelField]:
    """Returns each field of labels with how it is read; see `LabelField`.

    Args:
        vocabulary: the classes.
        numbered: whether somebody said that numbers are places in `vocabulary`.
        names: field → what its numbers stand for, where the file itself says so.
    """
    named = names or {}
    return {field: LabelField(vocabulary, names=named.get(field), numbered=numbered) for field in LABEL_FIELDS}


def look_at_labels(description: Description, fields: Mapping[str, LabelField]) -> None:
    """Take one clip's labels into account, before the first clip's are read."""
    for name in description.keys() & fields.keys():
        fields[name].look_at(description[name])


def has_labels(description: Description) -> bool:
    """Whether a clip's json has a field of labels, be it empty."""
    return any(value is not None and value == value for value in map(description.get, LABEL_FIELDS))


def labels_of(description: Description, fields: Mapping[str, LabelField]) -> tuple[int, ...]:
    """Returns a clip's class indices, ascending.

    Args:
        description: the clip's json.
        fields: how its fields of labels are read.

    Raises:
        UnusableClipError: the json has no labels, unknown ones, or two fields of labels that contradict each other.
    """
    found: dict[str, tuple[int, ...]] = {}
    faults: list[UnusableClipError] = []
    for name, field in fields.items():
        value = description.get(name)
        if value is not None and value == value:  # a number that is missing is NaN in some tables
            try:
                found[name] = field.read(value)
            except UnusableClipError as error:
                faults.append(error)
    if len(set(found.values())) > 1:
        raise UnusableClipError("label fields disagree", ", ".join(found))
    if faults and not any(found.values()):  # an empty field beside one of unknown labels names nothing
        raise faults[0]
    if not found:
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
    if "clip_id" not in description or not isinstance(known, list):
        return None
    return LabelField(vocabulary, numbered=True).read(known)


def _number(value: Any, kind: type) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return None
    return value if 0 <= value < 2**31 else None
