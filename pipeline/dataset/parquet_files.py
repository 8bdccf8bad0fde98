"""Parquet files, written whole, under any name that a file can have."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import files as storage


def publish_table(location: str | Path, table: pa.Table, **options: Any) -> None:
    """Write a table, compressed with zstd; readers see the old file or the new one, never a part.

    Args:
        location: a path or a URL.
        table: the rows.
        options: further ones of `pyarrow.parquet.write_table`.

    Raises:
        StorageError: as `storage.publish`.
    """
    # Through a stream: given a path, Arrow insists on UTF-8.
    with storage.publish(location) as staged, staged.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd", **options)
