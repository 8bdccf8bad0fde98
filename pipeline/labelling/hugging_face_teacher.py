"""A Hugging Face `AutoModelForAudioClassification` as a teacher: its feature extractor becomes the front end."""

import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import CheckpointError, UsageError
from pipeline.models.weights_cache import fetch

_SHORTEST_SECONDS = 0.1
"""Shorter clips get silence behind them: less than this gives some models no frame at all."""

_SETTINGS_FILES = ("config.json", "preprocessor_config.json")
_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


class ExtractorFrontEnd(nn.Module):
    """Feature extractor of a model: (batch, samples) → its inputs. It computes on the CPU, as extractors do.

    The clips of a batch are equally long. Whether they are padded or cut is the extractor's affair.
    """

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, waveforms: Tensor) -> dict[str, Tensor]:
        """Extract features, by the names of the model's inputs; they come back on the waveforms' device."""
        rate = self.extractor.sampling_rate
        silence = max(0, round(_SHORTEST_SECONDS * rate) - waveforms.shape[1])
        clips = list(F.pad(waveforms.float(), (0, silence)).cpu().numpy())
        found = self.extractor(clips, sampling_rate=rate, return_tensors="pt")
        return {name: values.to(waveforms.device) for name, values in found.items()}

    def __str__(self) -> str:
        settings = hashlib.sha256(self.extractor.to_json_string().encode()).hexdigest()
        return f"{type(self.extractor).__name__}({self.extractor.sampling_rate} Hz, settings {settings[:12]})"


class HuggingFaceTeacher(nn.Module):
    """An audio classifier of the package transformers, behind the interface that stage 1 asks for."""

    def __init__(self, model: nn.Module, extractor: Any) -> None:
        super().__init__()
        self.model = model
        self.front_end = ExtractorFrontEnd(extractor)
        self.sample_rate_hz = int(extractor.sampling_rate)
        self.input_seconds = math.inf
        labels: dict[int, str] = model.config.id2label  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        self.class_names = tuple(labels[index] for index in sorted(labels))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features → (batch, classes) logits."""
        return self.model(**features).logits


def locate(repo_id: str, folder: str | None, *, offline: bool, trusted: bool = False) -> Path:
    """Returns the weights' file of a model; its settings lie beside it.

    Args:
        repo_id: ORG/NAME on the Hugging Face Hub.
        folder: where a local copy is; None fetches from the Hub, once.
        offline: take what is in the Hub's cache alone.
        trusted: also fetch the code that the repository brings along.

    Raises:
        CheckpointError: a file is not to be had.
    """
    if folder is not None:
        if missing := [name for name in _SETTINGS_FILES if not (Path(folder) / name).is_file()]:
            raise CheckpointError(
                f"{folder}: holds no {' and no '.join(missing)}; give a folder made by save_pretrained"
            )
        weights = next((Path(folder) / name for name in _WEIGHTS_FILES if (Path(folder) / name).is_file()), None)
        if weights is None:
            raise CheckpointError(f"{folder}: holds none of {', '.join(_WEIGHTS_FILES)}")
        return weights
    base = f"https://huggingface.co/{repo_id}/resolve/main/"
    settings = [fetch(base + name, offline=offline).path for name in _SETTINGS_FILES]
    waiting = _code_of(settings) if trusted else []
    for name in waiting:  # grows by what each file imports from its neighbours
        imported = _NEIGHBOUR.findall(fetch(base + name, offline=offline).path.read_text(encoding="utf-8"))
        waiting += sorted({f"{other}.py" for other in imported} - set(waiting))
    try:
        return fetch(base + _WEIGHTS_FILES[0], offline=offline).path
    except CheckpointError as error:
        try:
            return fetch(base + _WEIGHTS_FILES[1], offline=offline).path
        except CheckpointError:
            raise error from None


_NEIGHBOUR = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)
"""How one file of a repository's code imports another."""


def _code_of(settings: Iterable[Path]) -> list[str]:
    """Returns the files of code that settings name, which is what transformers would run."""
    classes: list[str] = []
    for path in settings:
        for found in json.loads(path.read_text(encoding="utf-8")).get("auto_map", {}).values():
            classes += [name for name in ([found] if isinstance(found, str) else found) if name]
    return sorted({f"{name.rpartition('--')[2].partition('.')[0]}.py" for name in classes})


def load(folder: Path, *, trusted: str | None = None) -> HuggingFaceTeacher:
    """Build a model from a folder that holds its settings and weights.

    Args:
        folder: of the settings and weights.
        trusted: the repository whose code is run, where its model is of no class that transformers has; None runs none.

    Raises:
        UsageError: the package transformers is not installed, or the model needs code that lies in the folder.
        CheckpointError: it is no audio classifier, or its files are damaged.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("teachers of the form hf:ORG/NAME need another package: pip install transformers") from error
    runs_code = trusted is not None  # said in either case: where nothing is said, transformers asks at the terminal
    try:
        transformers.utils.logging.disable_progress_bar()
        extractor = transformers.AutoFeatureExtractor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=runs_code
        )
        model, loading = transformers.AutoModelForAudioClassification.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=runs_code,
        )
    except Exception as error:  # transformers raises errors of many kinds
        code = _code_of(path for name in _SETTINGS_FILES if (path := Path(folder) / name).is_file())
        if code and not runs_code:
            raise UsageError(
                f"{folder}: its model is of no class that transformers has: {' and '.join(code)}, which came with it, "
                "would have to be run. A registered teacher needs no such code (`pipeline teachers`); if you have read "
                "it and trust it, --trust-remote-code ORG/NAME runs it"
            ) from error
        raise CheckpointError(f"{folder}: holds no audio classifier that transformers can load: {error}") from error
    if drawn := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise CheckpointError(
            f"{folder}: its weights lack {', '.join(drawn[:4])}: it was not trained to tag sounds; fine-tune it first"
        )
    return HuggingFaceTeacher(model, extractor)
