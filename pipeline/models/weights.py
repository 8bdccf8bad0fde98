"""Files of weights: where they are, what they are, and what made them."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Json, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from pipeline.errors import CheckpointError, PipelineError
from pipeline.storage import files as storage

_FILES_IN_A_FOLDER = ("best.safetensors", "last.safetensors", "model.safetensors", "pytorch_model.bin")
"""Of a run, and as Hugging Face lays them out; the first that is there counts."""

Task = Literal["multi-label", "single-label"]
"""Whether a clip has any number of the classes, each with a probability of its own, or exactly one of them."""


class CheckpointMetadata(BaseModel):
    """What a file of weights written by this project says about itself, in the safetensors header."""

    model_config = ConfigDict(frozen=True)

    stage: Literal["student", "teacher"]
    """Which of the two packages builds the model."""
    model: str
    """The name that `create_model` knows it by."""
    kwargs: Json[dict[str, Any]]
    """The further keywords of `create_model`."""
    classes: PositiveInt
    """How many logits a clip gets."""
    vocabulary_sha256: str
    """Hash of the class list that the logits follow."""
    vocabulary: str | None = None
    """That class list as CSV text, so that the file can name its classes anywhere."""
    task: Task = "multi-label"
    """single-label: the logits are for a softmax, else each for a sigmoid."""
    input_seconds: PositiveFloat | None = None
    """Length of the sounds that it was trained on, where that is not the model's own."""


@contextmanager
def local_file(location: str | Path) -> Iterator[Path]:
    """Yields a checkpoint as a file on this machine, for as long as the block lasts.

    A local path is given as it is, a run's folder and one as Hugging Face lays it out give their file of weights; a
    URL's file is copied to a temporary folder, so nothing stale can be used later.

    Raises:
        CheckpointError: there is no such file, or it can't be read.
    """
    if not storage.is_remote(location):
        yield _file_in(storage.local_path(location))
        return
    with ExitStack() as fetched:
        try:
            path = fetched.enter_context(storage.local_copy(_remote_file(str(location))))
        except (OSError, PipelineError) as error:
            raise CheckpointError(f"{location}: can't be fetched ({error})") from error
        yield path


def _remote_file(location: str) -> str:
    """Returns the file that a URL means; a last part without a dot is a folder if there are weights in it."""
    if "." in storage.file_name(location):
        return location
    found = storage.find_files(location, _FILES_IN_A_FOLDER)
    return storage.join_path(location, found[0].name) if found else location


def _file_in(path: Path) -> Path:
    if path.is_dir():
        if (found := next((path / name for name in _FILES_IN_A_FOLDER if (path / name).is_file()), None)) is None:
            raise CheckpointError(
                f"{path}: a folder, not a file of weights, and it holds none of {', '.join(_FILES_IN_A_FOLDER)}"
            )
        return found
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return path


def sha256_of_file(path: Path) -> str:
    """Hash a local file's bytes; the hex digest is what stamps and reports hold."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_whole(path: Path) -> None:
    """Refuse a file that was cut short or is something else, such as a login page, before it counts as weights.

    Raises:
        CheckpointError: it is no whole safetensors file, torch file or pickle.
    """
    with path.open("rb") as stream:
        start = stream.read(9)
    try:
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as container:
                if damaged := container.testzip():
                    raise CheckpointError(f"its entry {damaged} does not match its checksum")
        elif _is_safetensors(start):
            with safe_open(path, framework="numpy"):
                pass
        elif not start.startswith(b"\x80"):  # how torch's older files begin
            raise CheckpointError(f"it begins with {start!r}, as neither torch nor safetensors files do")
    except (zipfile.BadZipFile, SafetensorError) as error:
        raise CheckpointError(f"it is cut short or damaged ({error})") from error


def _is_safetensors(start: bytes) -> bool:
    """Whether a file with these first nine bytes is safetensors: the length of a JSON object, and that object."""
    return start[8:] == b"{"


def load_checkpoint_metadata(path: Path) -> CheckpointMetadata | None:
    """Read what a local file of weights says about itself; None for a file that this project did not write.

    Only the header is read, never the tensors; a file that isn't safetensors is foreign and isn't opened at all.

    Raises:
        CheckpointError: the file is damaged, or its metadata is incomplete.
    """
    with path.open("rb") as stream:
        if not _is_safetensors(stream.read(9)):
            return None
    try:
        with safe_open(path, framework="numpy") as tensors:
            found = tensors.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    if "stage" not in found or "model" not in found:
        return None  # Hugging Face writes {"format": "pt"}
    try:
        return CheckpointMetadata.model_validate(found)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise CheckpointError(
            f"{path}: the metadata in its header is not what this project writes ({wrong})"
        ) from error
