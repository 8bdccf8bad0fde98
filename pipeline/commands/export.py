"""`pipeline export`: a model as one file that runs without this package."""

import json
import math
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.vocabulary import read_vocabulary
from pipeline.errors import UsageError
from pipeline.exporting.comparing import compare, onnx_runner
from pipeline.exporting.exported_model import ExportedModel, describe
from pipeline.exporting.map_loss import MapLoss, measure_map_loss
from pipeline.exporting.metadata import FrontEnd, Output
from pipeline.exporting.onnx_file import OPSET, add_properties, write_onnx
from pipeline.exporting.quantising import quantise
from pipeline.exporting.sounds import check_sounds
from pipeline.exporting.torch_file import pt2_runner, write_pt2
from pipeline.models.loading import LoadedModel, load_model
from pipeline.pages.documents import EXTRA, NEEDED
from pipeline.pages.listening_page import MODEL_NAME, find_runtime, write_listening_page
from pipeline.redaction import redact
from pipeline.runtime.extras import check_packages
from pipeline.runtime.output import print_line
from pipeline.runtime.recipes import read_options
from pipeline.storage.files import check_writable, join_path, publish

_FORMATS = {
    "onnx": (write_onnx, onnx_runner, f"opset {OPSET}"),
    "pt2": (write_pt2, pt2_runner, "torch.export"),
}
"""What writes a file, what runs it, and what the file says of the format's version."""


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Which model, and as what."""

    checkpoint: str
    """File of weights, a run's folder, a URL, or a released model's name, such as mn10_as, which is fetched once.
    NAME=FILE names the model in a file that does not say it."""
    _: KW_ONLY
    out: str | None = None
    """The file to write, a path or URL, whose name ends in .onnx, or in .pt2 for torch.export's format."""
    web: str | None = None
    """Instead: the folder to write, a path or URL, of a page that tags sounds and the microphone in a browser."""
    runtime: str | None = None
    """Folder with ONNX Runtime Web, such as dist of npm's onnxruntime-web, that is copied beside the page; without it
    the page asks a content delivery network for that one version."""
    output: Output = "probabilities"
    """What comes out: logits, probabilities (0 to 1) or embeddings (the mean of the last maps)."""
    front_end: FrontEnd = "inside"
    """inside: waveforms go in. outside: log-mel images, for hosts with a front end of their own."""
    check_data: str | None = None
    """Sounds that the file and the checkpoint are compared on: a dataset, a folder, a file. The sample's unless given,
    or, where there is none, sounds that are made for it."""
    model: str | None = None
    """Registered name of the model in a file that does not say it, such as mn10_as for a released file."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of that model, such as strides, se_dims or fmin, where they are not the name's."""
    classes: str | None = None
    """Class list of a file that does not say it, in the format of AudioSet's class_labels_indices.csv."""
    licence: str | None = None
    """What the file says of its licence; a released model's own unless given."""
    format: Literal["onnx", "pt2"] | None = None
    """onnx: for ONNX Runtime and all that reads ONNX. pt2: for torch alone. By the name of --out unless given."""
    int8: bool = False
    """Store weights as 8-bit integers, and compute the convolutions in them: a third of the size. Takes
    --calibration-data, and as --check-data a dataset with labels, on which the mAP before and after is measured."""
    calibration_data: str | None = None
    """Real sounds that say how large each map becomes, unlike those of --check-data: a dataset, a folder, a file."""
    calibration_sounds: int = 64
    """How many of them, spread evenly, 1 or more."""
    max_map_loss: float = 0.01
    """By how much 8-bit integers may lower the mAP, 0 to 1; where it is more, nothing is written."""

    def __post_init__(self) -> None:
        if (self.out is None) == (self.web is None):
            raise UsageError("choose what to write: --out FILE.onnx, --out FILE.pt2, or --web FOLDER")
        if self.web is not None and (self.output, self.front_end) != ("probabilities", "inside"):
            raise UsageError("a page takes waveforms and shows probabilities: leave --output and --front-end out")
        if self.web is None and self.runtime is not None:
            raise UsageError("--runtime is copied beside a page: give --web FOLDER, too")
        suffix = PurePath(self.location).suffix.lower()
        if suffix not in (".onnx", ".pt2") or (self.format or suffix[1:]) != suffix[1:]:
            wanted = f".{self.format}" if self.format else ".onnx or .pt2"
            raise UsageError(f"out is {self.location}; let its name end in {wanted}, for the format that is written")
        if self.int8 and (suffix != ".onnx" or self.output == "embeddings"):
            raise UsageError("--int8 is for .onnx files whose output is probabilities or logits")
        if self.int8 and (self.calibration_data is None or self.check_data is None):
            raise UsageError("--int8 needs --calibration-data, real sounds, and --check-data, a dataset with labels")
        if self.calibration_data is not None and not self.int8:
            raise UsageError("--calibration-data is for --int8; give both, or none")
        if self.calibration_sounds < 1 or not 0 <= self.max_map_loss <= 1:
            raise UsageError(
                f"calibration_sounds is {self.calibration_sounds} and max_map_loss {self.max_map_loss}; choose 1 or "
                "more, and 0 to 1"
            )

    @property
    def location(self) -> str:
        """Where the file goes."""
        return self.out or join_path(str(self.web), MODEL_NAME)


def run(config: Annotated[ExportConfig, Parameter(name="*")]) -> None:
    """Write a student as one file, front end, class names and all, and compare it with the checkpoint first.

    Batch and length are free. ONNX Runtime, or torch, runs the file on sounds of 0.5 to 30 s, one and three at once;
    where it differs from the checkpoint by more than a ten-thousandth of the outputs' spread, nothing is written.
    --web puts a page beside it that tags files and the microphone in the reader's own browser: no sound leaves that
    machine.

    Raises:
        PipelineError: the checkpoint can't be used, the extra is missing, or the file differs from the checkpoint.
    """
    form = PurePath(config.location).suffix.lower()[1:]
    if form == "onnx":
        check_packages("pipeline export", "onnx", "onnxscript", "onnxruntime", extra="export")
    check_writable(config.location)
    runtime = None
    if config.web is not None:
        check_packages("pipeline export --web", *NEEDED, extra=EXTRA)
        runtime = find_runtime(config.runtime)
    check_manifest = read_manifest(config.check_data) if config.int8 and config.check_data else None
    model = load_model(
        config.checkpoint,
        check_manifest,
        model=config.model,
        options=read_options(config.model_options),
        classes=None if config.classes is None else read_vocabulary(config.classes),
    )
    exported = ExportedModel(model, config.output, config.front_end)
    sounds = check_sounds(config.check_data, model.sample_rate_hz)
    write, runner, exporter = _FORMATS[form]
    metadata = describe(model, exported, licence=config.licence, exporter=exporter)
    with publish(config.location) as staged:
        write(exported, metadata, staged)
        difference = compare(runner(staged), exported, sounds.waveforms)
        told = (
            f"On {sounds.origin} it differs from the checkpoint by {difference.absolute:.1e} at most, "
            f"{difference.relative:.1e} of the {config.output}' spread"
        )
        if check_manifest is not None:
            loss = _make_int8(config, model, exported, check_manifest, staged)
            compare(runner(staged), exported, sounds.waveforms, tolerance=math.inf)  # it runs, whatever the length
            told = f"On {config.check_data}, {loss.clips} clips, it has {loss}"
        size = staged.stat().st_size
    print_line(f"wrote {config.location}, {size / 1e6:.1f} MB. {told}")
    if config.web is not None and runtime is not None:
        fixed = exported.fixed_samples
        written = write_listening_page(config.web, metadata, name=model.name, fixed_samples=fixed, runtime=runtime)
        print_line(f"wrote {config.web}: {', '.join(written)}. Any web server shows it, such as")
        print_line(f"python -m http.server --directory {config.web}")


def _make_int8(
    config: ExportConfig, model: LoadedModel, exported: ExportedModel, manifest: Manifest, file: Path
) -> MapLoss:
    """Replace a file by one with 8-bit integers, and measure what that costs.

    Raises:
        PipelineError: it costs more than is allowed, or no sound can be decoded.
    """
    given = check_sounds(config.calibration_data, model.sample_rate_hz, max_sounds=config.calibration_sounds)
    quantise(file, file, [exported.input_of(waveform) for waveform in given.waveforms])
    loss = measure_map_loss(onnx_runner(file), exported, model, manifest)
    loss.check(config.max_map_loss)
    about = {
        "calibration_data": redact(str(config.calibration_data)),
        "calibration_sounds": len(given.waveforms),
        "check_data": redact(manifest.location),
        "check_clips": loss.clips,
        "map_float": round(loss.before, 4),
        "map_int8": round(loss.after, 4),
    }
    add_properties(file, {"int8": json.dumps(about, ensure_ascii=False)})
    return loss
