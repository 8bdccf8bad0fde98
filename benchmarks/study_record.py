"""The runs of a study that are finished, in a file that travels: on another machine the study goes on with the rest."""

import hashlib
import json
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset.manifest import read_manifest
from pipeline.logits.store import open_store

Curve = Sequence[tuple[float, float]]
"""(step, mAP from 0 to 1) of each evaluation."""


class StudyRecord:
    """Finished runs, a line of JSON each, by what they were made from.

    Args:
        path: of the file; it is made with the first run. What a power failure cut off at its end is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._writing = path, threading.Lock()
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        runs = [json.loads(line) for line in whole.splitlines()]
        self._curves: dict[str, Curve] = {run["key"]: [(step, score) for step, score in run["curve"]] for run in runs}

    def __contains__(self, key: str) -> bool:
        return key in self._curves

    def curve(self, key: str) -> Curve:
        """Returns the evaluations of a run.

        Raises:
            KeyError: it is not finished.
        """
        return self._curves[key]

    def add(self, key: str, name: str, curve: Curve) -> None:
        """Note a run that has finished."""
        line = {"run": name, "key": key, "curve": curve, "torch": torch.__version__, "machine": platform.machine()}
        with self._writing:
            self._curves[key] = curve
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


def key_of(
    recipe: Mapping[str, Any], flags: Sequence[str], seed: int, data: Sequence[Path], logits: Path | None
) -> str:
    """Returns 16 hexadecimal digits that change with whatever decides about a run, but not with where things lie.

    Args:
        recipe: its settings.
        flags: what else is set, without paths.
        seed: of its randomness.
        data: the datasets, the one that is learned from first.
        logits: the store of its logits, if it has one.
    """
    identities = [read_manifest(folder).identity for folder in data]
    taught_by = None if logits is None else _digest(logits, data[0])
    parts = [recipe, list(flags), seed, identities, taught_by]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _digest(store: Path, data: Path) -> str:
    """Returns a digest of the logits of a dataset's clips, in its order, of all views of them."""
    logits = open_store(str(store))
    has_views = logits.stamp.views is not None
    aligned = logits.align(read_manifest(data), data.parent / "cache", all_views=has_views)
    return hashlib.sha256(aligned.logits.tobytes() + aligned.has_logits.tobytes()).hexdigest()
