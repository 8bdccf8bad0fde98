"""`pipeline tag`: what is to be heard in sounds, window by window, over time, or as it comes."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from pipeline.dataset.live_sound import LiveSound, RawFormat, SampleFormat
from pipeline.dataset.sound_parts import MAPPED_BYTES, resampled_parts
from pipeline.dataset.sound_sources import Sounds, find_sounds
from pipeline.dataset.vocabulary import Vocabulary, read_vocabulary
from pipeline.decoding.parts_ahead import SoundPart, parts_ahead
from pipeline.errors import DecodeError, PipelineError, TooManyFailuresError, UsageError
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.imports import lasting_imports
from pipeline.runtime.progress import ProgressBar, progress_bar
from pipeline.runtime.recipes import read_options
from pipeline.runtime.stopping import StoppedError, stop_on_signals
from pipeline.scoring.events import EventRule
from pipeline.scoring.listening import Ensemble, WindowModel, listen, plan_windows
from pipeline.scoring.tag_picker import TagPicker
from pipeline.scoring.tagged_windows import Format, TaggedWindow, TagWriter, choose_format, open_writer
from pipeline.scoring.thresholds import read_thresholds
from pipeline.storage import files as storage

__all__ = ["TagConfig", "TaggedWindow", "run"]

STREAM = "-"
"""In the place of a file: standard input."""
_STREAMS = (STREAM, "/dev/stdin")
_STREAM_WINDOW, _STREAM_HOP = 2.0, 1.0
_EVENT_WINDOW, _EVENT_HOP = 2.0, 0.5
_MAX_WORKERS = 4
_GPU_WINDOWS, _CPU_WINDOWS = 64, 16
_KEPT_WINDOWS = 100_000
_TOLD_FAILURES = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TagConfig:
    """Which sounds, by which models, and what to tell of them."""

    files: tuple[str, ...]
    """Sounds: files, folders (all sounds below them), patterns such as 'rec/**/*.wav', dataset folders, URLs of any of
    these; or - alone, which is standard input, heard as it comes."""
    _: KW_ONLY
    checkpoint: Annotated[str | tuple[str, ...], Parameter(n_tokens=-1)]
    """File of weights, a run's folder, a URL, or a released model's name, such as mn10_as, which is fetched once; or an
    .onnx file of `pipeline export`, which needs onnxruntime and no torch. NAME=FILE names the model in a file that does
    not say it. Several are an ensemble, the mean of their logits."""
    model: str | None = None
    """Registered name of the model in a file that does not say it, such as mn10_as for a released file."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of that model, such as strides, se_dims or fmin, where they are not the name's."""
    classes: Annotated[str | tuple[str, ...] | None, Parameter(n_tokens=-1)] = None
    """Classes to keep, by name or id, such as Speech Music '/m/0k4j'; all unless given. A file is what it has always
    been: the class list of a checkpoint that does not say it, in the format of AudioSet's class_labels_indices.csv;
    AudioSet's unless given."""
    window: float | None = None
    """Length of the windows that a sound is cut into, in seconds, above 0; without it a CNN hears a sound of up to 300
    s as a whole, and longer ones in windows of what it was trained on. With --events or - it is 2 s, and with --hop or
    a model's own timeline what it was trained on."""
    hop: float | None = None
    """From one window to the next, in seconds, above 0, at most --window, which it is unless given (with --events 0.5
    s, with - 1 s). Where windows overlap, their probabilities are averaged, and there is a line for each hop."""
    timeline: Literal["auto", "windows", "frames"] = "auto"
    """Where steps in time come from. windows: --window and --hop. frames: a student's last maps, its head applied to
    each frame, a step of 0.32 s for most, at no cost. auto: frames with --events or --hop, if the model is fully
    convolutional, else windows."""
    events: bool = False
    """Tell when each class begins and ends, instead of the tags of each window."""
    onset: float = 0.5
    """Probability, 0 to 1, that an event reaches somewhere; --thresholds has others for some classes."""
    offset: float = 0.25
    """Probability, 0 to --onset, that an event does not fall below from its beginning to its end. Where --thresholds
    has another onset, it is scaled alike."""
    shortest: float = 0.0
    """Shorter events are dropped, in seconds, 0 or more."""
    thresholds: str | None = None
    """CSV of the probability that each class has to reach, as `pipeline evaluate --thresholds` writes it. It takes the
    place of --least, and of --onset, for the classes that it has a threshold for."""
    top: int = 5
    """How many tags a window gets, the most probable first; 1 or more. Not for events."""
    least: float = 0.0
    """Tags below this probability, 0 to 1, are left out. Not for events."""
    json: bool = False
    """Print one JSON object a window instead of a table."""
    format: Format | None = None
    """table: for reading. jsonl, csv, parquet: a row a tag, with the columns file, start_seconds, end_seconds, tag,
    probability. audacity: label tracks. windows: as --json. By the name of --out unless given."""
    out: str | None = None
    """File to write instead of standard output, a path or URL; for Audacity's labels of several sounds a folder."""
    workers: int | None = None
    """Processes that decode ahead of the model; 0 decodes in between. As many as there are cores and sounds, up to 4
    where the model is on a CPU, unless given; none for one short sound."""
    batch_size: int | None = None
    """Windows that go through the model together, 1 or more; those of several sounds mix. By default 64 on a GPU, 16
    without one."""
    rate: int | None = None
    """Samples a second, in hertz, of standard input that has no header; without it a WAV header is expected."""
    channels: int = 1
    """Channels of such input, 1 or more."""
    sample_format: SampleFormat = "s16le"
    """Samples of such input: bits, s(igned), u(nsigned) or f(loat), little or big endian."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.files:
            raise UsageError("nothing to tag: name at least one sound file")
        if len(self.files) > 1 and not set(_STREAMS).isdisjoint(self.files):
            raise UsageError("- is standard input and comes alone; tag files by another command")
        if self.top < 1 or not 0 <= self.least <= 1:
            raise UsageError(f"top is {self.top} and least is {self.least}; choose 1 or more, and 0 to 1")
        if self.window is not None and not 0 < self.window < math.inf:
            raise UsageError(f"window is {self.window}; choose a number of seconds above 0, or leave it out")
        if self.hop is not None and not 0 < self.hop <= (self.window or math.inf):
            raise UsageError(f"hop is {self.hop}; choose a number of seconds above 0, at most --window")
        if not 0 <= self.offset <= self.onset <= 1:
            raise UsageError(f"offset is {self.offset} and onset {self.onset}; choose 0 to 1, the onset not lower")
        if not 0 <= self.shortest < math.inf:
            raise UsageError(f"shortest is {self.shortest}; choose a number of seconds, 0 or more")
        if (self.batch_size is not None and self.batch_size < 1) or (self.workers or 0) < 0:
            raise UsageError(f"batch_size is {self.batch_size} and workers {self.workers}; choose 1 and 0 or more")
        if self.channels < 1 or (self.rate is not None and self.rate < 1):
            raise UsageError(f"rate is {self.rate} and channels {self.channels}; choose 1 or more")
        if self.json and self.format not in (None, "windows"):
            raise UsageError(f"--json and --format {self.format} are two formats; choose one")

    @property
    def is_live(self) -> bool:
        """Whether to hear standard input."""
        return len(self.files) == 1 and self.files[0] in _STREAMS


def run(config: Annotated[TagConfig, Parameter(name="*")]) -> list[TaggedWindow]:
    """Tag sounds with a checkpoint or an ensemble.

    A CNN hears a sound as long as it is, up to 5 minutes, at once; --window cuts it into windows, one after the other,
    and the last one is as long as what is left. A transformer hears no more than its length at once, 10 s for most, so
    that longer sounds are cut into windows of that. --hop overlaps windows and averages them into a timeline, --events
    says when classes begin and end. Sounds that can't be decoded are named, and the others are tagged all the same.

    Returns:
        The windows, steps or events, as far as they are no more than 100,000; of standard input none.

    Raises:
        PipelineError: the checkpoint can't be used, or a sound could not be decoded.
    """
    form = choose_format("windows" if config.json else config.format, config.out)
    sounds = None if config.is_live else find_sounds(config.files)
    models = load_models(config)
    kept: deque[TaggedWindow] = deque(maxlen=0 if sounds is None else _KEPT_WINDOWS)
    several = sounds is not None and len(sounds) > 1
    failures: list[str] = []
    stopped = False
    with stop_on_signals(at_once=True), open_writer(form, config.out, live=config.is_live, several=several) as writer:
        try:
            failures = _tag(config, models, sounds, writer, kept)
        except KeyboardInterrupt:
            if not config.is_live:
                raise
            stopped = True
    if stopped:
        _log.info("stopped; all that was heard is told")
        raise StoppedError
    if failures:
        raise _failed(failures, 1 if sounds is None else len(sounds))
    return list(kept)


def _tag(
    config: TagConfig, models: Ensemble, sounds: Sounds | None, writer: TagWriter, kept: deque[TaggedWindow]
) -> list[str]:
    """Tag all, and return which sounds can't be decoded, and why."""
    frames = _takes_frames(config, models)
    window, hop = _window_and_hop(config, frames=frames)
    plan = plan_windows(models, window=window, hop=hop, frames=frames)
    picker = _picker(config, models.vocabulary)
    failures: list[str] = []
    with ExitStack() as stack:
        if sounds is None:
            parts, total, name = _live_parts(config, models.sample_rate_hz), None, lambda number: STREAM
            heard_after = (plan.length or 0) / models.sample_rate_hz
            _log.info("listening; a sound is told up to %.1f s after it was heard, Ctrl-C ends", heard_after)
        else:
            workers = _workers(config, sounds, on_gpu=models.on_gpu)
            parts = parts_ahead(sounds, sample_rate_hz=models.sample_rate_hz, processes=workers)
            total, name = len(sounds), sounds.name
        bar = None if sounds is None else stack.enter_context(progress_bar("tagging", total, unit="sounds"))
        batch_size = 1 if sounds is None else config.batch_size or (_GPU_WINDOWS if models.on_gpu else _CPU_WINDOWS)
        heard = listen(parts, models, plan, batch_size=batch_size, frames=frames)
        for number, window_ in picker.pick(heard, name, models.sample_rate_hz):
            if isinstance(window_, TaggedWindow):
                writer.write(window_)
                kept.append(window_)
            else:
                _end_sound(name(number), window_, writer, bar, failures)
    return failures


def _end_sound(name: str, failure: str, writer: TagWriter, bar: ProgressBar | None, failures: list[str]) -> None:
    writer.end_file()
    if bar is not None:
        bar.advance()
    if failure:
        failures.append(f"{name}: {failure}")
        if len(failures) > _TOLD_FAILURES:
            _log.warning("%s", failures[-1])


def _failed(failures: Sequence[str], total: int) -> PipelineError:
    more = len(failures) - _TOLD_FAILURES
    told = "; ".join(failures[:_TOLD_FAILURES]) + (f"; and {more} more, which were named above" if more > 0 else "")
    return TooManyFailuresError(f"{len(failures)} of {total} files can't be decoded: {told}")


def _live_parts(config: TagConfig, sample_rate_hz: int) -> Iterator[SoundPart]:
    """Yields what comes through standard input, and its end."""
    raw = None
    if config.rate is not None:
        raw = RawFormat(sample_rate_hz=config.rate, channels=config.channels, sample_format=config.sample_format)
    failure = ""
    try:
        sound = LiveSound(0, raw)
        for samples in resampled_parts(sound.blocks(), sound.sample_rate_hz, sample_rate_hz):
            yield SoundPart(sound=0, samples=samples)
    except DecodeError as error:
        failure = str(error)
    yield SoundPart(sound=0, samples=np.empty(0, np.float32), is_end=True, failure=failure)


def _workers(config: TagConfig, sounds: Sounds, *, on_gpu: bool) -> int:
    if config.workers is not None:
        return min(config.workers, len(sounds))
    if len(sounds) == 1 and sounds.encoded_bytes <= MAPPED_BYTES:
        return 0
    return min(usable_cores(), len(sounds), *(() if on_gpu else (_MAX_WORKERS,)))


def _takes_frames(config: TagConfig, models: Ensemble) -> bool:
    if config.timeline == "windows":
        return False
    if config.timeline == "auto":
        return models.is_fully_convolutional and (config.events or config.hop is not None)
    if models.frame_samples is None:
        raise UsageError(
            "--timeline frames: only students that take any length give a timeline by themselves, and several only if "
            "their steps are the same. Leave it out, and choose --hop"
        )
    return True


def _window_and_hop(config: TagConfig, *, frames: bool) -> tuple[float | None, float | None]:
    """Returns --window and --hop, or what they are where nobody gave them."""
    window, hop = config.window, config.hop
    if config.is_live:
        window = window or max(_STREAM_WINDOW, hop or 0)
        hop = hop or min(_STREAM_HOP, window)
    elif config.events and not frames:
        window = window or max(_EVENT_WINDOW, hop or 0)
        hop = hop or min(_EVENT_HOP, window)
    return window, hop


def _picker(config: TagConfig, vocabulary: Vocabulary) -> TagPicker:
    own = np.full(len(vocabulary), np.nan)
    if config.thresholds is not None:
        own = read_thresholds(config.thresholds, vocabulary)
    left_out = ~np.isin(np.arange(len(vocabulary)), kept_classes(config, vocabulary))

    def limits(otherwise: float, scale: float = 1.0) -> np.ndarray:
        """(classes,): a class's own threshold, or what the others have; infinite for those that are left out."""
        return np.where(left_out, np.inf, np.where(np.isnan(own), otherwise, own) * scale)

    rule = None
    if config.events:
        share = config.offset / config.onset if config.onset else 0.0
        onset, offset = limits(config.onset), limits(config.onset, share)
        rule = EventRule(onset=onset, offset=offset, shortest_seconds=config.shortest)
    return TagPicker(vocabulary.names, least=limits(config.least), top=config.top, rule=rule)


def _tokens(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _is_class_list(text: str) -> bool:
    return storage.is_remote(text) or text.lower().endswith(".csv") or storage.local_path(text).is_file()


def kept_classes(config: TagConfig, vocabulary: Vocabulary) -> list[int]:
    """Returns the indices of the classes that --classes keeps; all if it names none.

    Raises:
        UsageError: there is no such class.
    """
    wanted = [text for text in _tokens(config.classes) if not _is_class_list(text)]
    found = []
    for text in wanted:
        index = vocabulary.index_by_name.get(text, vocabulary.index_by_mid.get(text))
        if index is None:
            close = ", ".join(get_close_matches(text, vocabulary.names, n=3, cutoff=0.5))
            raise UsageError(f"--classes {text}: no such class{f'; did you mean {close}?' if close else ''}")
        found.append(index)
    return found if wanted else list(range(len(vocabulary)))


def load_models(config: TagConfig) -> Ensemble:
    """Load what --checkpoint names.

    Raises:
        PipelineError: one can't be used, or their classes differ.
    """
    lists = [text for text in _tokens(config.classes) if _is_class_list(text)]
    if len(lists) > 1:
        raise UsageError(f"--classes: {' and '.join(lists)} are two class lists; give one")
    classes = read_vocabulary(lists[0]) if lists else None
    models = [
        _exported_model(checkpoint, config) if _is_exported(checkpoint) else _torch_model(checkpoint, config, classes)
        for checkpoint in _tokens(config.checkpoint)
    ]
    return Ensemble(models)


def _is_exported(checkpoint: str) -> bool:
    return storage.file_name(checkpoint).lower().endswith(".onnx")


def _exported_model(checkpoint: str, config: TagConfig) -> WindowModel:
    from pipeline.exporting.onnx_model import OnnxModel

    return OnnxModel(checkpoint, config.device)


def _torch_model(checkpoint: str, config: TagConfig, classes: Vocabulary | None) -> WindowModel:
    # torch takes more than a second to import, which a refused command and an exported model need not wait for.
    with lasting_imports():
        from pipeline.models.device import choose_device, compute_in
        from pipeline.models.loading import load_model
        from pipeline.scoring.tagging import TorchTagger

    device = choose_device(config.device)
    compute_in("float32", [])
    options = read_options(config.model_options)
    model = load_model(checkpoint, model=config.model, options=options, classes=classes, device=device)
    return TorchTagger(model, config.device)
