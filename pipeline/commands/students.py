"""`pipeline students`: every student, what it costs on a device, how good it is, whether its weights are here."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pipeline.models.model_tables import model_facts
from pipeline.models.weights_cache import cached_weights
from pipeline.runtime.output import print_json, print_table


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentsConfig:
    """Which students to list, and how."""

    all: bool = False
    """Also list every width from mn01 to mn40 without released weights."""
    json: bool = False
    """Print one JSON object a student instead of a table: operations, parameters and paths in full."""


_DEFAULTS = StudentsConfig()


def run(config: Annotated[StudentsConfig, Parameter(name="*")] = _DEFAULTS) -> list[dict[str, Any]]:
    """List the students: parameters, multiply-accumulates, peak activation memory, published mAP, licence, cached.

    All figures are for one clip of 10 s. Peak memory is that of activations in half precision, two bytes each, layer
    by layer. mAP is what the authors publish for AudioSet's evaluation clips; *_im are ImageNet weights to start from.
    """
    rows = [
        facts | {"cached": cached_weights(facts["weights_url"])}
        for facts in model_facts("student")
        if facts["weights_url"] is not None or config.all
    ]
    if config.json:
        for row in rows:
            print_json(row)
    else:
        print_table(_table(rows))
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("student", "parameters", "a clip", "peak", "mAP", "licence", "cached", box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True  # a name that is cut can't be copied
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in rows:
        peak = row["peak_activation_bytes_fp16"]
        table.add_row(
            Text(row["name"]),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs_per_clip'] / 1e6:.0f} M MACs",
            "-" if peak is None else f"{peak / 1e6:.2f} MB",
            "-" if row["published_map"] is None else f"{row['published_map']:.3f}",
            row["licence"],
            "no weights" if row["weights_url"] is None else "yes" if row["cached"] else "no",
        )
    return table
