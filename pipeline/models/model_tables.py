"""The facts of every registered model, from tables: building and counting the models would take seconds.

`pipeline.models.model_counting` writes the tables, and a test holds them to the models.
"""

import json
from importlib.resources import files
from typing import Any, Literal

Stage = Literal["student", "teacher"]


def table_name(stage: Stage) -> str:
    """Returns the table's name in `manifests/models`."""
    return f"{stage}s.jsonl"


def model_facts(stage: Stage) -> list[dict[str, Any]]:
    """Returns what is known of each student or teacher, in the order of its registry."""
    text = (files("manifests") / "models" / table_name(stage)).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
