"""A checkpoint, ours or one that somebody released → a student or teacher for a dataset's classes."""

import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import nn

import student
import teacher
from pipeline.errors import CheckpointError, UsageError
from pipeline.manifest import Manifest
from pipeline.vocabulary import Vocabulary, audioset_vocabulary, parse_vocabulary
from pipeline.weights import CheckpointMetadata, load_checkpoint_metadata, local_file, sha256_of_file
from student.state_dicts import read_checkpoint

Tagger = student.Tagger | teacher.AudioTransformer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, and where it came from."""

    network: nn.Module
    name: str
    """What tables call it: its run's folder, or its file's name."""
    source: str
    """The checkpoint's location."""
    sha256: str
    """Of the checkpoint's bytes."""

    sample_rate_hz: int
    """Of the waveforms that its front end takes."""
    input_seconds: float
    """How long they are."""
    vocabulary: Vocabulary
    """What its logits are about."""


def load_model(
    location: str, manifest: Manifest | None = None, *, model: str | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Build the model that a checkpoint holds.

    Args:
        location: a file, or a URL of one.
        manifest: of the dataset whose classes the logits have to be for; without one, any classes will do.
        model: the registered name of a student or teacher, for a file that doesn't say what it is.
        device: where the model goes.

    Raises:
        CheckpointError: the file is missing, damaged, doesn't fit its model, or was made for other classes.
        UsageError: neither the file nor `model` says what it is, or nothing is registered under that name.
    """
    with local_file(location) as path:
        metadata = load_checkpoint_metadata(path)
        if metadata is None and model is None:
            raise UsageError(f"{location}: does not say which model it holds. Name it with --model, such as mn10_as.")
        vocabulary = _own_vocabulary(metadata, location) if manifest is None else manifest.vocabulary
        if metadata is not None and metadata.vocabulary_sha256 != vocabulary.sha256:
            owner = "AudioSet" if manifest is None else manifest.location
            raise CheckpointError(
                f"{location}: was trained for {metadata.classes} classes with hash {metadata.vocabulary_sha256[:12]}, "
                f"but {owner} has {len(vocabulary)} with hash {vocabulary.sha256[:12]}. Choose a dataset with the "
                "checkpoint's classes."
            )
        try:
            network = _build_foreign(path, str(model), vocabulary) if metadata is None else _build_own(path, metadata)
        except (ValueError, TypeError) as error:  # TypeError: a keyword that the model doesn't take
            raise CheckpointError(f"{location}: {error}") from error
        digest = sha256_of_file(path)
    return LoadedModel(
        network=network.to(device).eval(),
        name=_display_name(location),
        source=location,
        sha256=digest,
        sample_rate_hz=network.sample_rate_hz,
        input_seconds=network.input_seconds,
        vocabulary=vocabulary,
    )


def _own_vocabulary(metadata: CheckpointMetadata | None, location: str) -> Vocabulary:
    """Give the classes that a file names, or AudioSet's where it names none."""
    if metadata is None or metadata.vocabulary is None:
        return audioset_vocabulary()
    return parse_vocabulary(metadata.vocabulary.encode(), f"{location} (its class list)")


def _build_own(path: Path, metadata: CheckpointMetadata) -> Tagger:
    package = student if metadata.stage == "student" else teacher
    return package.create_model(metadata.model, path, **{**metadata.kwargs, "num_classes": metadata.classes})


def _build_foreign(path: Path, name: str, vocabulary: Vocabulary) -> Tagger:
    """Build a released model; its classes can only be counted, because its file does not name them.

    Raises:
        ValueError: the file does not fit the model, or has another number of classes.
    """
    classes = len(vocabulary)
    if _is_registered(student, name):
        tensors = read_checkpoint(path)
        network = student.create_model(name, tensors, num_classes=classes)
        # A last layer of another size would stay fresh: right for fine-tuning, noise for an evaluation.
        fits = all(tensors[key].shape == tensor.shape for key, tensor in network.state_dict().items() if key in tensors)
    elif _is_registered(teacher, name):
        network = teacher.create_model(name, path)
        fits = network.num_classes == classes
    else:
        raise UsageError(f"--model {name}: no student or teacher is called that; choose mn01 to mn40, mn10_as, …")
    if not fits:
        raise ValueError(f"is not for {classes} classes; choose a dataset with the checkpoint's classes")
    if vocabulary.sha256 != audioset_vocabulary().sha256:
        _log.warning("%s does not say which classes it is for; they are taken to be the dataset's", path.name)
    return network


def _is_registered(package: object, name: str) -> bool:
    try:
        package.model_card(name)  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError:
        return False
    return True


def _display_name(location: str) -> str:
    """Name a run's weights after the run, any other file after itself."""
    path = PurePosixPath(location)
    return path.parent.name if path.stem in ("best", "last") and path.parent.name else path.stem
