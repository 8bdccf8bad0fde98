"""What labels mean: names of classes, numbers of a list that somebody names, or vectors with a place for each class.

A number by itself says nothing: every list of classes has another third one. So numbers count only where the file says
what they stand for, or the user which list they are of; and zeros and ones in a row of many are no class numbers.
"""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.ingest.rejections import UnusableClipError

_HIDDEN = -1
"""The number that the Hugging Face Hub's files give to a clip whose label is kept secret."""
_BITS = {0, 1}


class LabelField:
    """How one field of labels is to be read: a column of a file, or a key in the jsons of a tar.

    Whether lists of numbers are vectors shows only in all of them, so `look_at` each before the first is read.

    Args:
        vocabulary: the classes.
        names: what the numbers stand for, where the file itself says so.
        numbered: whether somebody said that numbers are places in `vocabulary`.
    """

    def __init__(self, vocabulary: Vocabulary, *, names: Sequence[str] | None = None, numbered: bool) -> None:
        self._vocabulary = vocabulary
        self._names = names
        self._numbered = numbered
        self._lengths: set[int] = set()  # of lists of numbers
        self._has_numbers = False
        self._beyond_bits = False
        self._like_vectors = False

    def look_at(self, value: object) -> None:
        """Take one clip's labels into account."""
        items = value if isinstance(value, list) else [value]
        numbers = [number for item in items if (number := _number(item)) is not None]
        if not numbers or len(numbers) < len(items):
            return
        ascending = sorted(set(numbers))
        is_bits = _BITS.issuperset(ascending)
        self._has_numbers = True
        self._beyond_bits |= not is_bits
        if isinstance(value, list):
            self._lengths.add(len(numbers))
            if len(numbers) == 1:
                self._like_vectors |= numbers == [1] and len(self._vocabulary) == 1
            elif isinstance(items[0], bool) or numbers.count(0) > 1 or (is_bits and numbers != ascending):
                self._like_vectors = True

    @property
    def holds_vectors(self) -> bool:
        """Whether the lists are vectors: class numbers don't repeat class 0, and don't all stop at class 1."""
        return self._names is None and self._like_vectors and (not self._beyond_bits or len(self._lengths) == 1)

    @property
    def lacks_list(self) -> bool:
        """Whether there are class numbers, and nobody says of which list."""
        return self._has_numbers and self._names is None and not self._numbered and not self.holds_vectors

    def read(self, value: object) -> tuple[int, ...]:
        """Returns the indices of one clip's classes, ascending.

        Args:
            value: one label, or a list of them or of a number for each class.

        Raises:
            UnusableClipError: a label is none of the classes, or nobody can say which.
        """
        if not isinstance(value, list):
            return (self._class_of(value),)
        numbers = [number for item in value if (number := _number(item)) is not None]
        if numbers and len(numbers) == len(value) and self._names is None:
            if self.holds_vectors:
                return classes_of_vector(np.array(numbers), len(self._vocabulary))
            if not self._beyond_bits and self._lengths == {len(self._vocabulary)} != {1}:
                raise UnusableClipError("ambiguous labels", f"{value}: class numbers, or a number for each class?")
        return tuple(sorted({self._class_of(item) for item in value}))

    def _class_of(self, label: object) -> int:
        if isinstance(label, str):
            index = self._class_called(label)
            number = None if self._vocabulary.has_numbers_for_names or not self._numbered else _number(label)
        else:
            index, number = None, None if isinstance(label, bool) else _number(label)
        if index is None and number is not None:
            index = self._class_of_number(number)
        if index is None:
            raise UnusableClipError("unknown label", ascii(label)[:100])
        return index

    def _class_called(self, name: str) -> int | None:
        return self._vocabulary.index_by_mid.get(name, self._vocabulary.index_by_name.get(name))

    def _class_of_number(self, number: int) -> int | None:
        if self._names is not None:
            if number == _HIDDEN:
                raise UnusableClipError("no labels", "the file hides them: its label is -1")
            return self._class_called(self._names[number]) if 0 <= number < len(self._names) else None
        if not self._numbered:
            raise UnusableClipError("class number of no list", f"{number}: name its class list by --classes")
        return number if 0 <= number < len(self._vocabulary) else None


def classes_of_vector(vector: np.ndarray, classes: int) -> tuple[int, ...]:
    """Returns the indices of the classes that have a one in a clip's vector.

    Args:
        vector: (classes,), zeros and ones of any type.
        classes: how many there are.

    Raises:
        UnusableClipError: it has another length, or holds something else.
    """
    if vector.shape != (classes,):
        raise UnusableClipError("label vector of another length", f"{len(vector)} numbers, but {classes} classes")
    indices = np.flatnonzero(vector)
    if (other := vector[indices][vector[indices] != 1]).size:
        raise UnusableClipError("label vector of other numbers", f"{other[0]}, where only 0 and 1 say something")
    return tuple(indices.tolist())


def _number(label: object) -> int | None:
    """Returns the number that a label is, or that its text spells; None where it is none, or no whole one."""
    if isinstance(label, str):
        return int(label) if label.isascii() and label.isdecimal() and len(label) < 10 else None
    if isinstance(label, int):
        return int(label)
    return int(label) if isinstance(label, float) and math.isfinite(label) and label.is_integer() else None
