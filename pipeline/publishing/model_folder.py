"""A model as a folder that timm, this project and, where it can be exported, every ONNX runtime loads."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import student
from pipeline.exporting.comparing import compare, onnx_runner
from pipeline.exporting.exported_model import ExportedModel, describe
from pipeline.exporting.onnx_file import OPSET, write_onnx
from pipeline.exporting.sounds import check_sounds
from pipeline.models.loading import open_weights
from pipeline.models.weights import load_checkpoint_metadata
from pipeline.publishing.cards import ONNX_NAME, example_program, model_card
from pipeline.publishing.model_facts import ModelFacts
from pipeline.storage import files as storage
from pipeline.training.checkpoints import save_weights

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = "model.safetensors", "config.json", "README.md"


def write_model_folder(folder: Path, facts: ModelFacts, location: str, *, onnx: bool) -> list[str]:
    """Write a model's files, its card last.

    Args:
        folder: on this machine.
        facts: of the model.
        location: of its weights, as `open_weights` takes them.
        onnx: whether to write the student as an ONNX file, too.

    Returns:
        The files' names.

    Raises:
        PipelineError: something can't be read or written, or the ONNX file differs from the weights.
    """
    files = {
        WEIGHTS_NAME: "the weights",
        CONFIG_NAME: "what timm builds the model by, with its classes' names",
        "classes.csv": "the classes in the order of the outputs",
        "example.py": "tags a sound",
    }
    folder.mkdir(parents=True, exist_ok=True)
    if onnx:
        _write_onnx(folder / ONNX_NAME, facts)
        files[ONNX_NAME] = "waveforms to probabilities, for ONNX Runtime in any language; `pipeline tag` takes it, too"
    _write_weights(folder / WEIGHTS_NAME, facts, location)
    storage.publish_bytes(
        folder / CONFIG_NAME, json.dumps(timm_config(facts), indent=2, ensure_ascii=False).encode() + b"\n"
    )
    storage.publish_bytes(folder / "classes.csv", facts.model.vocabulary.to_csv_bytes())
    storage.publish_bytes(folder / "example.py", example_program(facts).encode())
    storage.publish_bytes(folder / CARD_NAME, model_card(facts, files).encode())
    return [*files, CARD_NAME]


def _write_weights(target: Path, facts: ModelFacts, location: str) -> None:
    with open_weights(location) as weights:
        metadata = load_checkpoint_metadata(weights.path)
        if metadata is not None and metadata.vocabulary is not None:
            with storage.publish(target) as staged:  # byte for byte, so that its hash is the one that reports name
                shutil.copyfile(weights.path, staged)
            return
    vocabulary = facts.model.vocabulary
    own = {
        "stage": facts.stage,
        "model": facts.model.model_name,
        "kwargs": dict(facts.model.options),
        "classes": len(vocabulary),
        "vocabulary_sha256": vocabulary.sha256,
        "vocabulary": vocabulary.to_csv_bytes().decode(),
        "task": facts.model.task,
    }
    save_weights(target, facts.model.network.state_dict(), own)


def _write_onnx(target: Path, facts: ModelFacts) -> None:
    source = storage.file_name(facts.model.source)  # no path of this machine
    model = replace(facts.model, network=student.fuse(facts.network), source=source)
    exported = ExportedModel(model, "probabilities", "inside")
    sounds = check_sounds(None, model.sample_rate_hz)
    metadata = describe(model, exported, licence=facts.licence or None, exporter=f"opset {OPSET}")
    with storage.publish(target) as staged:
        write_onnx(exported, metadata, staged)
        compare(onnx_runner(staged), exported, sounds.waveforms)


def timm_config(facts: ModelFacts) -> dict[str, Any]:
    """Returns config.json: what `timm.create_model` reads, and what it leaves alone."""
    model, network = facts.model, facts.network
    classes = model.vocabulary.classes
    default = dict(getattr(network, "default_cfg", None) or {})
    return {
        "architecture": model.model_name,
        "num_classes": len(classes),
        **({"num_features": network.num_features} if hasattr(network, "num_features") else {}),
        "model_args": dict(facts.model.options),
        "pretrained_cfg": {
            "custom_load": False,
            **{key: default[key] for key in ("first_conv", "classifier") if key in default},
            "input_size": _input_size(facts),
            **({"license": facts.licence.lower()} if facts.licence else {}),
            "label_names": [one.mid for one in classes],
            "label_descriptions": {one.mid: one.name for one in classes},
        },
        "audioset_distill": {
            "sample_rate_hz": model.sample_rate_hz,
            "input_seconds": model.input_seconds,
            "task": model.task,
            "front_end": asdict(network.front_end.config),
            "vocabulary_sha256": model.vocabulary.sha256,
            "weights_sha256": model.sha256,
        },
    }


def _input_size(facts: ModelFacts) -> list[int]:
    """Returns the shape of the images that the network was trained on, (1, mels, frames) for a student."""
    samples = round(facts.model.input_seconds * facts.model.sample_rate_hz)
    with torch.inference_mode():
        shape = list(facts.network.front_end(torch.zeros(1, samples)).shape[1:])
    return shape if len(shape) == 3 else [1, *shape]
