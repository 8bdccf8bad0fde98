"""`pipeline reweight`: another store from a store that keeps its members, without running a teacher again."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import UsageError
from pipeline.logits.reweighting import reweight, reweighted_stamp, weight_changes
from pipeline.logits.store import open_store
from pipeline.runtime.output import print_line
from pipeline.storage.files import is_same_place
from pipeline.storage.one_writer import one_writer


@dataclass(frozen=True, slots=True)
class ReweightConfig:
    """Which store becomes which."""

    store: str
    """Logit store to start from, a folder or URL, made with --keep-members where weights are to change."""
    _: KW_ONLY
    out: str
    """Folder or URL of the new store; the old one stays as it is."""
    weights: tuple[float, ...] = ()
    """One weight for each teacher, in the order that `pipeline inspect` shows, 0 or more; 0 leaves a teacher out, and
    only the ratios count. Without it they stay."""
    keep_members: bool = True
    """Take each teacher's own logits along where the store has them."""
    top_k: int | None = None
    """Keep only this many logits of a clip, the largest; the teachers' own are left out then."""

    def __post_init__(self) -> None:
        if is_same_place(self.out, self.store):
            raise UsageError(
                f"out is the store itself, {self.out}. A store changed halfway would be of no use, so a new one is "
                "made: give it a folder of its own"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise UsageError(f"weights are {self.weights}; choose numbers of 0 or more")
        if self.weights and not any(self.weights):
            raise UsageError("weights are all 0; leave at least one teacher in")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}; choose 1 or more")


def run(config: Annotated[ReweightConfig, Parameter(name="*")]) -> None:
    """Weigh a store's teachers anew, or make a smaller copy of a store, from what it holds: no teacher runs.

    The new store is one when its last file is written, and nothing before: until then readers refuse it, and the same
    command goes on where it was stopped.

    Raises:
        PipelineError: the store does not hold what this needs, or the new one can't be written.
    """
    source = open_store(config.store)
    stamp = reweighted_stamp(source, config.weights, keep_members=config.keep_members, top_k=config.top_k)
    with one_writer(config.out):
        reweight(source, config.out, stamp)
    for line in weight_changes(source.stamp, stamp):
        print_line(line)
    print_line(f"wrote {config.out}: logits of {source.clip_count:,} clips")
