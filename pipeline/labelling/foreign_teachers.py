"""Teachers that this project doesn't know: a user's own module, one that a package offers, or one from the Hub.

Stage 1 asks nothing more of a teacher than `Teacher` says. What it is told about classes is matched by name with the
dataset's, so that a model with another order of classes, or with more of them, teaches the right ones.
"""

import hashlib
import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import CheckpointError, UsageError
from pipeline.labelling.installed_teachers import installed_teachers

_ORDINARY_SECONDS = 10.0

_log = logging.getLogger(__name__)


@runtime_checkable
class Teacher(Protocol):
    """What stage 1 asks of a teacher, besides being a `torch.nn.Module`.

    `class_names`, a sequence of AudioSet ids such as `/m/09x0r` or of display names, is optional: without it the logits
    are taken to follow the dataset's class list.
    """

    front_end: nn.Module
    """(batch, samples) float32 waveforms, -1 to 1 → whatever `forward` takes; runs in float32."""
    sample_rate_hz: int
    """Of the waveforms."""
    input_seconds: float
    """How much of a clip is given; shorter clips are padded with silence. Infinite: each clip as long as it is, with
    others of that length."""

    def forward(self, features: Tensor) -> Tensor:
        """Features → (batch, classes) logits, before the sigmoid."""
        ...


Builder = Callable[..., nn.Module]
"""Called with the checkpoint's location if the command line names one, else with nothing."""


def find_builder(name: str) -> Builder | None:
    """Find the function behind `my_package:build` or an entry point's name; None for a name that is neither.

    Raises:
        UsageError: it is named, but can't be imported.
    """
    path = name if ":" in name else installed_teachers().get(name)
    if path is None:
        return None
    module_name, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--teacher {name}: {error}. Name a function as my_package.module:function; its package has to be "
            "installed, or its folder in PYTHONPATH, on every machine"
        ) from error
    return cast("Builder", found)


def build_teacher(name: str, builder: Builder, checkpoint: str | None) -> nn.Module:
    """Call a builder and see that what it gives is a teacher.

    Raises:
        CheckpointError: the builder refuses the checkpoint.
        UsageError: it gives no teacher.
    """
    try:
        built = builder() if checkpoint is None else builder(checkpoint)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"--teacher {name}: its builder failed: {error}") from error
    if not isinstance(built, nn.Module):
        raise UsageError(f"--teacher {name}: gives a {type(built).__name__}; a teacher is a torch.nn.Module")
    wanted = ("front_end", "sample_rate_hz", "input_seconds")
    if missing := [attribute for attribute in wanted if not hasattr(built, attribute)]:
        raise UsageError(f"--teacher {name}: has no {' and no '.join(missing)}; a teacher has {', '.join(wanted)}")
    return built


class ReorderedTeacher(nn.Module):
    """A teacher whose classes stand in the dataset's order; those that the dataset doesn't have are left out."""

    def __init__(self, network: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        original = cast("Teacher", network)
        self.network = network
        self.front_end = original.front_end
        self.sample_rate_hz = original.sample_rate_hz
        self.input_seconds = original.input_seconds
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features → (batch, classes of the dataset)."""
        return self.network(features)[:, self.get_buffer("order")]


def match_classes(name: str, network: nn.Module, vocabulary: Vocabulary) -> nn.Module:
    """Bring a teacher's classes into a dataset's order, by their ids or display names.

    Raises:
        CheckpointError: the dataset has classes that the teacher doesn't name, or names twice.
    """
    names = getattr(network, "class_names", None)
    if names is None:
        _log.warning("%s does not say which classes it is for; they are taken to be the dataset's, in its order", name)
        return network
    places: dict[str, list[int]] = {}
    for place, spelled in enumerate(names):
        places.setdefault(_plain(spelled), []).append(place)
    found = [places.get(_plain(label.mid)) or places.get(_plain(label.name), []) for label in vocabulary.classes]
    missing = [label.name for label, where in zip(vocabulary.classes, found, strict=True) if not where]
    doubtful = [label.name for label, where in zip(vocabulary.classes, found, strict=True) if len(where) > 1]
    for wrong, what in ((missing, "knows no class called"), (doubtful, "has several classes called")):
        if wrong:
            shown = ", ".join(repr(label) for label in wrong[:4]) + (", …" if len(wrong) > 4 else "")
            raise CheckpointError(
                f"--teacher {name}: {what} {shown} ({len(wrong)} of the dataset's {len(vocabulary)}); it knows "
                f"{', '.join(map(str, list(names)[:4]))}, … Choose a teacher of the dataset's classes, or rename them "
                "in its classes.csv."
            )
    order = [where[0] for where in found]
    return network if order == list(range(len(names))) else ReorderedTeacher(network, order)


def _plain(name: str) -> str:
    return " ".join(str(name).casefold().split())


@torch.inference_mode()
def check_output(name: str, network: nn.Module, classes: int) -> None:
    """Run a teacher on one silent clip, so that a wrong one is known before a run begins.

    Raises:
        CheckpointError: it gives something else than a logit for each class.
    """
    original = cast("Teacher", network)
    samples = round(min(original.input_seconds, _ORDINARY_SECONDS) * original.sample_rate_hz)
    try:
        logits = network(original.front_end(torch.zeros(1, samples)))  # (1, classes)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"--teacher {name}: fails on a silent clip of {samples} samples: {error}") from error
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, classes):
        found = shape or type(logits).__name__
        raise CheckpointError(f"--teacher {name}: gives {found} for one clip, not logits of shape (1, {classes})")
    if not logits.isfinite().all():
        raise CheckpointError(f"--teacher {name}: gives logits that are not finite for a silent clip")
    if logits.min() >= 0 and logits.max() <= 1:
        _log.warning("%s gives values from 0 to 1, like probabilities; a teacher has to give logits", name)


def describe_front_end(front_end: nn.Module) -> str:
    """Returns how waveforms become features, in the same words on every machine."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(front_end).split()))


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash a state dict: names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
