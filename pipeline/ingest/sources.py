"""What every source of clips offers to the packing: a list of its clips, and then their encoded bytes."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.vocabulary import Vocabulary, audioset_vocabulary
from pipeline.errors import UsageError
from pipeline.ingest.rejections import Rejection
from pipeline.storage import files as storage


@dataclass(frozen=True, slots=True)
class PlannedClip:
    """A clip whose bytes are known to exist somewhere."""

    clip_id: str
    file: str
    """The file that holds its bytes, in the words of its source."""
    version: str
    """Changes when the file does, as far as can be told without reading it."""
    labels: tuple[int, ...]
    """Class indices into the vocabulary, ascending."""
    member: str = ""
    """What the clip is called in the file; empty where the file is the clip."""
    position: int = 0
    """Its row in the file, or the offset of its first byte."""
    size: int | None = None
    """Bytes, where the source says so."""
    start_seconds: float | None = None
    end_seconds: float | None = None
    format: str = ""
    """The audio's extension; empty where only its bytes tell, as `sample_rate` and `frames` are None there."""
    sample_rate: int | None = None
    frames: int | None = None
    crc32: int | None = None
    """Of the bytes, where the source says so."""
    label_mask: tuple[int, ...] | None = None
    """The classes whose label is known, ascending; None: all of them."""
    unique_id: str | None = None
    """The id to take where another clip of the source has `clip_id`, too; None where that is more than a name."""

    @property
    def path(self) -> str:
        """Where the clip is, for people."""
        return f"{self.file}/{self.member}" if self.member else self.file


@dataclass(frozen=True, slots=True)
class KnownSound:
    """A clip out of a finished dataset: all that there is to know of its sound is in its plan already."""

    audio: bytes
    description: bytes
    """The json that belongs beside it, whole."""


ReadHandle = Callable[[], bytes | KnownSound]
"""Gives a clip's encoded bytes, in whichever thread calls it, or raises DecodeError."""

ClipReader = Callable[[Sequence[PlannedClip]], Iterator[ReadHandle]]
"""Gives a handle for each of the clips, in their order. Sources that are read in sequence have read the clip by then;
the others read it when the handle is called."""


class Source(ABC):
    """A place that clips come from; small, and pickled to wherever a shard is packed."""

    def own_vocabulary(self) -> Vocabulary:
        """Returns the classes that count unless the user names others: AudioSet's, or what the data itself holds."""
        return audioset_vocabulary()

    @abstractmethod
    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through all clips in a fixed order, without reading their sounds.

        Args:
            vocabulary: the classes that labels are looked up in.
            notes: counts what is worth a word but is no rejection.

        Raises:
            PipelineError: the source is not what it should be.
        """

    @abstractmethod
    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the source for reading clips that `scan` gave."""


def facts_to_tell(
    clip: PlannedClip, vocabulary: Vocabulary, sample_rate_hz: int | None, frames: int | None
) -> dict[str, object]:
    """Returns what the json beside a clip's audio says: all that the manifest is made from, so it can be made again."""
    known = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
    known |= {"sample_rate": sample_rate_hz, "frames": frames}
    labels, mask = (
        None if classes is None else [vocabulary.classes[index].mid for index in classes]
        for classes in (clip.labels, clip.label_mask)
    )
    known |= {"label_mask": mask}
    return {"labels": labels, **{name: value for name, value in known.items() if value is not None}}


def versioned_files(paths: Iterable[str], extensions: Sequence[str], flag: str) -> list[tuple[str, str]]:
    """Returns (location, version) of the files that `paths` name; a folder stands for its files with the extensions.

    Args:
        paths: files and folders, local or URLs.
        extensions: such as `.tar`.
        flag: what the user called them by, for messages.

    Raises:
        UsageError: a path is not there, or a folder holds none.
    """
    found: dict[str, str] = {}
    for path in paths:
        inside = [file for file in storage.list_files(path) if file.name.endswith(tuple(extensions))]
        if inside:
            found |= {storage.join_path(path, file.name): f"{file.size} {file.version}" for file in inside}
            continue
        parent, name = storage.split_path(path)
        files = [file for file in storage.list_files(parent) if file.name == name]
        if not files:
            wanted = " or ".join(extensions)
            raise UsageError(f"{flag} {path}: there is no such file, and no folder of {wanted} files")
        found[path] = f"{files[0].size} {files[0].version}"
    return list(found.items())


def from_folder(folder: str, location: str) -> str:
    """Returns where `location` is, as a user in the working folder `folder` means it; others work in other folders."""
    return location if storage.is_remote(location) else str(Path(folder) / storage.local_path(location))


def local_folder(path: str, flag: str) -> Path:
    """Returns a folder that has to be local.

    Args:
        path: what the user gave.
        flag: what the user gave it by, for messages.

    Raises:
        UsageError: it is a URL, or no folder.
    """
    if storage.is_remote(path):
        raise UsageError(f"{flag} {path}: has to be a local folder; mount the bucket, or copy the files")
    if not storage.local_path(path).is_dir():
        raise UsageError(f"{flag} {path}: is no folder")
    return storage.local_path(path).absolute()
