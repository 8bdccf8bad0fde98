"""The clips that did not make it into a dataset: counted by reason, listed in `rejected.parquet`."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
from rich.table import Table

from pipeline.dataset.parquet_files import publish_table
from pipeline.dataset.row_tables import table_of_rows
from pipeline.storage import files as storage

REJECTED_NAME = "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("path", pa.string()),  # of the file or tar member; null where there is none
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


NOT_UTF8 = "name not in UTF-8"
"""The reason that stands for a file, a folder or a member whose name can't be written down."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """One clip that was left out."""

    clip_id: str | None
    path: str | None
    """Relative to the folder that the clips came from; `shard.tar/member` within a tar."""
    reason: str
    """A short fixed phrase."""
    detail: str = ""


class UnusableClipError(Exception):
    """A clip or one of its members is to be left out, for a reason that can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def escaped(name: str) -> str:
    """Returns a name as it can be written down; what is not UTF-8 in it came as lone surrogates."""
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return name.encode("utf-8", "backslashreplace").decode()


def write_rejections(dataset: str, rejected: pa.Table) -> None:
    """Write `rejected.parquet`, whole; it is there also when nothing was rejected."""
    publish_table(storage.join_path(dataset, REJECTED_NAME), rejected.cast(REJECTED_SCHEMA))


def tabulate(rejections: Iterable[Rejection]) -> pa.Table:
    """Put rejections into columns of `REJECTED_SCHEMA`."""
    return table_of_rows(rejections, REJECTED_SCHEMA)


def count_by_reason(rejected: pa.Table) -> dict[str, int]:
    """Count the rejections of each reason, the most frequent first."""
    counts = rejected["reason"].value_counts()
    by_reason = dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
    return dict(sorted(by_reason.items(), key=lambda item: -item[1]))


def told_in_one_line(rejected: pa.Table) -> str:
    """Returns why nothing could be used: the counts by reason, and what is to be said of the first."""
    counts = ", ".join(f"{count} {reason}" for reason, count in count_by_reason(rejected).items())
    told = zip(rejected["path"].to_pylist(), rejected["detail"].to_pylist(), strict=True)
    first = next((f". The first: {path or ''}: {detail}" for path, detail in told if detail), "")
    return f"({counts or 'none at all'}){first}"


def rejection_table(counts: dict[str, int]) -> Table:
    """Lay out the counts by reason for the terminal."""
    table = Table("left out because", "count", caption=f"listed in {REJECTED_NAME}")
    table.columns[1].justify = "right"
    for reason, count in counts.items():
        table.add_row(reason, f"{count:,}")
    return table
