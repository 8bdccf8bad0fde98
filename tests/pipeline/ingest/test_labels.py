from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.ingest.labels import LabelField, classes_of_vector
from pipeline.ingest.rejections import UnusableClipError


def vocabulary(*names: str) -> Vocabulary:
    return Vocabulary(tuple(LabelClass(index, f"/m/{name}", name) for index, name in enumerate(names)))


FOUR = vocabulary("bell", "cat", "dog", "owl")
TWO = vocabulary("no", "yes")


def read(
    values: Sequence[object],
    classes: Vocabulary = FOUR,
    *,
    numbered: bool = True,
    names: Sequence[str] | None = None,
) -> list[object]:
    """Give what each of a field's values means: indices, or the reason why nobody can say."""
    field = LabelField(classes, numbered=numbered, names=names)
    for value in values:
        field.look_at(value)
    found: list[object] = []
    for value in values:
        try:
            found.append(list(field.read(value)))
        except UnusableClipError as error:
            found.append(error.reason)
    return found


def test_names_and_ids_mean_their_class_with_or_without_a_list() -> None:
    for numbered in (False, True):
        assert read(["dog", ["/m/owl", "bell"], []], numbered=numbered) == [[2], [0, 3], []]
        assert read(["Dog", ["dog", "fox"], [None], True], numbered=numbered) == ["unknown label"] * 4


def test_numbers_mean_a_class_only_of_a_list_that_somebody_named() -> None:
    values = [2, [0, 3], 1.0, "2", [3, 3, 1]]
    assert read(values) == [[2], [0, 3], [1], [2], [1, 3]]
    assert read(values, numbered=False) == [
        "class number of no list",
        "class number of no list",
        "class number of no list",
        "unknown label",
        "class number of no list",
    ]


def test_numbers_outside_the_list_are_no_class() -> None:
    assert read([4, -1, [0, 4], 1.5, float("inf")]) == ["unknown label"] * 5


def test_the_names_that_a_file_has_for_its_numbers_come_first() -> None:
    names = ["owl", "bell"]
    for numbered in (False, True):
        assert read([0, [1, 0], 2, -1], names=names, numbered=numbered) == [[3], [0, 3], "unknown label", "no labels"]
    assert read([0, 1], names=["fox", "bell"]) == ["unknown label", [0]]
    assert read([[1, 0], [0, 0], [0]], names=names) == [[0, 3], [3], [3]]


def test_a_text_that_is_a_number_is_first_a_name() -> None:
    numbers = vocabulary("7", "3", "0")
    assert read(["3", "0", "1"], numbers) == [[1], [2], "unknown label"]


@pytest.mark.parametrize("ones", [(0, 1), (0.0, 1.0), (False, True), ("0", "1")])
@pytest.mark.parametrize("numbered", [False, True])
def test_a_number_for_each_class_is_a_vector(ones: tuple, numbered: bool) -> None:
    no, yes = ones
    vectors = [[no, no, yes, no], [yes, yes, no, yes], [no] * 4, [yes] * 4]
    assert read(vectors, numbered=numbered) == [[2], [0, 1, 3], [], [0, 1, 2, 3]]
    for vector, classes in zip(vectors, ([2], [0, 1, 3], [], [0, 1, 2, 3]), strict=True):
        assert read([vector], numbered=numbered) == [classes]


@pytest.mark.parametrize("vector", [[0, 0, 1], [1, 1], [1, 0, 1, 0, 0], [True, False], [0.0, 1.0, 0.0], [0, 0]])
def test_zeros_and_ones_of_another_length_are_never_classes(vector: list) -> None:
    assert read([vector]) == ["label vector of another length"]
    assert read([vector, [1] * 4]) == ["label vector of another length", [0, 1, 2, 3]]


def test_counts_are_neither_classes_nor_a_vector() -> None:
    assert read([[0, 0, 2, 1], [1, 0, 0, 0]]) == ["label vector of other numbers", [0]]
    assert read([[0.5, 0.25, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]) == ["unknown label", [1]]


def test_lists_that_no_vector_could_be_are_class_numbers() -> None:
    assert read([[0, 1], [0], [1], [3]]) == [[0, 1], [0], [1], [3]]
    assert read([[0, 1], [1, 0], [2, 0, 1], [0, 0]]) == [[0, 1], [0, 1], [0, 1, 2], [0]]
    assert read([[0, 1]]) == [[0, 1]]


def test_of_two_classes_all_clips_together_say_what_their_numbers_are() -> None:
    assert read([[0, 1], [1, 0]], TWO) == [[1], [0]]
    assert read([[0, 1], [0, 0]], TWO) == [[1], []]
    assert read([[0, 1], [0], [1]], TWO) == [[0, 1], [0], [1]]
    assert read([[0, 1], [0, 1]], TWO) == ["ambiguous labels"] * 2


def test_of_one_class_the_number_is_that_class_unless_there_are_ones() -> None:
    assert read([[0], [], [0]], vocabulary("bell")) == [[0], [], [0]]
    assert read([[0], [1], [0]], vocabulary("bell")) == [[], [0], []]


def test_a_vector_counts_its_ones() -> None:
    assert classes_of_vector(np.array([0, 1, 1], np.uint8), 3) == (1, 2)
    assert classes_of_vector(np.array([False, True]), 2) == (1,)
    for vector in ([0, 2, 1], [0.0, 0.5, 1.0], [0.0, np.nan, 1.0], [-1, 0, 0]):
        with pytest.raises(UnusableClipError, match="label vector of other numbers"):
            classes_of_vector(np.array(vector), 3)
    with pytest.raises(UnusableClipError, match="2 numbers, but 3 classes"):
        classes_of_vector(np.array([0, 1]), 3)
