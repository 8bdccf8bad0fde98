"""A sound's bytes → what it turned out to be, and the bytes as they are to be: what ingest's decoding processes do.

It imports neither torch nor Arrow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.dataset.audio import SoundFacts, inspect_sound
from pipeline.decoding.shared_memory import Arena
from pipeline.errors import DecodeError

Encoding = Callable[[bytes, SoundFacts], bytes]
"""Encodes a sound anew, or gives the very bytes that it got; raises DecodeError."""


@dataclass(frozen=True, slots=True)
class CheckedSound:
    """A sound that can be decoded."""

    facts: SoundFacts
    """Of the bytes as they are to be."""
    encoded: bytes | None
    """The bytes as they are to be; None where they stay."""


@dataclass(slots=True)
class SoundChecker:
    """Decodes sounds to see that they can be, and encodes them anew where that is wanted."""

    encode: Encoding | None
    names: dict[int, str]
    """Number of a sound → what messages call it; stays where the messages are."""

    def load(self, request: tuple[int, bytes], arena: Arena, at: Callable[[int], None]) -> CheckedSound | DecodeError:
        """Check one sound, of which a number and the bytes are given."""
        number, audio = request
        at(number)
        try:
            facts = inspect_sound(audio)
            if self.encode is not None and (encoded := self.encode(audio, facts)) is not audio:
                return CheckedSound(inspect_sound(encoded), encoded)
        except DecodeError as error:
            return error
        return CheckedSound(facts, None)

    def result_bytes(self, request: tuple[int, bytes]) -> int:
        """Returns how much memory the arrays of a result take: there are none."""
        return 1

    def name_of(self, row: int) -> str:
        """Returns what messages call the sound of a number."""
        return self.names[row]

    def __reduce__(self) -> tuple[type["SoundChecker"], tuple[Any, ...]]:
        return SoundChecker, (self.encode, {})
