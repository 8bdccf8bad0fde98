"""`pipeline split`: a dataset → one for training and one for evaluation."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from cyclopts import Parameter

from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.ingest.copying import CopyConfig, copy
from pipeline.ingest.splitting import Side, Split, SplitResult, divided, is_made
from pipeline.runtime.output import print_line
from pipeline.storage import files as storage


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """Which dataset, and how it is divided."""

    dataset: str
    """The dataset folder, a path or a URL."""
    _: KW_ONLY
    train: str
    """The dataset folder to make for training: a path or a URL."""
    eval: str
    """The dataset folder to make for evaluation: a path or a URL."""
    eval_share: float = 0.1
    """Share of the clips that are for evaluation, above 0 and below 1."""
    seed: int = 0
    """Another seed divides otherwise."""
    stratify: bool = False
    """Give each class its share to the nearest clip, and a clip on each side where it has two. Unless given, an id's
    hash alone decides: a clip then falls on the same side in every dataset that it is ever in."""
    copies: Annotated[CopyConfig, Parameter(name="*")] = field(default_factory=CopyConfig)

    def __post_init__(self) -> None:
        if not 0 < self.eval_share < 1:
            raise UsageError(f"--eval-share is {self.eval_share}; choose a value above 0 and below 1")
        for out in (self.train, self.eval):
            self.copies.of(out)
            if storage.is_same_place(self.dataset, out):
                raise UsageError(f"{out}: is the dataset itself. Choose another folder")
        if storage.is_same_place(self.train, self.eval):
            raise UsageError(f"--train and --eval are both {self.train}; choose two folders")


def run(config: Annotated[SplitConfig, Parameter(name="*")]) -> SplitResult:
    """Divide a dataset into one for training and one for evaluation.

    Each clip's side comes from the hash of its id: the same on every machine, for every order of the clips, and,
    without --stratify, whatever else is in the dataset. Sounds and the jsons beside them are copied byte for byte,
    without decoding, and compared with the manifest's checksums on the way. A logit store of the dataset is one of
    both sides.

    Raises:
        ManifestError: the dataset is damaged, or one side would be empty.
        ShardError: a shard is missing.
        UsageError: a dataset at --train or --eval is there already.
    """
    manifest = read_manifest(config.dataset)
    split = Split(eval_share=config.eval_share, seed=config.seed, stratify=config.stratify)
    in_eval = split.of_eval(manifest)  # (clips,)
    for side, of_side in ((config.train, ~in_eval), (config.eval, in_eval)):
        if not of_side.any():
            raise UsageError(
                f"{side}: none of the {len(manifest)} clips of {config.dataset} would be there. Choose another "
                "--eval-share or --seed"
            )
    for out, is_eval in ((config.train, False), (config.eval, True)):
        if not (is_made(out, manifest, in_eval == is_eval) and not config.copies.overwrite):
            copy(config.copies.of(out), [config.dataset], manifest.vocabulary, Side(split, is_eval))
    result = divided(manifest, in_eval)
    print_line(str(result))
    return result
