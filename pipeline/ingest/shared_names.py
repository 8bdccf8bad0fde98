"""Clips that files call alike: which of them are one clip, and which have only a name in common."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
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


def told_apart_from(
    taken_ids: pa.StringArray,
    names: pa.StringArray,
    unique_ids: pa.StringArray,
    ids: pa.StringArray,
    are_taken: Callable[[np.ndarray], Sequence[bool]],
) -> pa.StringArray:
    """Returns the ids of clips that are added to others: what only has a name in common with one gets its unique id.

    Args:
        taken_ids: the ids of the others.
        names: (clips,), before they were told apart from each other.
        unique_ids: (clips,), as `told_apart` takes them.
        ids: (clips,), as `told_apart` gives them.
        are_taken: rows of clips whose name is taken → whether they are those very clips, which keep that name.
    """
    taken = pc.SetLookupOptions(taken_ids)
    is_unique_taken = _call("is_in", unique_ids, options=taken)
    is_in_doubt = _call(
        "and_not", _call("and", _call("is_in", names, options=taken), unique_ids.is_valid()), is_unique_taken
    )
    rows = np.flatnonzero(is_in_doubt.to_numpy(zero_copy_only=False))
    is_same = np.zeros(len(names), bool)
    if len(rows):
        is_same[rows] = are_taken(rows)
    needs_unique = _call("or", is_unique_taken, is_in_doubt)
    return cast(
        "pa.StringArray", _call("if_else", pa.array(is_same), names, _call("if_else", needs_unique, unique_ids, ids))
    )


def _call(function: str, *arguments: pa.Array, options: pc.FunctionOptions | None = None) -> pa.Array:
    return cast("pa.Array", pc.call_function(function, list(arguments), options))
