"""FSD50K (Fonseca et al. 2022, arXiv:2010.00475): 51,197 clips of 0.3 to 30 s, 200 classes of AudioSet's ontology.

FSD50K.ground_truth/dev.csv has the columns fname, labels, mids, split (train or val), eval.csv the same without split;
vocabulary.csv has no header: index, label, mid. The sounds are in FSD50K.dev_audio and FSD50K.eval_audio.
"""

import csv
from pathlib import Path

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError
from pipeline.ingest.labelled_table import TableColumns
from pipeline.ingest.published_sets import PublishedSet, PublishedTableSource, Round, classes_named, need
from pipeline.ingest.sources import Source

_TRUTH = "FSD50K.ground_truth"


class Fsd50k(PublishedSet):
    """The best weights on the validation split are tested on the evaluation set."""

    name, archive, task = "fsd50k", "FSD50K", "multi-label"
    rounds = (Round(name="split", learn=("train",), watch="val", test="eval"),)

    def source(self, folder: Path, part: str) -> Source:
        """Returns the clips of train, val or eval."""
        half = "eval" if part == "eval" else "dev"
        audio = f"FSD50K.{half}_audio"
        need(folder, Fsd50k, f"{_TRUTH}/{half}.csv", f"{_TRUTH}/vocabulary.csv", audio)
        only = () if part == "eval" else (("split", part),)
        columns = TableColumns(path="fname", label="mids", label_separator=",", only=only)
        table, classes = folder / _TRUTH / f"{half}.csv", _classes(folder / _TRUTH / "vocabulary.csv")
        return PublishedTableSource((str(table),), folder / audio, columns, True, classes=classes)


def _classes(table: Path) -> Vocabulary:
    with table.open(encoding="utf-8-sig", newline="") as stream:
        rows = [row for row in csv.reader(stream) if row]
    if any(len(row) != 3 or row[0] != str(index) for index, row in enumerate(rows)) or not rows:
        raise ManifestError(f"{table}: each line should be `index,label,mid`, numbered from 0, with no header")
    return classes_named([(mid, label.replace("_", " ")) for _, label, mid in rows])
