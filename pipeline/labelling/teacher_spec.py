"""A teacher as the command line names it, and its stamp in the store."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

import teacher
from pipeline.dataset.manifest import Manifest
from pipeline.errors import CheckpointError, UsageError
from pipeline.labelling.foreign_teachers import (
    Teacher,
    build_teacher,
    check_output,
    describe_front_end,
    find_builder,
    match_classes,
    sha256_of_tensors,
)
from pipeline.labelling.hugging_face_teacher import load as load_from_folder
from pipeline.labelling.hugging_face_teacher import locate
from pipeline.logits.stamp import StoreStamp, TeacherStamp
from pipeline.models.device import Precision
from pipeline.models.loading import LoadedModel, check_finite, is_registered, load_model
from pipeline.models.weights import sha256_of_file
from pipeline.models.weights_cache import is_offline


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSpec:
    """One `--teacher NAME[=CHECKPOINT][@WEIGHT]`."""

    name: str
    """A registered transformer, the entry point of an installed package, `my_package:build`, or `hf:ORG/NAME`."""
    checkpoint: str | None = None
    """A file, folder or URL; None is what was released under the name, or what the builder takes by itself."""
    weight: float = 1.0
    """Above 0; only the ratios between teachers count."""
    offline: bool = False
    """Don't fetch released weights. It travels with the spec, since other machines have another environment."""
    runs_code: bool = False
    """Run the code that comes with a model of the Hub."""

    @classmethod
    def parse(cls, text: str) -> "TeacherSpec":
        """Read `NAME[=CHECKPOINT][@WEIGHT]`. A path may hold `=` and `@`; only a number after the last `@` is a weight.

        Raises:
            UsageError: the text is not of that form.
        """
        rest, at, last = text.rpartition("@")
        weight = _number(last) if at else None
        if weight is None:
            rest, weight = text, 1.0
        name, equals, checkpoint = rest.partition("=")
        if not name or "@" in name or (equals and not checkpoint):
            raise UsageError(
                f"--teacher {text}: write NAME for its released weights, or NAME=CHECKPOINT; @WEIGHT may follow"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"--teacher {text}: the weight is {weight}; choose a number above 0")
        return cls(name=name, checkpoint=checkpoint or None, weight=weight, offline=is_offline())

    def load(self, manifest: Manifest, device: str = "cpu") -> LoadedModel:
        """Build the teacher with its weights, in evaluation mode, its classes in the dataset's order.

        Raises:
            CheckpointError: the file is missing, damaged, or doesn't fit the model or the classes.
            UsageError: no such teacher is registered.
        """
        if self.name.startswith(_HUB):
            return self._load_from_hub(manifest, device)
        if is_registered(teacher, self.name):
            return self._load_registered(manifest, device)
        if builder := find_builder(self.name):
            network = build_teacher(self.name, builder, self.checkpoint)
            source = self.checkpoint or self.name
            return self._as_loaded(network, manifest, device, source, sha256_of_tensors(network.state_dict()))
        raise UsageError(f"--teacher {self.name}: {_why_unknown(self.name)}")

    def _load_registered(self, manifest: Manifest, device: str) -> LoadedModel:
        name = teacher.model_card(self.name).name
        loaded = load_model(self.checkpoint, manifest, model=self.name, device=device, offline=self.offline)
        if loaded.model_name != name:
            found = loaded.model_name
            raise CheckpointError(f"{loaded.source}: holds the weights of {found}, not of {name}. Name it {found}.")
        return loaded

    def _load_from_hub(self, manifest: Manifest, device: str) -> LoadedModel:
        repo_id = self.name.removeprefix(_HUB)
        weights = locate(repo_id, self.checkpoint, offline=self.offline, trusted=self.runs_code)
        network = load_from_folder(weights.parent, trusted=repo_id if self.runs_code else None)
        return self._as_loaded(network, manifest, device, str(weights), sha256_of_file(weights))

    def _as_loaded(self, network: nn.Module, manifest: Manifest, device: str, source: str, sha256: str) -> LoadedModel:
        """Check that a teacher from elsewhere fits the dataset, and describe it as if it were our own."""
        network = match_classes(self.name, network.eval(), manifest.vocabulary)
        check_finite(dict(network.named_parameters()), source)  # a buffer may be a mask of infinities
        check_output(self.name, network, len(manifest.vocabulary))
        its = cast("Teacher", network)
        return LoadedModel(
            network=network.to(device).eval(),
            name=self.name,
            source=source,
            sha256=sha256,
            sample_rate_hz=its.sample_rate_hz,
            input_seconds=its.input_seconds,
            vocabulary=manifest.vocabulary,
            model_name=self.name,
            front_end=describe_front_end(its.front_end),
            clip_lengths="own; as its front end takes them" if math.isinf(its.input_seconds) else None,
        )


_HUB = "hf:"
"""Begins the name of a model on the Hugging Face Hub."""


def parse_teachers(texts: Sequence[str], trust_remote_code: Sequence[str] = ()) -> tuple[TeacherSpec, ...]:
    """Read every `--teacher`; of the Hub's, those named in `trust_remote_code` may run the code that they bring along.

    Raises:
        UsageError: a text is not of the form of a teacher, or a name to be trusted is no teacher's.
    """
    specs = tuple(TeacherSpec.parse(text) for text in texts)
    trusted = {f"{_HUB}{name.removeprefix(_HUB)}" for name in trust_remote_code}
    if strange := sorted(trusted - {spec.name for spec in specs}):
        raise UsageError(f"--trust-remote-code {strange[0].removeprefix(_HUB)}: no --teacher is called {strange[0]}")
    return tuple(replace(spec, runs_code=spec.name in trusted) for spec in specs)


def _why_unknown(name: str) -> str:
    try:
        teacher.model_card(name)
    except ValueError as error:
        return str(error)
    return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def stamp_teachers(specs: Sequence[TeacherSpec], manifest: Manifest, precision: Precision) -> StoreStamp:
    """Returns the teachers' stamps. Each is loaded once, one at a time, so that a wrong one is known early.

    Raises:
        CheckpointError: a teacher's file is missing, damaged, or doesn't fit the model or the classes.
        UsageError: no such teacher is registered.
    """
    return StoreStamp(
        teachers=tuple(_stamp(spec, spec.load(manifest)) for spec in specs),
        vocabulary_sha256=manifest.vocabulary.sha256,
        classes=len(manifest.vocabulary),
        precision=precision,
    )


def _stamp(spec: TeacherSpec, loaded: LoadedModel) -> TeacherStamp:
    padded = loaded.clip_lengths is None
    return TeacherStamp(
        name=loaded.model_name,
        weight=spec.weight,
        sha256=loaded.sha256,
        front_end=f"{loaded.front_end}, {loaded.input_seconds:g} s" if padded else loaded.front_end,
        clip_lengths=loaded.clip_lengths,
    )
