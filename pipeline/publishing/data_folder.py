"""A logit store or a dataset as others get it: its files as they are, and a card."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pipeline.dataset.manifest import read_manifest
from pipeline.errors import StorageError
from pipeline.logits.store import open_store
from pipeline.publishing.cards import dataset_card, store_card
from pipeline.publishing.model_facts import DataFacts, teacher_facts
from pipeline.scoring.report import hash_of_ids
from pipeline.storage import files as storage


def data_card(folder: str, kind: Literal["dataset", "store"], *, name: str, licence: str | None) -> str:
    """Returns the card of a logit store or a dataset.

    Args:
        folder: a path or URL.
        kind: which of the two it is.
        name: what it is to be called.
        licence: an SPDX identifier.

    Raises:
        PipelineError: it can't be read, or is none.
    """
    if kind == "dataset":
        manifest = read_manifest(folder)
        data = DataFacts(name=name, clips=len(manifest), ids_sha256=hash_of_ids(manifest.clip_ids))
        return dataset_card(
            name, licence=licence, data=data, vocabulary=manifest.vocabulary, shards=len(manifest.shards)
        )
    store = open_store(folder)
    return store_card(
        name,
        licence=licence,
        clips=store.clip_count,
        vocabulary_sha256=store.stamp.vocabulary_sha256,
        classes=store.stamp.classes,
        teachers=[teacher_facts(one.name, one.weight, one.sha256) for one in store.stamp.teachers],
    )


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files to a folder, each whole or not at all.

    Raises:
        StorageError: there is no room, or nothing may be written there.
    """
    for name, path in files.items():
        with storage.publish(folder / name) as staged:
            shutil.copyfile(path, staged)


def files_of(folder: str) -> Mapping[str, Path]:
    """Returns a local folder's finished files, name → path.

    Raises:
        StorageError: it is remote.
    """
    if storage.is_remote(folder):
        raise StorageError(f"{folder}: is not on this machine, from which files are published. Copy it here first")
    return {name: storage.local_path(folder) / name for name in storage.list_tree(folder)}
