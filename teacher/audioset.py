"""AudioSet's 527 classes in the order that every logit of this project has."""

import csv
from functools import cache
from importlib.resources import files


@cache
def class_ids() -> tuple[str, ...]:
    """Returns the ids, such as /m/09x0r, in the order of `class_labels_indices.csv`."""
    text = files("manifests").joinpath("audioset_classes.csv").read_text(encoding="utf-8")
    return tuple(row["mid"] for row in csv.DictReader(text.splitlines()))
