"""OpenMIC-2018 (Humphrey, Durand, McFee 2018): 20,000 clips of 10 s, 20 instruments, a few of them known for each.

openmic-2018.npz has Y_true (clips, classes), the relevance from 0 to 1, and Y_mask (clips, classes), where that
is known. class-map.json numbers the instruments, partitions/split01_{train,test}.csv list sample keys, and a clip is
audio/KEY[:3]/KEY.ogg.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError
from pipeline.ingest.audio_files import file_version, open_file_reader
from pipeline.ingest.published_sets import PublishedSet, Round, classes_named, need
from pipeline.ingest.rejections import Rejection
from pipeline.ingest.sources import ClipReader, PlannedClip, Source

_ARRAYS, _TABLE = "openmic-2018.npz", "openmic-2018-aggregated-labels.csv"
_THRESHOLD = 0.5
"""A clip has an instrument where its relevance is above this, as in PaSST and EfficientAT."""


class OpenMic(PublishedSet):
    """The published split."""

    name, archive, task = "openmic", "openmic-2018", "multi-label"
    rounds = (Round(name="split01", learn=("train",), watch="test"),)

    def source(self, folder: Path, part: str) -> Source:
        """Returns the clips of train or test."""
        need(folder, OpenMic, _ARRAYS, "class-map.json", f"partitions/split01_{part}.csv", "audio")
        return OpenMicSource(folder, part)


@dataclass(frozen=True, slots=True)
class OpenMicSource(Source):
    """The clips of one partition."""

    folder: Path
    partition: str

    def own_vocabulary(self) -> Vocabulary:
        """Returns the instruments in the order of class-map.json."""
        path = self.folder / "class-map.json"
        try:
            numbers = json.loads(path.read_bytes())
            names = sorted(numbers, key=numbers.__getitem__)
            if [numbers[name] for name in names] != list(range(len(names))):
                raise ValueError("the instruments are not numbered from 0")
        except (ValueError, TypeError, AttributeError) as error:
            raise ManifestError(f"{path}: should be an object of instrument → number ({error})") from error
        return classes_named([(name, name.replace("_", " ")) for name in names])

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the partition's keys.

        Raises:
            ManifestError: a clip has no labels or no sound, or the labels are for other classes.
        """
        annotations = _read_annotations(self.folder)
        classes = annotations.positive.shape[1]
        if classes != len(vocabulary):
            raise ManifestError(f"{self.folder / _ARRAYS}: labels {classes} classes, class-map.json {len(vocabulary)}")
        for key in _keys(self.folder, self.partition):
            path = f"audio/{key[:3]}/{key}.ogg"
            if key not in annotations.row_of or not (self.folder / path).is_file():
                lacking = path if key in annotations.row_of else f"labels of {key} in {_ARRAYS}"
                raise ManifestError(f"{self.folder}: has no {lacking}. Unpack the publisher's archive again")
            row = annotations.row_of[key]
            labels, known = (
                tuple(np.flatnonzero(of[row]).tolist()) for of in (annotations.positive, annotations.label_mask)
            )
            yield PlannedClip(key, path, file_version(self.folder / path), labels, label_mask=known)

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the folder."""
        return open_file_reader(self.folder)


@dataclass(frozen=True, slots=True, eq=False)
class _Annotations:
    row_of: dict[str, int]
    positive: np.ndarray
    """(clips, classes), bool."""
    label_mask: np.ndarray
    """(clips, classes), bool."""


def _read_annotations(folder: Path) -> _Annotations:
    path = folder / _ARRAYS
    try:
        with np.load(path, allow_pickle=False) as arrays:
            relevance, label_mask = arrays["Y_true"], arrays["Y_mask"].astype(bool)
            try:
                keys = [str(key) for key in arrays["sample_key"]]
            except ValueError:  # Python objects, in the publisher's own file: a pickle, which nobody here opens
                keys = _keys_of_table(folder)
    except (ValueError, KeyError, BadZipFile, EOFError) as error:
        raise ManifestError(f"{path}: should hold the arrays Y_true, Y_mask and sample_key ({error})") from error
    if relevance.ndim != 2 or not relevance.shape == label_mask.shape == (len(keys), relevance.shape[1]):
        raise ManifestError(
            f"{path}: {len(keys)} keys, Y_true {relevance.shape} and Y_mask {label_mask.shape} don't belong together"
        )
    return _Annotations({key: row for row, key in enumerate(keys)}, (relevance > _THRESHOLD) & label_mask, label_mask)


def _keys_of_table(folder: Path) -> list[str]:
    """Returns the rows' keys from the table that the arrays were made of: its keys, sorted."""
    need(folder, OpenMic, _TABLE)
    with (folder / _TABLE).open(encoding="utf-8-sig", newline="") as stream:
        return sorted({row["sample_key"] for row in csv.DictReader(stream)})


def _keys(folder: Path, partition: str) -> list[str]:
    text = (folder / f"partitions/split01_{partition}.csv").read_text(encoding="utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]
