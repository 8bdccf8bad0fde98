"""`pipeline publish`: a model, a logit store or a dataset as others can use it at once, in a folder or on the Hub."""

import tempfile
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from pipeline.dataset.manifest import MANIFEST_NAME
from pipeline.dataset.vocabulary import read_vocabulary
from pipeline.errors import UsageError
from pipeline.logits.store import STORE_NAME
from pipeline.models.loading import load_model, named_checkpoint
from pipeline.publishing.data_folder import copy_files, data_card, files_of
from pipeline.publishing.hub import repository_of, upload
from pipeline.publishing.model_facts import gather_facts
from pipeline.publishing.model_folder import CARD_NAME, write_model_folder
from pipeline.runtime.extras import check_packages
from pipeline.runtime.output import print_line
from pipeline.runtime.recipes import read_options
from pipeline.storage import files as storage
from pipeline.training.folder import is_run

Kind = Literal["model", "store", "dataset"]


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """What goes where, and what its card can't find out by itself."""

    source: str
    """A run's folder, a file of weights, a released model's name, a logit store or a dataset."""
    _: KW_ONLY
    to: str
    """An empty folder, or hf://ORG/NAME, which uploads. For a store or a dataset its own folder, too, which then gets a
    card."""
    evaluation: str | None = None
    """The folder or report.json that `pipeline evaluate --out` or `compare` wrote of these weights."""
    licence: str | None = None
    """SPDX identifier of the licence of what is published, such as CC-BY-4.0; released weights keep theirs."""
    data: str | None = None
    """Dataset that the model learned from, where the run's own path to it no longer holds."""
    store: str | None = None
    """Logit store that it learned from, likewise."""
    name: str | None = None
    """What the card calls it; the last part of the target unless given."""
    onnx: bool = True
    """Write a student as model.onnx, too, compared with its weights first; transformers have no such file."""
    public: Annotated[bool, Parameter(negative="")] = False
    """Let everybody see a repository that is made on the Hub; else it is private."""
    model: str | None = None
    """Registered name of the model in a file that does not say it, such as mn10_as for a released file."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of that model, such as strides, se_dims or fmin, where they are not the name's."""
    classes: str | None = None
    """Class list of a file that does not say it, in the format of AudioSet's class_labels_indices.csv."""


def run(config: Annotated[PublishConfig, Parameter(name="*")]) -> None:
    """Write what others need to use a model, a logit store or a dataset, with a card; upload it where asked to.

    A model becomes model.safetensors, timm's config.json with the classes' names, the class list, an example, for
    students model.onnx, and a card whose text, table and model-index come from the run and its evaluation:
    `timm.create_model("local-dir:FOLDER")` and, from the Hub, "hf-hub:ORG/NAME" load it. Only hf:// opens a connection.

    Raises:
        PipelineError: the source can't be used, the target is not empty, or the Hub refuses.
    """
    kind = _kind_of(config.source)
    repository = repository_of(config.to, "model" if kind == "model" else "dataset")
    name = config.name or storage.file_name(config.to.rstrip("/")) or "model"
    if repository is None:
        target = storage.local_path(config.to)
        own = kind != "model" and storage.is_same_place(config.source, config.to)
        _check_free(target / CARD_NAME if own else target, config.to)
        files = _write(config, kind, target, name)
        print_line(f"wrote {config.to}: {', '.join(files)}")
        return
    with tempfile.TemporaryDirectory(prefix="publish-") as folder:
        files = _write(config, kind, Path(folder), name, copy=False)
        address = upload(repository, files, public=config.public)
    print_line(f"published {', '.join(files)} as {address}")


def _kind_of(source: str) -> Kind:
    if storage.exists(storage.join_path(source, STORE_NAME)):
        return "store"
    return "dataset" if storage.exists(storage.join_path(source, MANIFEST_NAME)) else "model"


def _check_free(target: Path, shown: str) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"--to {shown}: {target.name} is there already and not empty. Remove it, or choose another")


def _write(config: PublishConfig, kind: Kind, folder: Path, name: str, *, copy: bool = True) -> Mapping[str, Path]:
    """Returns the files of what is published, name → path; what needs no change is only copied if `copy` says so."""
    if kind == "model":
        return {one: folder / one for one in _write_model(config, folder, name)}
    card = data_card(config.source, kind, name=name, licence=config.licence)
    files = {one: path for one, path in files_of(config.source).items() if one != CARD_NAME}
    if copy and not storage.is_same_place(config.source, folder):
        copy_files(files, folder)
    storage.publish_bytes(folder / CARD_NAME, card.encode())
    return {**files, CARD_NAME: folder / CARD_NAME}


def _write_model(config: PublishConfig, folder: Path, name: str) -> list[str]:
    _, location = named_checkpoint(config.source)
    model = load_model(
        config.source,
        model=config.model,
        options=read_options(config.model_options),
        classes=None if config.classes is None else read_vocabulary(config.classes),
        fused=False,
    )
    facts = gather_facts(
        name,
        model,
        run=location if is_run(location) else None,
        licence=config.licence,
        data=config.data,
        store=config.store,
        evaluation=config.evaluation,
    )
    onnx = config.onnx and facts.stage == "student"
    if onnx:
        check_packages("pipeline publish without --no-onnx", "onnx", "onnxscript", "onnxruntime", extra="export")
    return write_model_folder(folder, facts, location, onnx=onnx)
