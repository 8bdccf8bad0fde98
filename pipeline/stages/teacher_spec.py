"""A teacher as the command line names it, and what the store's stamp says about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import teacher
from pipeline.errors import CheckpointError, UsageError
from pipeline.manifest import Manifest
from pipeline.predictions import Precision
from pipeline.stages.model_loading import LoadedModel, load_model
from pipeline.store_stamp import StoreStamp, TeacherStamp
from pipeline.weights_cache import is_offline


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSpec:
    """One `--teacher NAME[=CHECKPOINT][@WEIGHT]`."""

    name: str
    """A registered transformer."""
    checkpoint: str | None = None
    """A file, folder or URL; None is what was released under the name."""
    weight: float = 1.0
    """Above 0; only the ratios between teachers count."""
    offline: bool = False
    """Don't fetch released weights. It travels with the spec, since other machines have another environment."""

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
        """Build the teacher with its weights, ready to be asked about the dataset's classes.

        Raises:
            CheckpointError: the file is missing, damaged, or doesn't fit the model or the classes.
            UsageError: no such teacher is registered.
        """
        try:
            name = teacher.model_card(self.name).name
        except ValueError as error:
            raise UsageError(f"--teacher {self.name}: {error}") from error
        loaded = load_model(self.checkpoint, manifest, model=self.name, device=device, offline=self.offline)
        found = cast("teacher.AudioTransformer", loaded.network).model_name
        if found != name:
            raise CheckpointError(f"{loaded.source}: holds the weights of {found}, not of {name}. Name it {found}.")
        return loaded


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def stamp_teachers(specs: Sequence[TeacherSpec], manifest: Manifest, precision: Precision) -> StoreStamp:
    """Say what the teachers' logits will be. Each is loaded once, one at a time, so that a wrong one is known early.

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
    network = cast("teacher.AudioTransformer", loaded.network)
    return TeacherStamp(
        name=network.model_name,
        weight=spec.weight,
        sha256=loaded.sha256,
        front_end=f"{network.front_end.config}, {network.input_seconds:g} s",
    )
