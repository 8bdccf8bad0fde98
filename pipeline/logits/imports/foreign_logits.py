"""What every layout of foreign logits offers: a name for each row, and the rows' numbers as logits."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipeline.errors import ForeignLogitsError, UsageError
from pipeline.storage import files as storage

Held = Literal["logits", "probabilities"]

MIN_PROBABILITY = 1e-6
"""Probabilities are held this far from 0 and 1, whose logits are infinite. Half precision has no number between
0.9995 and 1, so that a file's 1 rarely meant more than that."""

RowReader = Callable[[np.ndarray], np.ndarray]
"""Rows of the files, (some,) → their logits, (some, classes), float32. Threads may call it at the same time."""

OnRows = Callable[[int], None]
"""Is told how many more rows were laid out for reading."""


class ForeignLogits(ABC):
    """Files of one layout; opened far enough to know that they are what they should be."""

    layout: ClassVar[str]
    """What stamps call it."""
    averaged: ClassVar[bool] = False
    """Whether several rows of a clip are views of it, to be averaged, and not copies, of which the first counts."""

    files: tuple[str, ...]
    """All files that are read, in the order in which they are."""
    held: Held
    """What the numbers in the files are."""
    classes: int
    """Numbers that a row stands for."""
    top_k: int | None = None
    """How many of them the files hold, the largest; None is all."""
    conversion: str = ""
    """What is done to them besides what `held` asks for."""

    @abstractmethod
    def names(self) -> pa.StringArray:
        """Returns each row's name, null where it has none that can be used."""

    @abstractmethod
    def open_rows(self, rows: np.ndarray, on_rows: OnRows) -> AbstractContextManager[RowReader]:
        """Open the numbers for reading in any order, without holding them in memory.

        Args:
            rows: those that will be asked for, ascending.
            on_rows: is told about progress, where laying out takes a while.

        Raises:
            ForeignLogitsError: a file is damaged, or its numbers are not what `held` says.
        """


def to_logits(values: np.ndarray, held: Held, location: str) -> np.ndarray:
    """Returns the logits of numbers as a file holds them: (rows, classes) → the same, float32; NaN stays NaN.

    Raises:
        ForeignLogitsError: a probability is not within 0 and 1.
    """
    numbers = np.asarray(values, np.float32)
    if held == "logits":
        return numbers
    outside = (numbers < 0) | (numbers > 1)
    if outside.any():
        raise ForeignLogitsError(
            f"{location}: holds {numbers[outside][0]:g}, which is no probability. If these are logits, say so with "
            "--held logits"
        )
    kept = np.clip(numbers.astype(np.float64), MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return (np.log(kept) - np.log1p(-kept)).astype(np.float32)


def to_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the sigmoid in float64, without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


def local_file(location: str, flag: str) -> Path:
    """Returns a file that is mapped or sought in, and so has to be on this machine.

    Raises:
        UsageError: it is behind a URL, or is not there.
    """
    if storage.is_remote(location):
        raise UsageError(f"{flag} {location}: has to be on this machine; copy it here first")
    path = storage.local_path(location)
    if not path.is_file():
        raise UsageError(f"{flag} {location}: there is no such file")
    return path


@contextmanager
def damage_told(location: str, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a library raises for a damaged file into one line."""
    try:
        yield
    except errors as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ForeignLogitsError(f"{location}: is no readable {kind} ({first}); get it again") from error
