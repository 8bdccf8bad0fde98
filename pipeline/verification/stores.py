"""The two kinds of stores, of logits and of embeddings, as `pipeline.verification.parts` reads them."""

import numpy as np
import pyarrow as pa

from pipeline.dataset.manifest import Manifest
from pipeline.embeddings import store as embeddings
from pipeline.embeddings.store import EmbeddingPart
from pipeline.logits import store as logits
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import LogitPart, LogitStore
from pipeline.verification.parts import PartFormat


def _opened(location: str, part: LogitPart) -> LogitStore:
    return LogitStore(location=location, stamp=part.stamp, parts=(part,))


def _finite_logits(location: str, part: LogitPart) -> tuple[pa.ChunkedArray, np.ndarray]:
    store = _opened(location, part)
    is_finite = np.isfinite(store.part_views(part)).all(axis=(1, 2))  # (clips,)
    if part.stamp.members is not None:
        members = np.isfinite(store.part_members(part)).all(axis=(0, 2))  # (rows,)
        is_finite &= members.reshape(part.clips, -1).all(axis=1)
    return store.part_clip_ids(part), np.asarray(is_finite)


def _check_classes(location: str, stamp: StoreStamp, manifest: Manifest) -> None:
    LogitStore(location=location, stamp=stamp, parts=()).check_vocabulary(manifest.vocabulary, manifest.location)


LOGITS: PartFormat[LogitPart] = PartFormat(
    holds="logits",
    failed="clips that the teachers could not be given",
    stamp_name=logits.STORE_NAME,
    command="pipeline teacher-logits",
    read_stamp=logits.read_stamp,
    write_stamp=logits.write_stamp,
    files=logits.part_files,
    read_part=logits.read_part,
    read_ids=lambda location, part: _opened(location, part).part_clip_ids(part),
    read_finite=_finite_logits,
    write_failures=logits.write_failures,
    check_classes=_check_classes,
)


def _finite_embeddings(location: str, part: EmbeddingPart) -> tuple[pa.ChunkedArray, np.ndarray]:
    ids, values = embeddings.read_rows(location, part)
    return ids, np.asarray(np.isfinite(values).all(axis=1))


EMBEDDINGS: PartFormat[EmbeddingPart] = PartFormat(
    holds="embeddings",
    failed="clips that could not be embedded",
    stamp_name=embeddings.STAMP_NAME,
    command="pipeline embed",
    read_stamp=embeddings.read_stamp,
    write_stamp=embeddings.write_stamp,
    files=embeddings.part_files,
    read_part=embeddings.read_part,
    read_ids=embeddings.read_ids,
    read_finite=_finite_embeddings,
    write_failures=embeddings.write_failures,
    check_classes=lambda location, stamp, manifest: None,  # embeddings are of no classes
)
