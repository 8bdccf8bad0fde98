"""A checkpoint, ours or one that somebody released → a student or teacher for a dataset's classes."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

import student
from pipeline.dataset.vocabulary import Vocabulary, audioset_vocabulary, parse_vocabulary
from pipeline.errors import CheckpointError, UsageError
from pipeline.models.weights import (
    CheckpointMetadata,
    Task,
    check_whole,
    load_checkpoint_metadata,
    local_file,
    sha256_of_file,
)
from pipeline.models.weights_cache import fetch
from pipeline.redaction import redact
from pipeline.runtime.memory import keep_freed_memory
from pipeline.storage import files as storage
from student.state_dicts import read_checkpoint

if TYPE_CHECKING:
    import teacher
    from pipeline.dataset.manifest import Manifest

    Tagger = student.Tagger | teacher.AudioTransformer
Built = TypeVar("Built", bound=nn.Module, covariant=True)


class _Package(Protocol[Built]):
    """What the packages `student` and `teacher` have in common."""

    @property
    def model_card(self) -> Callable[[str], Any]: ...

    @property
    def model_names(self) -> Callable[[], Sequence[str]]: ...

    @property
    def released_weights(self) -> Callable[[Any], str]: ...

    @property
    def create_model(self) -> Callable[..., Built]: ...


def _packages() -> "Iterator[_Package[nn.Module]]":
    """Yields `student`, then `teacher`: that imports timm, which takes seconds that a student need not wait for."""
    yield student
    import teacher

    yield teacher


_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, and where it came from."""

    network: nn.Module
    """In evaluation mode; a student is fused (`student.fuse`) unless it was asked for as it is: not one to save or to
    train."""
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
    model_name: str
    """What stamps call it: the registered name, or where it comes from."""
    front_end: str
    """How waveforms become features."""
    clip_lengths: str | None = None
    """What stage 1 makes of clips' own lengths; None where all are padded or cut to `input_seconds`."""
    task: Task = "multi-label"
    """What its logits are for: a sigmoid each, or one softmax."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The further keywords of `create_model` that it was built with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A file of weights on this machine."""

    path: Path
    sha256: str
    released_as: str | None = None
    """The registered name whose released weights these are; None for a file that somebody gave."""
    source: str
    """The file, URL or folder that it came from."""


@contextmanager
def open_weights(location: str, *, offline: bool | None = None) -> Iterator[Weights]:
    """Yields a checkpoint as a file on this machine, for as long as the block lasts.

    Args:
        location: a file, a run's folder or one as Hugging Face lays it out, a URL, or the registered name of a model
            with released weights, which are fetched the first time. A file or folder of that name wins.
        offline: don't fetch what was released; None asks the environment.

    Raises:
        CheckpointError: there is no such file and no such release, it can't be fetched or read, or it is no checkpoint
            but what `pipeline export` makes of one.
    """
    if storage.file_name(location).lower().endswith(_EXPORTED):
        raise CheckpointError(
            f"{location}: an exported program, which is run and not loaded: `pipeline tag` takes .onnx files, and this "
            "takes the checkpoint that it was made from"
        )
    if storage.is_remote(location) or storage.local_path(location).exists() or not _NAME.fullmatch(location):
        with local_file(location) as path:
            yield Weights(path=path, sha256=sha256_of_file(path), source=location)
        return
    yield fetch_released(location, offline=offline)


def fetch_released(name: str, *, offline: bool | None = None) -> Weights:
    """Returns the weights that were released under a registered name; `open_weights` describes the rest."""
    url = _released_weights(name)
    file = fetch(url, offline=offline)
    return Weights(path=file.path, sha256=file.sha256, released_as=name, source=url)


_EXPORTED = (".onnx", ".pt2")
_NAME = re.compile(r"\w+(\(\d\))?")
"""What a registered name looks like, such as mn40_as(2); paths of files have dots or slashes in them."""


def _released_weights(name: str) -> str:
    for package in _packages():
        if is_registered(package, name):
            try:
                return package.released_weights(package.model_card(name))
            except ValueError as error:
                raise CheckpointError(f"{name}: no such file, and {error}") from error
    if name in student.IMAGENET_WEIGHTS:  # timm's and torchvision's, to train from
        return student.IMAGENET_WEIGHTS[name]
    names = [name for package in _packages() for name in package.model_names()]
    close = ", ".join(get_close_matches(name, names, n=3, cutoff=0.5)) or "mn10_as, passt_s, …"
    raise CheckpointError(f"{name}: no such file, and no model is called that; did you mean {close}?")


def load_model(
    location: str | None,
    manifest: "Manifest | None" = None,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    classes: Vocabulary | None = None,
    device: torch.device | str = "cpu",
    offline: bool | None = None,
    fused: bool = True,
) -> LoadedModel:
    """Build the model that a checkpoint holds.

    Args:
        location: a file, a folder, a URL, or the registered name of a model with released weights; see `open_weights`.
            `NAME=LOCATION` names the model, as `model` does. None is what was released as `model`.
        manifest: of the dataset whose classes the logits have to be for; without one, any classes will do.
        model: the registered name of a student or teacher, for a file that doesn't say what it is.
        options: further keywords of that model, such as strides; files that say how they are built don't need them.
        classes: what the logits of a file are for that doesn't say it; None is the dataset's, or AudioSet's.
        device: where the model goes.
        offline: don't fetch what was released; None asks the environment.
        fused: whether a student's batch norms become part of its convolutions: faster, but no model to save.

    Raises:
        CheckpointError: the file is missing, damaged, doesn't fit its model, or was made for other classes.
        UsageError: neither the file nor `model` says what it is, or nothing is registered under that name.
    """
    released = nullcontext(fetch_released(str(model), offline=offline)) if location is None else None
    named, location = named_checkpoint(location or str(model))
    with released or open_weights(location, offline=offline) as weights:
        path, model = weights.path, named or model or weights.released_as
        metadata = load_checkpoint_metadata(path)
        if metadata is None and model is None:
            _check_weights(path, location)
            raise UsageError(f"{location}: does not say which model it holds. Name it with --model, such as mn10_as.")
        if metadata is not None and named is not None and _registered_name(named) != metadata.model:
            raise CheckpointError(
                f"{location}: holds the weights of {metadata.model}, not of {named}. Leave {named}= out."
            )
        vocabulary = _vocabulary(location, metadata, manifest, classes)
        try:
            if metadata is None:
                network = _build_foreign(weights, str(model), vocabulary, options or {})
            else:
                network = _build_own(path, metadata)
        except (ValueError, TypeError) as error:  # TypeError: a keyword that the model doesn't take
            raise CheckpointError(f"{location}: {error}") from error
        if metadata is None and classes is None and vocabulary.sha256 != audioset_vocabulary().sha256:
            _log.warning("%s does not say which classes it is for; they are taken to be the dataset's", path.name)
        if metadata is not None and options:
            _log.warning("%s says itself how it is built; --model-options are for files that don't", path)
    check_finite(network.state_dict(), location)
    network = network.to(device).eval()
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    return LoadedModel(
        network=student.fuse_in_place(network) if fused and isinstance(network, student.Tagger) else network,
        name=_display_name(location),
        source=redact(weights.source),
        sha256=weights.sha256,
        sample_rate_hz=network.sample_rate_hz,
        input_seconds=network.input_seconds,
        vocabulary=vocabulary,
        model_name=network.model_name,
        front_end=str(network.front_end.config),
        clip_lengths=getattr(network.front_end, "own_length", None) or None,
        task="multi-label" if metadata is None else metadata.task,
        options=options or {} if metadata is None else metadata.kwargs,
    )


def _check_weights(path: Path, location: str) -> None:
    try:
        check_whole(path)
    except CheckpointError as error:
        raise CheckpointError(f"{location}: no file of weights: {error}") from error


@torch.no_grad()
def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse weights that make nothing but nonsense of every sound.

    Args:
        tensors: name → weights, of a model that was loaded.
        source: where they came from, for messages.

    Raises:
        CheckpointError: some are infinite or no numbers.
    """
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    # A sum is finite only where all that it sums is, and takes a fraction of the time of asking each number.
    if math.isfinite(sum(tensor.sum(dtype=torch.float32) for tensor in floating.values())):
        return
    bad = [key for key, tensor in floating.items() if not bool(tensor.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise CheckpointError(
            f"{source}: {bad[0]}{more} hold numbers that are not finite: the file is damaged, or the training that "
            "wrote it had diverged. Take a checkpoint from before"
        )


def check_registered(package: _Package[nn.Module], name: str) -> None:
    """Check that a model can be built.

    Raises:
        UsageError: nothing is registered under the name.
    """
    try:
        package.model_card(name)
    except ValueError as error:
        raise UsageError(f"--model {name}: {error}") from error


def build_for_training(
    package: _Package[Built], name: str, checkpoint: str | None, *, seed: int, **settings: Any
) -> Built:
    """Build the model that a training command starts from; weights that no checkpoint gives are drawn from the seed.

    Args:
        package: `student` or `teacher`.
        name: registered there.
        checkpoint: a file, a URL, or a released name; None starts afresh.
        seed: the run's.
        settings: further keywords of the package's `create_model`.

    Raises:
        UsageError: nothing is registered under the name, or a setting doesn't fit the model.
        CheckpointError: the checkpoint doesn't fit, or can't be had.
    """
    check_registered(package, name)
    torch.manual_seed(seed)
    try:
        if checkpoint is None:
            return package.create_model(name, **settings)
        with open_weights(checkpoint) as weights:
            model = package.create_model(name, weights.path, **settings)
            check_finite(model.state_dict(), checkpoint)
            return model
    except (ValueError, TypeError) as error:  # TypeError: a keyword that the model doesn't take
        kind = UsageError if checkpoint is None else CheckpointError
        raise kind(f"--model {name}: {error}") from error


def named_checkpoint(text: str) -> tuple[str | None, str]:
    """Returns what `NAME=FILE` says, the model's name and the file; (None, text) for a file or URL alone.

    Raises:
        UsageError: the name is no model's, although the file is there.
    """
    name, _, file = text.partition("=")
    if not file or not _NAME.fullmatch(name) or (not storage.is_remote(text) and storage.local_path(text).exists()):
        return None, text
    if _registered_name(name) is not None:
        return name, file
    if storage.is_remote(file) or storage.local_path(file).exists():
        raise UsageError(
            f"--checkpoint {text}: no student or teacher is called {name}; choose mn01 to mn40, mn10_as, …"
        )
    return None, text


def _registered_name(name: str) -> str | None:
    """Returns the name that a name or alias stands for; None where nothing is registered."""
    return next((package.model_card(name).name for package in _packages() if is_registered(package, name)), None)


def _vocabulary(
    location: str, metadata: CheckpointMetadata | None, manifest: "Manifest | None", given: Vocabulary | None
) -> Vocabulary:
    """Returns the classes that a checkpoint's logits are for.

    Raises:
        UsageError: the given list is not the dataset's.
        CheckpointError: the file says that it was made for others.
    """
    if manifest is not None and given is not None and manifest.vocabulary.sha256 != given.sha256:
        raise UsageError(
            f"--classes: has {len(given)} classes with hash {given.sha256[:12]}, but {manifest.location} has "
            f"{len(manifest.vocabulary)} with hash {manifest.vocabulary.sha256[:12]}. Leave --classes out, or choose a "
            "dataset with the checkpoint's classes."
        )
    owner, vocabulary = ("AudioSet", None) if manifest is None else (manifest.location, manifest.vocabulary)
    owner, vocabulary = (owner, vocabulary) if given is None else ("--classes", given)
    if vocabulary is None:
        vocabulary = _own_vocabulary(metadata, location)
    if metadata is not None and metadata.vocabulary_sha256 != vocabulary.sha256:
        raise CheckpointError(
            f"{location}: was trained for {metadata.classes} classes with hash {metadata.vocabulary_sha256[:12]}, "
            f"but {owner} has {len(vocabulary)} with hash {vocabulary.sha256[:12]}. Give the checkpoint's "
            "class list, or choose a dataset with its classes."
        )
    return vocabulary


def _own_vocabulary(metadata: CheckpointMetadata | None, location: str) -> Vocabulary:
    """Returns the classes that a file names, or AudioSet's where it names none."""
    if metadata is None or metadata.vocabulary is None:
        return audioset_vocabulary()
    return parse_vocabulary(metadata.vocabulary.encode(), f"{location} (its class list)")


def _build_own(path: Path, metadata: CheckpointMetadata) -> "Tagger":
    create_model: Callable[..., Tagger] = student.create_model
    if metadata.stage == "teacher":
        import teacher

        create_model = teacher.create_model
    model = create_model(metadata.model, path, **{**metadata.kwargs, "num_classes": metadata.classes})
    if metadata.input_seconds is not None and isinstance(model, student.Tagger):
        model.input_seconds = metadata.input_seconds
    return model


def _build_foreign(weights: Weights, name: str, vocabulary: Vocabulary, options: Mapping[str, Any]) -> "Tagger":
    """Build a model of another project; its classes can only be counted, because its file does not name them.

    Raises:
        ValueError: the file does not fit the model, or has another number of classes.
    """
    path, classes = weights.path, len(vocabulary)
    if is_registered(student, name):
        if weights.released_as is None:
            _say_what_the_file_leaves_open(path, name, options)
        tensors = read_checkpoint(path)
        network = student.create_model(name, tensors, num_classes=classes, **options)
        # A last layer of another size would stay fresh: right for fine-tuning, noise for an evaluation.
        fits = all(tensors[key].shape == tensor.shape for key, tensor in network.state_dict().items() if key in tensors)
    else:
        import teacher

        if not is_registered(teacher, name):
            raise UsageError(f"--model {name}: no student or teacher is called that; choose mn01 to mn40, mn10_as, …")
        network = teacher.create_model(name, path, **options)
        fits = network.num_classes == classes
    if not fits:
        raise ValueError(f"is not for {classes} classes; name its own with --classes, or choose a dataset with them")
    return network


def _say_what_the_file_leaves_open(path: Path, name: str, options: Mapping[str, Any]) -> None:
    """Warn that a student's file holds nothing of its strides or its front end, which are then the name's.

    Raises:
        ValueError: it was released as another model, whose weights have the same shapes.
    """
    taken = student.untold_settings(name, **options)
    released = student.card_of_file(path.name)
    if released is not None and not options:
        if student.untold_settings(released.name) != taken:
            raise ValueError(f"was released as {released.name}, which fits {name} but computes something else")
        return
    given = {"front_end" if key in student.FRONT_END_KEYWORDS else key for key in options}
    told = ", ".join(f"{key} {value}" for key, value in taken.items() if key not in given)
    if told:
        _log.warning(
            "%s: holds no trace of what follows, which is taken as %s has it: %s. Set it with --model-options",
            path,
            name,
            told,
        )


def is_registered(package: object, name: str) -> bool:
    """Whether `student` or `teacher` knows a name or alias."""
    try:
        package.model_card(name)  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError:
        return False
    return True


def _display_name(location: str) -> str:
    """Returns a run's name for its weights, a file's own for any other."""
    path = PurePosixPath(location.partition("?")[0]) if storage.is_remote(location) else storage.local_path(location)
    if isinstance(path, Path) and path.is_dir():
        return path.resolve().name
    return path.parent.name if path.stem in ("best", "last") and path.parent.name else path.stem
