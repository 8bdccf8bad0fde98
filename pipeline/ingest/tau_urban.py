"""TAU Urban Acoustic Scenes 2020 Mobile, development set (DCASE 2020 task 1A): clips of 10 s, 10 scenes, 9 devices.

meta.csv and evaluation_setup/fold1_{train,evaluate}.csv are separated by tabs; they have the columns filename (below
audio/, such as audio/airport-barcelona-0-0-a.wav, whose last word is the device) and scene_label.
"""

import csv
from pathlib import Path

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError
from pipeline.ingest.labelled_table import TableColumns
from pipeline.ingest.published_sets import PublishedSet, PublishedTableSource, Round, classes_named, need
from pipeline.ingest.sources import Source


class TauUrban(PublishedSet):
    """The one fold that the challenge set up."""

    name, archive, task = "dcase20", "TAU-urban-acoustic-scenes-2020-mobile-development", "single-label"
    rounds = (Round(name="fold1", learn=("train",), watch="evaluate"),)

    def source(self, folder: Path, part: str) -> Source:
        """Returns the clips of train or evaluate."""
        table = f"evaluation_setup/fold1_{part}.csv"
        need(folder, TauUrban, "meta.csv", table, "audio")
        columns = TableColumns(path="filename", label="scene_label", delimiter="\t")
        classes = _classes(folder / "meta.csv")
        return PublishedTableSource((str(folder / table),), folder, columns, True, classes=classes)


def _classes(table: Path) -> Vocabulary:
    """Returns the scenes in alphabetical order, as everybody numbers them."""
    with table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t")
        if "scene_label" not in (reader.fieldnames or ()):
            raise ManifestError(f"{table}: has no column scene_label, or its fields are not separated by tabs")
        scenes = {row["scene_label"] for row in reader}
    return classes_named([(scene, scene.replace("_", " ")) for scene in sorted(scenes)])
