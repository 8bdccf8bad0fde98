"""The class list of data that brings its own labels."""

import csv
import io
from collections.abc import Iterable

from pipeline.dataset.vocabulary import Vocabulary, parse_vocabulary

NEEDS_CLASSES = (
    "--unlabelled needs the class list that teachers are to label by: give --classes CSV, such as "
    "manifests/audioset_classes.csv for AudioSet's, or --add to a dataset that has one"
)


def vocabulary_of(labels: Iterable[str], where: str) -> Vocabulary:
    """Make a class list of the labels that occur: in the order of their characters' codes, numbers by their value.

    Args:
        labels: any number of times each, in any order.
        where: what the labels come from, for messages.

    Raises:
        ManifestError: there are none or too many, or one holds control characters.
    """
    found = set(labels)
    numbers = all(label.isdecimal() for label in found)
    return vocabulary_in_order(sorted(found, key=(lambda label: (int(label), label)) if numbers else None), where)


def vocabulary_in_order(labels: Iterable[str], where: str) -> Vocabulary:
    """Make a class list of labels, each once.

    Raises:
        ManifestError: as `vocabulary_of`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name"])
    writer.writerows([index, label, label] for index, label in enumerate(labels))
    return parse_vocabulary(text.getvalue().encode("utf-8", "backslashreplace"), where)
