"""`pipeline export`: a model as one file that runs without this package."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

from pipeline.dataset.vocabulary import read_vocabulary
from pipeline.errors import UsageError
from pipeline.exporting.comparing import compare, onnx_runner
from pipeline.exporting.exported_model import ExportedModel, describe
from pipeline.exporting.metadata import FrontEnd, Output
from pipeline.exporting.onnx_file import EXPORTER, write_onnx
from pipeline.exporting.sounds import check_sounds
from pipeline.models.loading import load_model
from pipeline.runtime.extras import check_packages
from pipeline.runtime.output import print_line
from pipeline.runtime.recipes import read_options
from pipeline.storage.files import check_writable, publish


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Which model, and as what."""

    checkpoint: str
    """File of weights, a run's folder, a URL, or a released model's name, such as mn10_as, which is fetched once.
    NAME=FILE names the model in a file that does not say it."""
    _: KW_ONLY
    out: str
    """The .onnx file to write, a path or URL."""
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

    def __post_init__(self) -> None:
        if not self.out.lower().endswith(".onnx"):
            raise UsageError(f"out is {self.out}; what is written is ONNX: let its name end in .onnx")


def run(config: Annotated[ExportConfig, Parameter(name="*")]) -> None:
    """Write a student as one ONNX file, front end, class names and all, and compare it with the checkpoint first.

    Batch and length are free. ONNX Runtime runs the file on sounds of 0.5 to 30 s, one and three at once; where it
    differs from the checkpoint by more than a ten-thousandth of the outputs' spread, nothing is written.

    Raises:
        PipelineError: the checkpoint can't be used, the extra is missing, or the file differs from the checkpoint.
    """
    check_packages("pipeline export", "onnx", "onnxscript", "onnxruntime", extra="export")
    check_writable(config.out)
    model = load_model(
        config.checkpoint,
        model=config.model,
        options=read_options(config.model_options),
        classes=None if config.classes is None else read_vocabulary(config.classes),
    )
    exported = ExportedModel(model, config.output, config.front_end)
    sounds = check_sounds(config.check_data, model.sample_rate_hz)
    with publish(config.out) as staged:
        write_onnx(exported, describe(model, exported, licence=config.licence, exporter=EXPORTER), staged)
        difference = compare(onnx_runner(staged), exported, sounds.waveforms)
        size = staged.stat().st_size
    print_line(
        f"wrote {config.out}, {size / 1e6:.1f} MB. On {sounds.origin} it differs from the checkpoint by "
        f"{difference.absolute:.1e} at most, {difference.relative:.1e} of the {config.output}' spread"
    )
