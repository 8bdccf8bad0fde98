"""The README.md that the Hub shows: of a model, a logit store or a dataset."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.publishing.model_facts import DataFacts, ModelFacts, TeacherFacts

ONNX_NAME = "model.onnx"
_METRICS = {"mAP": "mAP", "roc_auc": "ROC AUC", "d_prime": "d′", "accuracy": "accuracy"}
_NO_SPDX = "other"
"""What the Hub calls a licence that it has no name for."""
_HUB_LICENCES = frozenset(
    {"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0"}
    | {"cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "openrail", "unlicense"}
)


def model_card(facts: ModelFacts, files: Mapping[str, str]) -> str:
    """Returns a model's card: its front matter with a model-index, then text for people.

    Args:
        facts: what is known of it.
        files: what lies beside the card, name → a few words.
    """
    metadata = ModelCardData(
        library_name="timm",
        pipeline_tag="audio-classification",
        tags=["audio-tagging", "timm", *(["distillation"] if facts.teachers else [])],
        **({} if facts.evaluation is None else {"model_name": facts.name, "eval_results": _results(facts)}),
        **_licence(facts.licence),
    )
    model, front_end = facts.model, facts.network.front_end.config
    number = f"{facts.parameters / 1e6:.2f} M parameters"
    macs = "" if facts.macs is None else f", {facts.macs / 1e9:.2f} G multiply-accumulates a clip"
    sections = [
        f"# {_text(facts.name)}",
        f"`{model.model_name}`, a {_kind(facts)} that tags sounds: {number}{macs}. It takes mono waveforms at "
        f"{model.sample_rate_hz:,} Hz, {model.input_seconds:g} s in training, and gives each of "
        f"{len(model.vocabulary)} classes "
        f"{'a share of one softmax' if model.task == 'single-label' else 'a probability of its own'}.",
        *_evaluation_section(facts),
        "## Use",
        _example_text(facts, files),
        *_training_section(facts),
        "## Licences",
        _licences(facts),
        "## Files",
        _table(("file", "holds"), [(f"`{name}`", what) for name, what in files.items()]),
        f"Weights sha256 `{model.sha256}`, classes sha256 `{model.vocabulary.sha256}`. Front end: "
        f"`{_code(str(front_end))}`.",
    ]
    return _join(metadata.to_yaml(), sections)


def store_card(
    name: str,
    *,
    licence: str | None,
    clips: int,
    vocabulary_sha256: str,
    classes: int,
    teachers: Sequence[TeacherFacts],
) -> str:
    """Returns a logit store's card."""
    metadata = DatasetCardData(
        pretty_name=name,
        task_categories=["audio-classification"],
        tags=["audio-tagging", "distillation", "logits"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "*-[0-9]*.parquet"}]}],
        **_licence(licence or ""),
    )
    sections = [
        f"# {_text(name)}",
        f"Logits of audio taggers, before the sigmoid, for {clips:,} clips and {classes} classes (sha256 "
        f"`{vocabulary_sha256}`): Parquet with a row a clip, `clip_id` and `logits` in float16, and no sounds.",
        "## Teachers",
        _teacher_table(teachers) if teachers else "Imported; what is known of their origin stands in `store.json`.",
        "## Use",
        _block("sh", "pipeline train-student --data DATASET --store FOLDER --model mn10 --run RUN"),
        "Any reader of Parquet will do as well: DuckDB, Polars, pandas.",
    ]
    return _join(metadata.to_yaml(), sections)


def dataset_card(name: str, *, licence: str | None, data: DataFacts, vocabulary: Vocabulary, shards: int) -> str:
    """Returns a dataset's card."""
    metadata = DatasetCardData(
        pretty_name=name,
        task_categories=["audio-classification"],
        tags=["audio-tagging", "webdataset"],
        **_licence(licence or ""),
    )
    classes = ", ".join(_text(one) for one in vocabulary.names[:40])
    sections = [
        f"# {_text(name)}",
        f"{data.clips:,} clips in {shards:,} WebDataset shards, labelled with {len(vocabulary)} classes: {classes}"
        f"{' …' if len(vocabulary) > 40 else ''}. Clip ids sha256 `{data.ids_sha256}`, classes sha256 "
        f"`{vocabulary.sha256}`.",
        "## Use",
        _block("sh", "pipeline train-student --data FOLDER --eval-data DATASET --model mn10 --run RUN"),
        "Each `*.tar` holds a sound and a `.json` with `clip_id` and `labels` for each clip, as `webdataset` reads "
        "them; `manifest.parquet` says where in them each sound lies, `classes.csv` what the labels mean.",
        "## Licence",
        _text(licence) if licence else "Not stated. The sounds are their makers'.",
    ]
    return _join(metadata.to_yaml(), sections)


def _results(facts: ModelFacts) -> list[EvalResult]:
    found = facts.evaluation
    metrics = {} if found is None else found.metrics
    return [
        EvalResult(
            task_type="audio-classification",
            task_name="Audio tagging",
            dataset_type=_slug(found.data.name),
            dataset_name=found.data.name,
            dataset_revision=found.data.ids_sha256,
            metric_type=key,
            metric_name=_METRICS[key],
            metric_value=round(value, 6),
        )
        for key, value in metrics.items()
        if found is not None
    ]


def _licence(licence: str) -> dict[str, Any]:
    if not licence:
        return {}
    known = licence.lower()
    return {"license": known} if known in _HUB_LICENCES else {"license": _NO_SPDX, "license_name": licence.lower()}


def _kind(facts: ModelFacts) -> str:
    return "small CNN" if facts.stage == "student" else "transformer"


def _evaluation_section(facts: ModelFacts) -> list[str]:
    found = facts.evaluation
    if found is None:
        return ["## Evaluation", "None was handed over."]
    rows = [(_METRICS[key], f"{value:.4f}") for key, value in found.metrics.items()]
    return [
        "## Evaluation",
        _table(("metric", "value"), rows),
        f"On {found.data.clips:,} clips of {_text(found.data.name)}, clip ids sha256 `{found.data.ids_sha256}`; means "
        f"over the {found.classes_scored} classes that any of them carries.",
    ]


def _training_section(facts: ModelFacts) -> list[str]:
    sections = ["## Training"] if facts.training or facts.teachers or facts.recipe else []
    if facts.training is not None:
        sections.append(
            f"{facts.training.clips:,} clips of {_text(facts.training.name)}, clip ids sha256 "
            f"`{facts.training.ids_sha256}`."
        )
    if facts.teachers:
        sections += ["Teachers, whose logits it learned from:", _teacher_table(facts.teachers)]
    if facts.recipe:
        lines = "\n".join(f"{key} = {value}" for key, value in facts.recipe.items())
        sections += ["<details><summary>Recipe</summary>", _block("", lines), "</details>"]
    return sections


def _teacher_table(teachers: Iterable[TeacherFacts]) -> str:
    rows = [
        (f"`{one.name}`", f"{one.weight:g}", one.licence or "not known", one.paper, f"`{one.sha256}`")
        for one in teachers
    ]
    return _table(("teacher", "weight", "licence of its weights", "paper", "sha256"), rows)


def _licences(facts: ModelFacts) -> str:
    lines = [f"- these weights: {_text(facts.licence) if facts.licence else 'not stated'}"]
    lines += [f"- {_text(one.name)}, a teacher: {_text(one.licence) or 'not known'}" for one in facts.teachers]
    lines.append("- audioset-distill, which made them: Apache-2.0")
    return "\n".join(lines)


def _example_text(facts: ModelFacts, files: Mapping[str, str]) -> str:
    with_timm = f"""\
import timm, torch
import {facts.stage}  # pip install audioset-distill; makes its names known to timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:ORG/NAME
waveform = torch.zeros(1, 10 * model.sample_rate_hz)  # (batch, samples), mono, -1 to 1
with torch.inference_mode():
    logits = model(model.front_end(waveform))  # (batch, classes)
names = model.pretrained_cfg["label_names"]"""
    samples = round(facts.model.input_seconds * facts.model.sample_rate_hz)
    with_onnx = f"""\
import json, numpy as np, onnxruntime

session = onnxruntime.InferenceSession("{ONNX_NAME}")
waveforms = np.zeros((1, {samples}), np.float32)  # (batch, samples), mono, -1 to 1, {facts.model.sample_rate_hz} Hz
(probabilities,) = session.run(None, {{"waveforms": waveforms}})  # (batch, classes)
names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])"""
    parts = [_block("sh", "pipeline tag sound.wav --checkpoint FOLDER"), _block("python", with_timm)]
    if ONNX_NAME in files:
        parts += ["Without this project or torch:", _block("python", with_onnx)]
    return "\n\n".join([*parts, "`example.py` tags a file: `python example.py sound.wav`."])


def example_program(facts: ModelFacts) -> str:
    """Returns example.py: it tags a sound with the model in its own folder."""
    score = "softmax(dim=1)" if facts.model.task == "single-label" else "sigmoid()"
    return f'''\
"""Tags a sound with the model in this folder: python example.py sound.wav"""

import csv
import sys
from pathlib import Path

import timm
import torch

import {facts.stage}  # noqa: F401  makes its names known to timm; pip install audioset-distill
from pipeline.dataset.audio import decode, resample

folder = Path(__file__).parent
model = timm.create_model(f"local-dir:{{folder}}", pretrained=True).eval()
sound = decode(Path(sys.argv[1]).read_bytes())
samples = torch.from_numpy(resample(sound.samples, sound.sample_rate_hz, model.sample_rate_hz))
with torch.inference_mode():
    logits = model(model.front_end(samples[None]))
with (folder / "classes.csv").open(encoding="utf-8", newline="") as stream:
    names = [row["display_name"] for row in csv.DictReader(stream)]
best = logits.{score}[0].topk(min(5, len(names)))
for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"{{probability:.3f}}  {{names[index]}}")
'''


def _join(front_matter: str, sections: Iterable[str]) -> str:
    body = "\n\n".join(sections)
    return f"---\n{front_matter.strip()}\n---\n\n{body}\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _text(text: str) -> str:
    """Returns foreign text, in which no mark-up counts."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    return text.replace("`", "'")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "dataset"
