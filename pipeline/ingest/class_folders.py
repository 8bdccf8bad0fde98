"""A folder for each class: the folder's name is the label."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pipeline.dataset.clip_ids import clip_id_of_path, without_extension
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import UsageError
from pipeline.ingest.audio_files import file_version, find_audio_files, open_file_reader
from pipeline.ingest.labels import LabelField
from pipeline.ingest.own_classes import NEEDS_CLASSES, vocabulary_of
from pipeline.ingest.rejections import Rejection, UnusableClipError, escaped
from pipeline.ingest.sources import ClipReader, PlannedClip, Source


@dataclass(frozen=True, slots=True)
class ClassFoldersSource(Source):
    """The sounds below `<folder>/<class>/`, in any depth.

    They come in an order that looks drawn by lot but is always the same, so that each shard holds a mix of classes.
    """

    folder: Path
    whole_names: bool = False
    """Take each path as the id, even where its name looks like a YouTube id with a prefix or times."""
    numbered: bool = False
    """Whether the user said which list class numbers are of: the vocabulary."""
    unlabelled: bool = False
    """Take all sounds, wherever they are; nobody knows their labels."""

    def own_vocabulary(self) -> Vocabulary:
        """Returns the folders' names that hold sounds, in the order of their characters' codes.

        Raises:
            UsageError: they are no labels, so that nobody says which classes there are.
        """
        if self.unlabelled:
            raise UsageError(NEEDS_CLASSES)
        paths = (file.path for file in find_audio_files(self.folder))
        return vocabulary_of(filter(None, (_label(path) for path in paths if escaped(path) == path)), str(self.folder))

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through all folders."""
        field = LabelField(vocabulary, numbered=self.numbered)
        paths = [file.path for file in find_audio_files(self.folder)]
        paths.sort(key=lambda path: sha256(path.encode("utf-8", "surrogateescape")).digest())
        for path in paths:
            name = without_extension(path)
            clip_id = name if self.whole_names else clip_id_of_path(name)
            if self.unlabelled:
                yield PlannedClip(clip_id, path, file_version(self.folder / path), labels=(), label_mask=())
                continue
            if not (label := _label(path)):
                yield Rejection(clip_id, path, "in no class's folder")
                continue
            try:
                labels = field.read(label)
            except UnusableClipError as error:
                yield Rejection(clip_id, path, error.reason, error.detail)
                continue
            yield PlannedClip(clip_id, path, file_version(self.folder / path), labels)

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the folder."""
        return open_file_reader(self.folder)


def _label(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ""
