"""ESC-50 (Piczak 2015, doi:10.1145/2733373.2806390): 2000 clips of 5 s, 50 classes, five folds.

ESC-50-master/meta/esc50.csv has the columns filename, fold, target, category and more; audio/ has the sounds.
"""

import csv
from pathlib import Path

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError
from pipeline.ingest.labelled_table import TableColumns
from pipeline.ingest.published_sets import PublishedSet, PublishedTableSource, Round, classes_named, need
from pipeline.ingest.sources import Source

_FOLDS = tuple(f"fold{number}" for number in range(1, 6))


class Esc50(PublishedSet):
    """Each fold is tested on by the model that learned from the four others."""

    name, archive, task = "esc50", "ESC-50-master", "single-label"
    rounds = tuple(
        Round(name=fold, learn=tuple(other for other in _FOLDS if other != fold), watch=fold) for fold in _FOLDS
    )

    def source(self, folder: Path, part: str) -> Source:
        """Returns the clips of one fold."""
        need(folder, Esc50, "meta/esc50.csv", "audio")
        table = folder / "meta/esc50.csv"
        fold = part.removeprefix("fold")
        columns = TableColumns(path="filename", label="category", only=(("fold", fold),))
        return PublishedTableSource((str(table),), folder / "audio", columns, True, classes=_classes(table))


def _classes(table: Path) -> Vocabulary:
    """Returns the categories in the order of their numbers, which is that of upstream's logits."""
    with table.open(encoding="utf-8-sig", newline="") as stream:
        try:
            pairs = {(int(row["target"]), row["category"]) for row in csv.DictReader(stream)}
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{table}: needs the columns target (a number) and category ({error})") from error
    if [number for number, _ in sorted(pairs)] != list(range(len(pairs))):
        raise ManifestError(f"{table}: its targets and categories don't pair off as 0, 1, 2 … do; get the file anew")
    return classes_named([(category, category.replace("_", " ")) for _, category in sorted(pairs)])
