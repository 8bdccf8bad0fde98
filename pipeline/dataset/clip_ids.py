"""The one rule that gives a clip its id from its file's name, whichever way it came."""

import os
import re
from collections.abc import Container, Iterator

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_TIMES = re.compile(r"_\d+(?:\.\d+)?$")
"""The start or the end of a clip behind its id: seconds with or without decimals, or milliseconds."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def has_control_characters(text: str) -> bool:
    """Returns whether `text` holds what breaks lines, lists and terminals; no id, name or label may."""
    return _CONTROL.search(text) is not None


def is_youtube_id(text: str) -> bool:
    """Returns whether `text` has the form of a YouTube id: 11 characters, each a letter, a digit, `-` or `_`."""
    return _YOUTUBE_ID.fullmatch(text) is not None


def clip_id_of_stem(stem: str, listed: Container[str] = ()) -> str:
    """Returns the id of the clip whose file is called `stem` (the name without its extension).

    AudioSet's copies spell `<id>` also as `Y<id>`, `<id>_<start>` and `<id>_<start>_<end>`. The list that the clips
    come from decides in doubt; without one, what has the form of a YouTube id is one, and any other stem is itself
    the id.

    Args:
        stem: a file's name without its extension.
        listed: the ids of the official list, where there is one.
    """
    readings = list(_readings(stem))
    for reading in readings:
        if reading in listed:
            return reading
    return next(filter(is_youtube_id, readings), stem)


def clip_id_of_path(path: str, listed: Container[str] = ()) -> str:
    """Returns the id of the clip at `path`, whichever kind of file, archive or table names it so.

    Where the name at its end is no clip of the list and no YouTube id, the whole path is the id: only the folders may
    tell `dog/1` from `cat/1`.

    Args:
        path: relative to whatever holds the clips, with `/`, without the extension.
        listed: the ids of the official list, where there is one.
    """
    clip_id = clip_id_of_stem(path.rpartition("/")[2], listed)
    return clip_id if clip_id in listed or is_youtube_id(clip_id) else path.removeprefix("./")


def without_extension(path: str) -> str:
    """Cut a file's name at its last dot; a dot that begins the name is none."""
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0]
    return f"{folder}{slash}{stem}" if stem else path


def _readings(stem: str) -> Iterator[str]:
    """Yields what `stem` may stand for, the most literal first."""
    without_end = _TIMES.sub("", stem)
    without_times = _TIMES.sub("", without_end)
    for text in dict.fromkeys((stem, without_end, without_times)):
        yield text
        if text.startswith("Y"):
            yield text[1:]


def is_safe_name(name: str, separator: str = os.sep) -> bool:
    """Returns whether `name` stays inside the folder that it is joined to: relative, no `..`, no control characters.

    Args:
        name: its parts are separated by `/`.
        separator: what else separates the parts of a path. Where that is a backslash, drives have a colon.
    """
    parts = name.replace(separator, "/").split("/")
    leads_away = not parts[0] or ".." in parts or (separator == "\\" and ":" in name)
    return not leads_away and not has_control_characters(name)
