"""What a store of foreign logits says about where they came from: files, hashes, conversions."""

import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.logits.imports.foreign_logits import MIN_PROBABILITY, ForeignLogits
from pipeline.logits.stamp import ImportStamp, SourceFile, StoreStamp
from pipeline.runtime.progress import progress_bar
from pipeline.storage import files as storage

_BYTES_AT_ONCE = 1 << 22


def import_stamp(
    source: ForeignLogits, own: Vocabulary, numbers: np.ndarray | None, manifest: Manifest, *, origin: str
) -> StoreStamp:
    """Returns the stamp of the store that foreign logits become; hashes their files.

    Args:
        source: the files.
        own: their classes.
        numbers: (classes,): which number of a row is which of the dataset's classes; None where they are the same.
        manifest: the dataset whose clips they are of.
        origin: who made them, in the words of whoever imports them.
    """
    classes = len(manifest.vocabulary)
    done = [source.conversion]
    if source.held == "probabilities":
        done.append(f"logit of probabilities held within {MIN_PROBABILITY:g} and 1 - {MIN_PROBABILITY:g}")
    if numbers is not None:
        done.append(f"{classes} of {len(own)} classes, renumbered from the list with sha256 {own.sha256}")
    return StoreStamp(
        teachers=(),
        vocabulary_sha256=manifest.vocabulary.sha256,
        classes=classes,
        precision="unknown",
        top_k=source.top_k if source.top_k is not None and source.top_k < classes else None,
        imported=ImportStamp(
            layout=source.layout,
            files=_hash_files(source.files),
            origin=origin,
            held=source.held,
            conversion="; ".join(filter(None, done)),
        ),
    )


def _hash_files(locations: Sequence[str]) -> tuple[SourceFile, ...]:
    hashed = []
    with progress_bar("hashing", None, unit="MB") as bar:
        for location in locations:
            digest, size = hashlib.sha256(), 0
            with storage.open_input(location) as stream:
                while block := stream.read(_BYTES_AT_ONCE):
                    digest.update(block)
                    size += len(block)
                    bar.advance(len(block) // 1_000_000)
            hashed.append(SourceFile(name=storage.file_name(location), size=size, sha256=digest.hexdigest()))
    return tuple(hashed)
