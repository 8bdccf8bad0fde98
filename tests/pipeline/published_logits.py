"""Writes logits in the exact schema of each copy that people hold, and datasets that they are of."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import SCHEMA, Manifest, read_manifest, write_manifest
from pipeline.dataset.vocabulary import Vocabulary, audioset_vocabulary

CLASSES = 527
CLIPS_PER_SHARD = 60
_FLOATS = pa.list_(pa.float32())


@dataclass(frozen=True)
class Tagged:
    """A dataset, and what a good teacher says of its clips."""

    manifest: Manifest
    ids: list[str]
    logits: np.ndarray
    """(clips, classes), float16."""

    @property
    def data(self) -> str:
        return self.manifest.location


def tagged_clips(
    folder: Path, clips: int = 240, vocabulary: Vocabulary | None = None, *, by_class: bool = False
) -> Tagged:
    """Make a manifest of AudioSet-like ids without any sound, each clip with one or two of twenty classes."""
    random = np.random.default_rng(3)
    letters = np.array(list("ABCDEFGHabcdefgh0123456789_-"))
    ids = ["".join(letters[random.integers(len(letters), size=11)]) for _ in range(clips)]
    some = random.integers(20, size=(clips, 2))
    labels = [sorted({int(first)} if by_class else {int(first), int(second)}) for first, second in some]
    if by_class:
        labels.sort()
    rows = [
        {"clip_id": clip_id, "shard": f"train-{row // CLIPS_PER_SHARD:06}.tar", "offset": 512 * row, "size": 9}
        | {"format": "wav", "labels": of_clip}
        for row, (clip_id, of_clip) in enumerate(zip(ids, labels, strict=True))
    ]
    write_manifest(folder, pa.Table.from_pylist(rows, schema=SCHEMA), vocabulary or audioset_vocabulary())
    manifest = read_manifest(folder)
    truth = manifest.label_matrix(np.arange(clips))
    logits = random.normal(-6, 1.5, truth.shape) + 5 * truth
    return Tagged(manifest, ids, logits.astype(np.float16))


def write_efficientat(folder: Path, names: Sequence[str], logits: np.ndarray, protocol: int = 4) -> tuple[str, str]:
    """As EfficientAT's release: half-precision logits, and a pickled dict of bare ids to rows."""
    folder.mkdir(parents=True, exist_ok=True)
    array, index = folder / "passt_enemble_logits_mAP_495.npy", folder / "fname_to_index.pkl"
    np.save(array, logits.astype(np.float16))
    index.write_bytes(pickle.dumps({name: row for row, name in enumerate(names)}, protocol))
    return str(array), str(index)


def write_ced(
    folder: Path, epoch: int, names: Sequence[str], probabilities: np.ndarray, *, top_k: int = 20, process: int = 0
) -> str:
    """As CED's `save_logits.py`: the largest numbers, and a Parquet of filename, start and end beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"logits_ep{epoch}_{process}.h5"
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    rows = len(names)
    with h5py.File(path, "w") as file:
        values = file.create_dataset("topk_values", (rows, top_k), "float16", maxshape=(None, top_k))
        indexes = file.create_dataset("topk_indexes", (rows, top_k), "int16", maxshape=(None, top_k))
        seeds = file.create_dataset("seeds", (rows,), "int32", maxshape=(None,))
        values[:] = np.take_along_axis(probabilities, order, axis=1)
        indexes[:] = order
        seeds[:] = np.random.default_rng(epoch).integers(0, 2**31 - 1, rows)
    seconds = [pa.array(np.full(rows, value, np.float32)) for value in (0, 10)]
    table = pa.table({"filename": list(names), "start": seconds[0], "end": seconds[1]})
    pq.write_table(table, path.with_suffix(".parquet"), compression="brotli")
    return str(path)


def write_parquet(
    path: Path,
    names: Sequence[str],
    values: np.ndarray,
    kind: pa.ListType | pa.FixedSizeListType = _FLOATS,
    columns: str = "clip_id logits",
) -> str:
    """As anybody might: a column of ids and a column of lists."""
    flat = pa.array(values.reshape(-1).astype(kind.value_type.to_pandas_dtype()))
    if pa.types.is_fixed_size_list(kind):
        lists = pa.FixedSizeListArray.from_arrays(flat, type=kind)
    else:
        ends = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
        lists = pa.ListArray.from_arrays(ends, flat)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([pa.array(names), lists], columns.split()), path, row_group_size=100)
    return str(path)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))
