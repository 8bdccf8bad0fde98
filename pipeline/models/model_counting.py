"""Counts what every registered model costs, and writes the tables that `pipeline students` and `teachers` read.

python -m pipeline.models.model_counting    # after a change of a registry
"""

import json
from pathlib import Path
from typing import Any

import torch

import manifests
import student
import teacher
from pipeline.models.model_tables import Stage, table_name


def count_models(stage: Stage) -> list[dict[str, Any]]:
    """Returns what is known of each student or teacher, counted on the models themselves, in the registry's order."""
    if stage == "teacher":
        return [_describe_teacher(teacher.model_card(name)) for name in teacher.model_names()]
    costs: dict[str, student.Complexity] = {}
    return [_describe_student(student.model_card(name), costs) for name in student.model_names()]


def _describe_student(card: student.ModelCard, costs: dict[str, student.Complexity]) -> dict[str, Any]:
    # Many names share a network; its kernels' temperature changes nothing about its cost.
    shape = str((card.network.__name__, {key: value for key, value in card.settings.items() if key != "T_max"}))
    if shape not in costs:
        with torch.device("meta"):  # shapes without memory or arithmetic
            costs[shape] = student.count_complexity(student.create_model(card.name))
    cost = costs[shape]
    return {
        "name": card.name,
        "parameters": cost.parameters,
        "macs_per_clip": cost.macs,
        "peak_activation_bytes_fp16": None if cost.peak_activations is None else 2 * cost.peak_activations,
        "published_map": card.published_map,
        "licence": card.licence,
        "paper": card.paper,
        "weights_url": card.weights_url,
    }


def _describe_teacher(card: teacher.ModelCard) -> dict[str, Any]:
    cost = teacher.count_complexity(card)
    return {
        "name": card.name,
        "aliases": teacher.aliases_of(card.name),
        "sample_rate_hz": card.front_end.sample_rate_hz,
        "input_seconds": card.input_seconds,
        "parameters": cost.parameters,
        "flops_per_clip": cost.flops,
        "published_map": card.published_map,
        "licence": card.licence,
        "paper": card.paper,
        "weights_url": card.weights_url,
        "weights_page": card.weights_page,
    }


def main() -> None:
    """Write both tables into the checkout's `manifests/models`."""
    stages: tuple[Stage, ...] = ("student", "teacher")
    folder = Path(next(iter(manifests.__path__)), "models")
    folder.mkdir(exist_ok=True)
    for stage in stages:
        lines = [f"{json.dumps(facts)}\n" for facts in count_models(stage)]
        (folder / table_name(stage)).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
