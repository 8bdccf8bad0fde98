"""A clip, and the spelling of its id inside a tar shard."""

from dataclasses import dataclass
from urllib.parse import quote, unquote


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One labelled sound, still encoded."""

    clip_id: str
    audio: bytes
    format: str
    """The audio member's extension, without the dot: flac, mp3, ogg, opus, wav …"""
    labels: tuple[int, ...] = ()
    """Class indices into the dataset's vocabulary."""


def to_shard_key(clip_id: str) -> str:
    """Returns a clip id as a WebDataset key; `from_shard_key` gives it back.

    Letters, digits and most punctuation stay, so a YouTube id is its own key.

    Raises:
        ValueError: the id is empty.
    """
    if not clip_id:
        raise ValueError("a clip id can't be empty")
    # WebDataset ends a sample's key at the first dot of the file name, so a dot in an id can't stay one.
    # `%`, `/`, white space and control characters would break the key or the member's name.
    return "".join(
        quote(char, safe="") if char in "%/\\" or char.isspace() or not char.isprintable() else char for char in clip_id
    ).replace(".", "%2E")


def from_shard_key(key: str) -> str:
    """Returns the clip id that `to_shard_key` spelled as `key`.

    Foreign keys pass through unchanged where they hold no percent-encoded character.
    """
    return unquote(key)
