"""`pipeline verify`: reads a dataset, a store of logits or embeddings or a run again, and lists its faults."""

from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text
from torch import nn

from pipeline.dataset.manifest import read_manifest
from pipeline.errors import PipelineError, UsageError, VerificationError
from pipeline.models.loading import load_model
from pipeline.redaction import redact
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.output import print_line, print_table
from pipeline.runtime.progress import progress_bar
from pipeline.storage import files as storage
from pipeline.verification.dataset_repair import repair_dataset
from pipeline.verification.datasets import verify_dataset
from pipeline.verification.faults import Fault, Findings, write_faults
from pipeline.verification.folder_kinds import Kind, kind_of
from pipeline.verification.parts import PartFormat, repair_parts, verify_parts
from pipeline.verification.runs import repair_run, verify_run
from pipeline.verification.stores import EMBEDDINGS, LOGITS

_FORMATS: dict[Kind, PartFormat[Any]] = {"store": LOGITS, "embeddings": EMBEDDINGS}


@dataclass(frozen=True, slots=True)
class VerifyConfig:
    """What to verify, and how thoroughly."""

    path: str
    """A dataset, a logit store, embeddings or a run: a folder, or the URL of one."""
    _: KW_ONLY
    data: str | None = None
    """With a store or embeddings: the dataset that they should cover."""
    decode: bool = False
    """With a dataset: also decode every sound from end to end."""
    workers: int | None = None
    """Shards or parts read at the same time, at least 1; one for each core that may be used, unless given."""
    out: str | None = None
    """A Parquet file to list every fault in: check, file, clip_id, detail, repair."""
    repair: bool = False
    """Make again what can be made again: a manifest, a store's lists. A bad part of a store and a damaged checkpoint
    are moved into the folder's .damaged, out of the way of the command that goes on. Nothing is deleted."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers is {self.workers}; choose 1 or more")


def run(config: Annotated[VerifyConfig, Parameter(name="*")]) -> Findings:
    """Read a dataset, a logit store, embeddings or a run from end to end, and list every fault.

    A dataset: each shard's tar against the manifest: places, sizes, ids, checksums, classes. A store of logits or of
    embeddings: each part's stamp, columns, ids and numbers, and with --data how much of a dataset it covers, and
    whether that has changed since. A run: settings, metrics, checkpoints, and whether the weights load. Exits with 1
    where a fault is left.

    Raises:
        VerificationError: there are faults that nothing was done about.
        PipelineError: PATH is none of these, or can't be repaired; the message says what has to be done first.
    """
    kind = kind_of(config.path)
    _check_usage(config, kind)
    findings = _verify(config, kind)
    refusal = _repair(config, kind, findings) if config.repair and findings.faults else None
    _show(config, kind, findings)
    if config.out is not None:
        write_faults(config.out, findings.faults)
    if refusal is not None:
        raise refusal
    if left := len(findings.left):
        where = f"; all are listed in {config.out}" if config.out else "; --out FILE lists them all"
        raise VerificationError(f"{config.path}: this {kind} is not as it should be, faults: {left:,}{where}")
    return findings


def _check_usage(config: VerifyConfig, kind: Kind) -> None:
    if config.data is not None and kind not in _FORMATS:
        raise UsageError(f"--data asks how much of a dataset a store covers, but {config.path} is a {kind}")
    if config.decode and kind != "dataset":
        raise UsageError(f"--decode is for the sounds of a dataset, but {config.path} is a {kind}")
    if config.repair:
        storage.check_writable(config.path)


def _verify(config: VerifyConfig, kind: Kind) -> Findings:
    workers = config.workers or usable_cores()
    unit = {"dataset": "clips", "run": "files"}.get(kind, "parts")
    with progress_bar("verify", None, unit=unit) as bar:
        if kind == "dataset":
            return verify_dataset(
                config.path, decode=config.decode, workers=workers, on_manifest=bar.set_total, advance=bar.advance
            )
        if form := _FORMATS.get(kind):
            manifest = None if config.data is None else read_manifest(config.data)
            return verify_parts(
                form, config.path, manifest, workers=workers, on_parts=bar.set_total, advance=bar.advance
            )
        return verify_run(config.path, _load_network, on_files=bar.set_total, advance=bar.advance)


def _load_network(location: str) -> nn.Module:
    return load_model(location, offline=True).network


def _repair(config: VerifyConfig, kind: Kind, findings: Findings) -> PipelineError | None:
    """Mend what can be mended; give what forbids it, which is told after what was found."""
    repairs: dict[Kind, Callable[[], None]] = {
        "dataset": lambda: repair_dataset(config.path, findings.faults),
        "run": lambda: repair_run(config.path, findings),
        **{name: partial(repair_parts, form, config.path, findings) for name, form in _FORMATS.items()},
    }
    try:
        repairs[kind]()
    except PipelineError as error:
        return error
    return None


def _show(config: VerifyConfig, kind: Kind, findings: Findings) -> None:
    if findings.faults:
        print_table(_fault_table(findings.faults))
    looked_at = ", ".join(f"{count:,} {what}" for what, count in findings.looked_at.items()) or "nothing"
    notes = "".join(f"; {what}: {count:,}" for what, count in findings.notes.items() if count)
    mended = len(findings.faults) - len(findings.left)
    told = f"faults: {len(findings.faults):,}" + (f", {mended:,} of them repaired" if mended else "")
    print_line(f"{redact(config.path)}: {kind} of {looked_at} read; {told}{notes}")


def _fault_table(faults: list[Fault]) -> Table:
    """Lay out the faults by check: how many, and the first of each."""
    table = Table("fault", "count", "first", "repair")
    table.columns[1].justify = "right"
    counts = Counter(fault.check for fault in faults)
    for check, count in counts.most_common():
        first = next(fault for fault in faults if fault.check == check)
        where = " ".join(filter(None, (first.file, first.clip_id)))
        table.add_row(check, f"{count:,}", Text(redact(f"{where}: {first.detail}")), Text(redact(first.repair)))
    return table
