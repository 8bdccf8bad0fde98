"""The clips that did not make it into a dataset: counted by reason, listed in `rejected.parquet`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from pipeline import storage

REJECTED_NAME = "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("path", pa.string()),  # of the file or tar member; null where there is none
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


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


def write_rejections(dataset: str, rejections: Iterable[Rejection]) -> None:
    """Write `rejected.parquet`, whole; it is there also when nothing was rejected."""
    rows = [(item.clip_id, item.path, item.reason, item.detail) for item in rejections]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in REJECTED_SCHEMA]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, REJECTED_SCHEMA, strict=True)]
    with storage.publish(storage.join_path(dataset, REJECTED_NAME)) as staged:
        pq.write_table(pa.table(arrays, schema=REJECTED_SCHEMA), staged, compression="zstd")


def count_by_reason(rejections: Sequence[Rejection]) -> dict[str, int]:
    """Count the rejections of each reason, the most frequent first."""
    return dict(Counter(item.reason for item in rejections).most_common())


def rejection_table(counts: dict[str, int]) -> Table:
    """Lay out the counts by reason for the terminal."""
    table = Table("left out because", "count", caption=f"listed in {REJECTED_NAME}")
    table.columns[1].justify = "right"
    for reason, count in counts.items():
        table.add_row(reason, f"{count:,}")
    return table
