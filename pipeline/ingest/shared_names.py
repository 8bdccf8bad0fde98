"""Clips that files call alike: which of them are one clip, and which have only a name in common."""

from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.string_columns import repeated_rows


def told_apart(ids: pa.StringArray, unique_ids: pa.StringArray) -> pa.StringArray:
    """Returns the ids of clips, where each of several that have only a name in common has the unique one instead.

    An id that the data states, or that has the form of YouTube's, means one clip wherever it occurs. A name such as
    `000012` means one within its file alone.

    Args:
        ids: (clips,)
        unique_ids: (clips,), of file and place; null where the id is more than a name.
    """
    repeats = repeated_rows(ids)
    if not len(repeats):
        return ids
    repeated = pc.call_function("is_in", [ids], pc.SetLookupOptions(ids.take(pa.array(repeats))))
    are_names = pc.call_function("and", [repeated, unique_ids.is_valid()])
    return cast("pa.StringArray", pc.call_function("if_else", [are_names, unique_ids, ids]))
