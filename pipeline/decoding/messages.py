"""What a process and those that work for it say to each other, through a pair of pipes."""

import pickle
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.decoding.shared_memory import Packed

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message to a worker."""

    number: int
    """Which worker it is, from 0."""
    signs: str
    """Path of the shared (workers, 2) int64: signs of life so far, and the clip it is at."""
    dumps: str
    """Path of the shared file that takes its stack, should somebody ask for that."""


@dataclass(frozen=True, slots=True)
class Learn:
    """A reader, for later requests."""

    reader: int
    packed: Packed
    memory: str
    """Path of the shared file with its arrays."""


@dataclass(frozen=True, slots=True)
class Do:
    """A request."""

    ticket: int
    reader: int
    request: Any
    memory: str
    """Path of the shared file that takes the result's arrays."""
    offset: int
    size: int
    """Bytes of that file, from the offset on, that are this request's."""


@dataclass(frozen=True, slots=True)
class Forget:
    """A shared file that is needed no more."""

    memory: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a request."""

    ticket: int
    result: Packed


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer to a request that raised something, and where."""

    ticket: int
    error: Exception
    trace: str


class Channel:
    """Sends and receives objects through a pair of pipes between two processes of one command."""

    def __init__(self, reading: BinaryIO, writing: BinaryIO) -> None:
        self._reading, self._writing = reading, writing

    def send(self, message: object) -> None:
        """Send an object; waits while the other side's pipe is full."""
        payload = pickle.dumps(message, protocol=5)
        self._writing.write(_LENGTH.pack(len(payload)) + payload)
        self._writing.flush()

    def receive(self) -> Any:
        """Wait for an object.

        Raises:
            EOFError: the other side has ended.
        """
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        content = self._reading.read(size)
        if len(content) < size:
            raise EOFError
        return content

    def close(self) -> None:
        """Let the other side see the end."""
        with suppress(OSError):
            self._writing.close()
