"""Rows that a generator gives one by one → Arrow columns; a row's Python object lives no longer than its batch."""

from collections.abc import Iterable
from itertools import islice

import pyarrow as pa

_ROWS_AT_ONCE = 1 << 12


def table_of_rows(rows: Iterable[object], schema: pa.Schema) -> pa.Table:
    """Build a table from objects that have the schema's columns as attributes."""
    left, batches = iter(rows), []
    while batch := list(islice(left, _ROWS_AT_ONCE)):
        columns = [[getattr(row, name) for row in batch] for name in schema.names]
        arrays = [_array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _array(values: list[object], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    return pa.array(values, kind)
