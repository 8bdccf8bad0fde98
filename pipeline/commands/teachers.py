"""`pipeline teachers`: every teacher that can be named, what it costs, how good it is, whether its weights are here."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pipeline.labelling.installed_teachers import installed_teachers
from pipeline.models.model_tables import model_facts
from pipeline.models.weights_cache import cached_weights
from pipeline.runtime.output import print_json, print_line, print_table


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachersConfig:
    """How to list the teachers."""

    json: bool = False
    """Print one JSON object a teacher instead of a table: operations, parameters and paths in full."""


_DEFAULTS = TeachersConfig()


def run(config: Annotated[TeachersConfig, Parameter(name="*")] = _DEFAULTS) -> list[dict[str, Any]]:
    """List the teachers: rate, input length, parameters, GFLOPs a clip, published mAP, licence, cached or not.

    A GFLOP is 10^9 floating-point operations, two for each multiply-accumulate, of a clip as long as the input. mAP is
    what the authors publish for AudioSet's evaluation clips. Teachers that other packages offer come last; `pipeline
    teacher-logits` also takes my_package:build and hf:ORG/NAME.
    """
    rows = [facts | {"cached": cached_weights(facts["weights_url"])} for facts in model_facts("teacher")]
    offered = installed_teachers()
    if config.json:
        for row in [*rows, *({"name": name, "builder": builder} for name, builder in offered.items())]:
            print_json(row)
    else:
        print_table(_table(rows))
        for name, builder in offered.items():
            print_line(f"{name}: offered by {builder}")
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("teacher", "Hz", "input", "parameters", "a clip", "mAP", "licence", "cached", box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True  # a name that is cut can't be copied
    for column in table.columns[1:6]:
        column.justify = "right"
    for row in rows:
        name = "\n  = ".join([row["name"], *row["aliases"]])
        table.add_row(
            Text(name),
            str(row["sample_rate_hz"]),
            f"{row['input_seconds']:g} s",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['flops_per_clip'] / 1e9:.0f} GFLOPs",
            "-" if row["published_map"] is None else f"{row['published_map']:.3f}",
            row["licence"],
            _where(row),
        )
    return table


def _where(row: dict[str, Any]) -> str:
    """Returns whether the weights are on this machine, or how they get here."""
    if row["weights_url"] is None:
        return "no weights" if row["weights_page"] is None else "by hand"
    return "yes" if row["cached"] else "no"
