"""What a run shows while it works, progress bars, and what it writes down, metric logs."""

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.runtime.output import status_console
from pipeline.storage.files import exists, join_path, lack_of_room_told, publish_bytes, read_bytes

METRICS_NAME = "metrics.jsonl"
LINE_SECONDS = 60.0
"""How often a line tells how far a run is where there is no terminal."""

_log = logging.getLogger(__name__)


class ProgressBar:
    """One bar on the terminal; without a terminal, where a log collects what is said, a line a minute."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, clips: int = 1, note: str | None = None) -> None:
        """Count `clips` more as done; `note` replaces the text at the end of the line."""
        if note is None:
            self._progress.advance(self._task, clips)
        else:
            self._progress.update(self._task, advance=clips, note=note)

    def set_total(self, clips: int) -> None:
        """Set how many clips there are in all, once that is known."""
        self._progress.update(self._task, total=clips)


@contextmanager
def progress_bar(title: str, total: int | None, *, done: int = 0, unit: str = "clips") -> Iterator[ProgressBar]:
    """Show a bar with the count, the speed and the time left while the block runs.

    Args:
        title: what is being done, a word or two.
        total: how many there are; None where nobody knows yet.
        done: how many of them an earlier run did.
        unit: what is counted, in the plural.
    """
    status = status_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _SpeedColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # Without a terminal a log file would only collect escape codes.
    with Progress(*columns, console=status, disable=not status.is_terminal, expand=True) as progress:
        bar = ProgressBar(progress, progress.add_task(title, total=total, completed=done, note=""))
        with nullcontext() if status.is_terminal else _told_in_lines(progress.tasks[0], unit):
            yield bar


@contextmanager
def _told_in_lines(task: Task, unit: str) -> Iterator[None]:
    ended = threading.Event()

    def tell() -> None:
        before = task.completed
        while not ended.wait(LINE_SECONDS):
            speed, before = (task.completed - before) / LINE_SECONDS, task.completed
            _log.info("%s: %s", task.description, _state(task.completed, task.total, speed, unit))

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LINE_SECONDS)


def _state(done: float, total: float | None, speed: float, unit: str) -> str:
    """Say how far a run is, such as `1,200 of 2,000 clips, 60 %, 120.5 clips/s, 0:00:07 to go`."""
    parts = [f"{done:,.0f} {unit}" if total is None else f"{done:,.0f} of {total:,.0f} {unit}"]
    if total:
        parts.append(f"{done / total:.0%}".replace("%", " %"))
    parts.append(f"{speed:.1f} {unit}/s")
    if total and speed:
        parts.append(f"{timedelta(seconds=round((total - done) / speed))} to go")
    return ", ".join(parts)


class _SpeedColumn(ProgressColumn):
    """The mean speed of the last seconds, such as `120.5 clips/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self._unit}/s" if speed else f"- {self._unit}/s", style="progress.data.speed")


class MetricLog:
    """Writes a run's metrics twice: `metrics.jsonl`, one object a line, and TensorBoard events.

    Args:
        run: the local run folder.
        kept_lines: how many lines of `metrics.jsonl` to keep. A run that resumes drops those that a killed process
            wrote after its last checkpoint, so that its log reads like that of an uninterrupted run.
        after_step: the step that the run goes on from; TensorBoard hides what came later.
    """

    def __init__(self, run: Path, *, kept_lines: int = 0, after_step: int = 0) -> None:
        # TensorBoard takes seconds to import; commands that train nothing should not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        self._path = path = run / METRICS_NAME
        kept = _whole_lines(path)[:kept_lines]
        publish_bytes(path, b"".join(kept))
        self.lines = len(kept)
        """Lines of `metrics.jsonl` so far."""
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, values: Mapping[str, float], *, epoch: int) -> None:
        """Write the metrics of one step.

        Args:
            step: optimizer steps so far, counted over all epochs.
            values: name → value. A name such as `train/loss` is shown under `train` in TensorBoard.
            epoch: the epoch that the step belongs to, from 0.

        Raises:
            StorageFullError: there is no room for them; a resumed run drops the line that is cut short.
        """
        with lack_of_room_told(self._path):
            self._file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
            self._file.flush()
            self.lines += 1
            for name, value in values.items():
                self._events.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Close both files.

        Raises:
            StorageFullError: there is no room for their last lines.
        """
        with lack_of_room_told(self._path):
            try:
                self._file.close()
            finally:
                self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """Read a run's `metrics.jsonl`; a last line that a killed run left unfinished is passed over."""
    return [json.loads(line) for line in _whole_lines(join_path(run, METRICS_NAME))]


def _whole_lines(location: str | Path) -> list[bytes]:
    if not exists(location):
        return []
    return [line for line in read_bytes(location).splitlines(keepends=True) if line.endswith(b"\n")]
