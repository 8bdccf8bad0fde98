"""How a part lies in Parquet columns: whole logits, the K largest, each teacher's own, several views of a clip.

    clip_id                                    always
    view, view_seed, shift_ms, gain_db,
    low_rise_hz, high_rise_hz                  where a clip has several views: a row each, view 0 first
    logits                                     fixed_size_list<halffloat>[classes]; or, where only the largest are kept,
    top_classes, top_logits, rest_logit        fixed_size_list<int16>[K], <halffloat>[K], largest first; halffloat
    teacher_1_logits, teacher_2_logits …       where the members are kept, in the stamp's order

Everybody else reads whole logits: `dense_logits` gives them back from either form.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.dataset.views import draw_view
from pipeline.errors import LogitStoreError
from pipeline.logits.stamp import StoreStamp

VIEW_COLUMNS = {
    "view": pa.int16(),
    "view_seed": pa.int64(),
    "shift_ms": pa.int16(),
    "gain_db": pa.float64(),
    "low_rise_hz": pa.int16(),
    "high_rise_hz": pa.int16(),
}
"""In the order of the file; `pipeline.dataset.views.View` says what they mean."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopLogits:
    """The largest logits of each row, and one number that stands for all the others."""

    classes: np.ndarray
    """(rows, K), int16, by falling logit."""
    logits: np.ndarray
    """(rows, K), float16."""
    rest: np.ndarray
    """(rows,), float16: what the other classes are taken to be."""


def member_column(number: int) -> str:
    """Returns the name of the column of the teacher with that number, from 1."""
    return f"teacher_{number}_logits"


def columns_of(stamp: StoreStamp) -> list[pa.Field]:
    """Returns the columns of a part that bears this stamp."""
    fields = [pa.field("clip_id", pa.string(), nullable=False)]
    if stamp.views is not None:
        fields += [pa.field(name, kind, nullable=False) for name, kind in VIEW_COLUMNS.items()]
    if stamp.top_k is None:
        fields.append(_list_field("logits", pa.float16(), stamp.classes))
    else:
        fields.append(_list_field("top_classes", pa.int16(), stamp.top_k))
        fields.append(_list_field("top_logits", pa.float16(), stamp.top_k))
        fields.append(pa.field("rest_logit", pa.float16(), nullable=False))
    if stamp.members is not None:
        numbers = range(1, len(stamp.teachers) + 1)
        fields += [_list_field(member_column(number), pa.float16(), stamp.classes) for number in numbers]
    return fields


def _list_field(name: str, kind: pa.DataType, size: int) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False), size), nullable=False)


def table_of(
    schema: pa.Schema,
    stamp: StoreStamp,
    clip_ids: Sequence[str],
    logits: np.ndarray | TopLogits,
    member_logits: np.ndarray | None,
) -> pa.Table:
    """Lay a part's numbers out in the columns of its stamp.

    Args:
        schema: with `columns_of(stamp)`.
        stamp: the part's.
        clip_ids: each clip once.
        logits: (rows, classes) float16, the clips' views one after the other; or the largest of them.
        member_logits: (teachers, rows, classes) float16, where the stamp keeps them.
    """
    views = stamp.view_count
    columns: dict[str, pa.Array] = {"clip_id": pa.array(np.repeat(np.array(clip_ids, object), views), pa.string())}
    if stamp.views is not None:
        rows = view_rows(stamp, clip_ids)
        columns |= {name: pa.array(values, VIEW_COLUMNS[name]) for name, values in zip(VIEW_COLUMNS, rows, strict=True)}
    if stamp.top_k is not None and not isinstance(logits, TopLogits):
        logits = largest(logits, stamp.top_k)
    if isinstance(logits, TopLogits):
        columns["top_classes"] = _list_array(logits.classes, schema.field("top_classes").type)
        columns["top_logits"] = _list_array(logits.logits, schema.field("top_logits").type)
        columns["rest_logit"] = pa.array(logits.rest)
    else:
        columns["logits"] = _list_array(logits, schema.field("logits").type)
    for number, one in enumerate(() if member_logits is None else member_logits, start=1):
        columns[member_column(number)] = _list_array(one, schema.field(member_column(number)).type)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def view_rows(stamp: StoreStamp, clip_ids: Sequence[str]) -> Iterator[list]:
    """Yields the values of `VIEW_COLUMNS`, column by column, for some clips of a store with views."""
    assert stamp.views is not None
    config, numbers = stamp.views.config, range(stamp.views.count)
    drawn = [(number, draw_view(config, clip_id, number)) for clip_id in clip_ids for number in numbers]
    yield [number for number, _ in drawn]
    yield [view.seed for _, view in drawn]
    for name in ("shift_ms", "gain_db", "low_rise_hz", "high_rise_hz"):
        yield [getattr(view, name) for _, view in drawn]


def _list_array(values: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), type=kind)


def value_columns(stamp: StoreStamp) -> list[str]:
    """Returns the names of the columns that `dense_logits` needs."""
    return ["logits"] if stamp.top_k is None else ["top_classes", "top_logits", "rest_logit"]


def dense_logits(columns: Mapping[str, pa.ChunkedArray] | pa.Table, stamp: StoreStamp) -> np.ndarray:
    """Returns the logits of all classes: (rows, classes), float16.

    Where only the K largest are stored, each other class has the row's `rest_logit`.

    Raises:
        LogitStoreError: a class number is out of range.
    """
    if stamp.top_k is None:
        return matrix(columns["logits"], stamp.classes)
    classes = matrix(columns["top_classes"], stamp.top_k).astype(np.int64)
    if classes.size and not (classes.min() >= 0 and classes.max() < stamp.classes):
        raise LogitStoreError(f"top_classes holds {classes.min()} to {classes.max()}, but classes are {stamp.classes}")
    rest = columns["rest_logit"].to_numpy()  # (rows,)
    dense = np.repeat(rest[:, None], stamp.classes, axis=1)  # (rows, classes)
    np.put_along_axis(dense, classes, matrix(columns["top_logits"], stamp.top_k), axis=1)
    return dense


def matrix(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """Returns a column of lists of `size` numbers as (rows, size)."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, size)


def largest(logits: np.ndarray, count: int) -> TopLogits:
    """Keep the largest logits of each row, and say in one number what the rest is.

    That number is the logit of the mean probability of the classes left out. So no class is said to be likelier than
    the smallest one kept, and the probability that all classes have together stays what it was. A loss that is linear
    in its target, as binary cross entropy is, then asks the same of a student that treats those classes alike as the
    whole logits would.

    Args:
        logits: (rows, classes), float16.
        count: K, 1 to classes - 1. Of equal logits the lower class number goes first.
    """
    order = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")  # (rows, classes)
    left_out = np.take_along_axis(logits, order[:, count:], axis=1).astype(np.float64)  # (rows, classes - K)
    classes = order[:, :count].astype(np.int16)
    kept = np.take_along_axis(logits, order[:, :count], axis=1)
    return TopLogits(classes=classes, logits=kept, rest=_logit_of_mean_probability(left_out).astype(np.float16))


def _logit_of_mean_probability(logits: np.ndarray) -> np.ndarray:
    """(rows, some) → (rows,), float64; in logarithms, for a probability of exp(-700) or less would be 0."""
    log_probs = -np.logaddexp(0, -logits)
    log_mean = np.logaddexp.reduce(log_probs, axis=1) - np.log(logits.shape[1])  # (rows,)
    with np.errstate(divide="ignore"):  # where all are certain, the next line gives infinity, and the last one mends it
        odds = log_mean - np.log(-np.expm1(np.minimum(log_mean, 0)))
    return np.clip(odds, logits.min(axis=1), logits.max(axis=1))


def mean_of_members(members: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Average teachers' stored logits: (teachers, rows, classes) float16 → (rows, classes) float16.

    A store that keeps its members gets its `logits` from here, when it is made and when it is weighed anew, so equal
    weights give equal bytes on every machine.
    """
    normalized = np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))  # (teachers,)
    total = np.zeros(members.shape[1:], np.float64)
    for weight, one in zip(normalized, members, strict=True):
        total += weight * one  # one after the other: a sum in another order rounds otherwise
    return total.astype(np.float16)
