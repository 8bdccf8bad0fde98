"""What is wrong with a dataset, a store or a run, in one form that can be counted, shown and written down."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.dataset.parquet_files import publish_table
from pipeline.dataset.row_tables import table_of_rows
from pipeline.storage import files as storage

DAMAGED_FOLDER = ".damaged"
"""In a dataset, store or run: what a repair moved out of the way. Nothing is ever deleted."""

FAULT_SCHEMA = pa.schema(
    [
        pa.field("check", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # relative to what was verified
        pa.field("clip_id", pa.string()),  # null where a whole file is meant
        pa.field("detail", pa.string(), nullable=False),
        pa.field("repair", pa.string(), nullable=False),  # what was done about it; empty where nothing was
    ]
)

Advance = Callable[[int], None]
"""Told how many more clips, parts or files were looked at."""


@dataclass(slots=True)
class Fault:
    """One thing that is not as it should be."""

    check: str
    """A short fixed phrase."""
    file: str
    """Relative to what was verified."""
    clip_id: str | None = None
    detail: str = ""
    repair: str = ""
    """What was done about it."""


@dataclass(slots=True)
class Findings:
    """What a verification found."""

    looked_at: Counter[str] = field(default_factory=Counter)
    """What → how many."""
    faults: list[Fault] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    """What is worth a word but is no fault → how often."""

    @property
    def left(self) -> list[Fault]:
        """Returns the faults that nothing was done about."""
        return [fault for fault in self.faults if not fault.repair]


def write_faults(location: str, faults: Iterable[Fault]) -> None:
    """Write faults as Parquet, whole, in `FAULT_SCHEMA`."""
    publish_table(location, table_of_rows(faults, FAULT_SCHEMA))


def move_aside(folder: str, name: str) -> str:
    """Move a file of a folder into its `.damaged`, under a number where that name is taken; gives the new name."""
    number, target = 0, f"{DAMAGED_FOLDER}/{name}"
    while storage.exists(storage.join_path(folder, target)):
        number += 1
        target = f"{DAMAGED_FOLDER}/{number}/{name}"
    storage.move(storage.join_path(folder, name), storage.join_path(folder, target))
    return target
