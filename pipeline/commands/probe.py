"""`pipeline probe`: what embeddings are worth on a dataset's classes, by a linear classifier."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.table import Table

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.embeddings.probing import (
    FoldScore,
    LabelledEmbeddings,
    ProbeTask,
    check_packages,
    cross_validate,
    fold_by_hash,
)
from pipeline.embeddings.store import Embeddings, read_embeddings
from pipeline.errors import PipelineError, UsageError
from pipeline.runtime.output import print_line, print_table


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Which embeddings, on which labels."""

    embeddings: tuple[str, ...]
    """What `pipeline embed` wrote; several of one model are taken together."""
    data: tuple[str, ...]
    """The dataset with the labels. Several of the same classes are one fold each, as published folds are."""
    folds: int = 5
    """Folds of one dataset, 2 or more; a hash of its id decides of which a clip is."""
    c: float = 1.0
    """Inverse strength of regularisation, scikit-learn's C, above 0."""
    task: ProbeTask | None = None
    """single-label: one class a clip, accuracy; multi-label: any number, mAP. By default what the labels are."""

    def __post_init__(self) -> None:
        check_packages()
        if self.folds < 2:
            raise UsageError(f"folds is {self.folds}; choose 2 or more")
        if not self.c > 0:
            raise UsageError(f"c is {self.c}; choose a number above 0")


def run(config: Annotated[ProbeConfig, Parameter(name="*")]) -> list[FoldScore]:
    """Train a logistic regression on embeddings, and score it on the clips that it was not trained on, fold by fold.

    Embeddings are brought to mean 0 and deviation 1 by the clips of training. Clips without an embedding, and such of
    which no label is known, are left out and counted.

    Raises:
        PipelineError: no clip has both an embedding and labels, or the folds leave nothing to learn.
    """
    stores = [read_embeddings(location) for location in config.embeddings]
    if others := [store.stamp for store in stores if store.stamp != stores[0].stamp]:
        raise UsageError(f"--embeddings: made otherwise ({others[0].differences_from(stores[0].stamp)})")
    manifests = [read_manifest(location) for location in config.data]
    if len({manifest.vocabulary.sha256 for manifest in manifests}) > 1:
        raise UsageError("--data: these datasets have unlike classes, so they are no folds of one")
    data, left_out = _join(stores, manifests, config.folds)
    task = config.task or data.task
    if task == "single-label" and not (data.labels.sum(axis=1) == 1).all():
        raise UsageError("--task single-label: some clips have no class or several; choose multi-label")
    scores = list(cross_validate(data, c=config.c, task=task))
    _tell(scores, task, stores[0], len(data.clip_ids), left_out)
    return scores


def _join(stores: list[Embeddings], manifests: list[Manifest], folds: int) -> tuple[LabelledEmbeddings, int]:
    """Returns the clips that have both embeddings and labels, and how many clips have not."""
    values = np.concatenate([store.values for store in stores])
    place = {clip_id: number for number, clip_id in enumerate(one for store in stores for one in store.clip_ids)}
    ids: list[str] = []
    labels, masks, of_fold = [], [], []
    for number, manifest in enumerate(manifests):
        known = [manifest.clip_id(row) for row in range(len(manifest))]
        rows = np.array(
            [row for row, one in enumerate(known) if one in place and not manifest.unlabelled[row]], np.int64
        )
        ids += [known[row] for row in rows]
        labels.append(manifest.label_matrix(rows))
        mask = manifest.label_mask(rows)
        masks.append(np.ones(labels[-1].shape, bool) if mask is None else mask)
        of_fold += [number if len(manifests) > 1 else fold_by_hash(known[row], folds) for row in rows]
    if not ids:
        raise PipelineError("no clip of --data has an embedding; embed that dataset with `pipeline embed`")
    mask = np.concatenate(masks)
    joined = LabelledEmbeddings(
        clip_ids=ids,
        values=values[[place[one] for one in ids]],
        labels=np.concatenate(labels),
        label_mask=None if mask.all() else mask,
        folds=np.array(of_fold),
    )
    return joined, sum(map(len, manifests)) - len(ids)


def _tell(scores: list[FoldScore], task: ProbeTask, store: Embeddings, clips: int, left_out: int) -> None:
    name = "accuracy" if task == "single-label" else "mAP"
    table = Table()
    for heading in ("fold", "clips", "classes", name, "chance"):
        table.add_column(heading, justify="right")
    for one in scores:
        table.add_row(str(one.fold), str(one.clips), str(one.classes), f"{one.score:.4f}", f"{one.chance:.4f}")
    print_table(table)
    values = np.array([one.score for one in scores])
    missing = f"; {left_out} clips without embedding or label left out" if left_out else ""
    what = f"{store.stamp.layers} of {store.stamp.model}, {store.stamp.size} numbers"
    mean = f"{name} {values.mean():.4f} ± {values.std():.4f} over {len(values)} folds of {clips} clips"
    print_line(f"{mean}: {what}{missing}")
