"""Data sets that others published, in the layout that they ship: which parts they have, and what is learned from which.

Each part becomes a dataset folder of its own; a set has one module, which knows its layout and nothing else.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.labelled_table import LabelledTableSource
from pipeline.ingest.rejections import Rejection
from pipeline.ingest.sources import PlannedClip, Source
from pipeline.models.weights import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One model of those that a set's protocol asks for."""

    name: str
    """Such as fold1."""
    learn: tuple[str, ...]
    """The parts that it is trained on."""
    watch: str
    """The part that it is evaluated on after each epoch."""
    test: str | None = None
    """The part that the best weights on `watch` are tested on; None where `watch` is all there is to test on."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Returns the names of the parts that it needs."""
        return (*self.learn, self.watch, *([self.test] if self.test else []))


class PublishedSet(ABC):
    """A data set as its publisher ships it."""

    name: ClassVar[str]
    archive: ClassVar[str]
    """The folder that the publisher's archive unpacks to; it or the folder that holds it may be given."""
    task: ClassVar[Task]
    rounds: ClassVar[tuple[Round, ...]]

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        """Returns the names of the parts, each once."""
        return tuple(sorted({part for one in cls.rounds for part in one.parts}))

    @classmethod
    def find(cls, folder: Path) -> Path:
        """Returns the set's own folder: `folder`, or the one in it that the archive made."""
        return folder / cls.archive if (folder / cls.archive).is_dir() else folder

    @abstractmethod
    def source(self, folder: Path, part: str) -> Source:
        """Returns the clips of one part.

        Args:
            folder: the set's own, from `find`.
            part: one of `parts()`.

        Raises:
            UsageError: a file of the layout is missing; the message names it.
            ManifestError: one of them is malformed.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTableSource(LabelledTableSource):
    """The rows of a publisher's table. No sound may be missing: figures of half a set compare with nothing."""

    classes: Vocabulary

    def own_vocabulary(self) -> Vocabulary:
        """Returns the publisher's classes, in the publisher's order."""
        return self.classes

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the rows.

        Raises:
            ManifestError: a row is malformed, its label unknown, or its sound missing.
        """
        for item in LabelledTableSource.scan(self, vocabulary, notes):
            if isinstance(item, Rejection):
                raise ManifestError(
                    f"{' '.join(self.tables)}: {self.audio / (item.path or '')}: {item.reason} {item.detail}".rstrip()
                    + ". Unpack the publisher's archives again, all of them"
                )
            yield item


def need(folder: Path, published: type[PublishedSet], *names: str) -> None:
    """Check that files and folders of a layout are there.

    Raises:
        UsageError: one is not.
    """
    for name in names:
        if not (folder / name).exists():
            raise UsageError(
                f"--source {folder}: has no {name}. {published.name} as its publisher ships it has "
                f"{', '.join(names)}; give the folder that holds them"
            )


def classes_named(names: Sequence[tuple[str, str]]) -> Vocabulary:
    """Make a class list of (mid, name) pairs in order."""
    return Vocabulary(tuple(LabelClass(index, mid, name) for index, (mid, name) in enumerate(names)))
