"""What is to be packed: every clip of every source, in Arrow columns, before the first of them is read.

Which clips go into which shard is decided here, so a shard can be made alone, on any machine, skipped when a stopped
run has made it already, and has the same bytes for any number of workers.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.row_tables import table_of_rows
from pipeline.dataset.string_columns import first_rows, repeated_rows, string_bytes
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.ingest.descriptions import usable_clip_id
from pipeline.ingest.rejections import NOT_UTF8, REJECTED_SCHEMA, Rejection, UnusableClipError, escaped, tabulate
from pipeline.ingest.shared_names import told_apart, told_apart_from
from pipeline.ingest.sources import PlannedClip, Source

_ITEMS_AT_ONCE = 1 << 10
_HELD = "what the dataset held already"
_FEW = pa.dictionary(pa.int32(), pa.string())
PLAN_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("file", _FEW),
        pa.field("version", _FEW),
        pa.field("member", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("labels", pa.list_(pa.int16())),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field("format", _FEW),
        pa.field("sample_rate", pa.int32()),
        pa.field("frames", pa.int64()),
        pa.field("crc32", pa.uint32()),
        pa.field("label_mask", pa.list_(pa.int16())),
    ]
)
"""The columns are the fields of `PlannedClip`."""

_FOUND_SCHEMA = PLAN_SCHEMA.append(pa.field("unique_id", pa.string()))
_PLAIN_SCHEMA = pa.schema(
    [pa.field(item.name, pa.string() if item.type == _FEW else item.type) for item in PLAN_SCHEMA]
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a source holds."""

    clips: pa.Table
    """In `PLAN_SCHEMA`; no id occurs twice."""
    rejected: pa.Table
    """In `REJECTED_SCHEMA`: what is left out already."""
    notes: Counter[str]
    """What else was seen and counted."""


def make_plan(
    source: Source,
    vocabulary: Vocabulary,
    taken_ids: pa.StringArray,
    on_items: Callable[[int], None] = lambda items: None,
    are_held: Callable[[list[PlannedClip]], list[bool]] | None = None,
) -> Plan:
    """Go through a source once, without reading sounds.

    Of several clips with one id the first is taken; those that a dataset has already come before all. What only has a
    name in common is told apart by its file, see `told_apart`.

    Args:
        source: where the clips are.
        vocabulary: the classes that its labels are looked up in.
        taken_ids: the ids of the clips that the dataset holds already.
        on_items: told from time to time how many more clips were gone through.
        are_held: says of clips whose name alone is among `taken_ids` whether they are those very clips; unless given,
            they are.
    """
    rejections: list[Rejection] = []
    rejected: list[pa.Table] = []
    notes: Counter[str] = Counter()

    def clips() -> Iterator[PlannedClip]:
        for number, item in enumerate(map(_checked, source.scan(vocabulary, notes)), start=1):
            if number % _ITEMS_AT_ONCE == 0:
                on_items(_ITEMS_AT_ONCE)
            if isinstance(item, PlannedClip):
                yield item
                continue
            rejections.append(item)
            if len(rejections) >= _ITEMS_AT_ONCE:
                rejected.append(tabulate(rejections))
                rejections.clear()

    found = table_of_rows(clips(), _FOUND_SCHEMA)
    names, unique_ids = found["clip_id"].combine_chunks(), found["unique_id"].combine_chunks()
    ids = told_apart(names, unique_ids)
    if are_held is not None:
        planned = found.select(PLAN_SCHEMA.names)
        ids = told_apart_from(
            taken_ids, names, unique_ids, ids, lambda rows: are_held(_clips_of(planned.take(pa.array(rows))))
        )
    table, repeats = _without_repeats(found.set_column(0, "clip_id", ids).select(PLAN_SCHEMA.names), taken_ids)
    rejected.append(tabulate(rejections))
    return Plan(table, pa.concat_tables([*rejected, repeats]), notes)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """The clips that one shard is made of."""

    name: str
    """Of the tar."""
    rows: pa.Table
    """In `PLAN_SCHEMA`."""
    vocabulary: Vocabulary
    recipe: str = ""
    """What is done to the clips' bytes on their way."""

    def __len__(self) -> int:
        return self.rows.num_rows

    def clips(self) -> list[PlannedClip]:
        """Returns the rows as objects."""
        return _clips_of(self.rows)

    def alone(self) -> "PlannedShard":
        """Returns the shard without the memory of the plan that it is a slice of, to be sent elsewhere."""
        return PlannedShard(self.name, self.rows.cast(_PLAIN_SCHEMA).combine_chunks(), self.vocabulary, self.recipe)

    def fingerprint(self) -> str:
        """Returns a digest that changes when the shard would."""
        digest = sha256(f"{self.name} {self.vocabulary.sha256} {self.recipe} ".encode())
        for column in self.rows.cast(_PLAIN_SCHEMA).combine_chunks().itercolumns():
            for part in _spelled(column.chunk(0)):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def plan_shards(
    name: str, clips: pa.Table, clips_per_shard: int, vocabulary: Vocabulary, *, recipe: str = "", first_number: int = 0
) -> list[PlannedShard]:
    """Cut a plan's clips into shards called `<name>-000000.tar`, `<name>-000001.tar` and so on."""
    starts = range(0, clips.num_rows, clips_per_shard)
    return [
        PlannedShard(f"{name}-{number:06d}.tar", clips.slice(start, clips_per_shard), vocabulary, recipe)
        for number, start in enumerate(starts, start=first_number)
    ]


def _clips_of(table: pa.Table) -> list[PlannedClip]:
    rows = table.to_pylist()
    for row in rows:
        row |= {name: tuple(row[name]) for name in ("labels", "label_mask") if row[name] is not None}
    return [PlannedClip(**row) for row in rows]


def _spelled(column: pa.Array) -> Iterator[bytes]:
    """Yields a column's values as bytes; Arrow's own buffers also hold what lies around a slice."""
    if pa.types.is_string(column.type):
        yield string_bytes(cast("pa.StringArray", column))
    elif pa.types.is_list(column.type):
        yield _call("list_value_length", column).fill_null(-1).to_numpy().tobytes()
        yield cast("pa.ListArray", column).flatten().to_numpy().tobytes()
    else:
        yield _call("is_null", column).to_numpy(zero_copy_only=False).tobytes()
        yield column.fill_null(0).to_numpy(zero_copy_only=False).tobytes()


def _checked(item: PlannedClip | Rejection) -> PlannedClip | Rejection:
    """Refuse names that can't be written down."""
    path = item.path or ""
    if escaped(path) != path:
        return Rejection(None, escaped(path), NOT_UTF8)
    if isinstance(item, Rejection):
        return item
    try:
        usable_clip_id(item.clip_id)
    except UnusableClipError as error:
        return Rejection(None, item.path, error.reason, error.detail)
    return item


def _without_repeats(clips: pa.Table, taken_ids: pa.StringArray) -> tuple[pa.Table, pa.Table]:
    """Keep the first clip of each id; give the others as rejections that name the one that was taken."""
    own_ids = clips["clip_id"].combine_chunks()
    ids = pa.concat_arrays([taken_ids.cast(pa.string()), own_ids])
    repeats = repeated_rows(ids)  # ascending; all behind the taken ids, which hold no repeats
    if not len(repeats):
        return clips, REJECTED_SCHEMA.empty_table()
    own = repeats - len(taken_ids)
    first = first_rows(ids.take(pa.array(repeats)), ids) - len(taken_ids)
    paths = _paths(clips)
    winners = _call("if_else", pa.array(first >= 0), paths.take(pa.array(np.maximum(first, 0))), pa.scalar(_HELD))
    columns = {
        "clip_id": own_ids.take(pa.array(own)),
        "path": paths.take(pa.array(own)),
        "reason": pa.repeat("repeated clip id", len(own)),
        "detail": _call("binary_join_element_wise", winners, pa.scalar("was taken"), pa.scalar(" ")),
    }
    keep = np.ones(len(own_ids), bool)
    keep[own] = False
    return clips.filter(pa.array(keep)), pa.table(columns).cast(REJECTED_SCHEMA)


def _paths(clips: pa.Table) -> pa.Array:
    """Returns `PlannedClip.path` of each row."""
    files = clips["file"].cast(pa.string()).combine_chunks()
    members = clips["member"].combine_chunks()
    joined = _call("binary_join_element_wise", files, members, pa.scalar("/"))
    return _call("if_else", _call("equal", members, pa.scalar("")), files, joined)


def _call(function: str, *arguments: pa.Array | pa.Scalar) -> pa.Array:
    return cast("pa.Array", pc.call_function(function, list(arguments)))
