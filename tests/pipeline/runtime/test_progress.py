import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.runtime import progress
from pipeline.runtime.output import console
from pipeline.runtime.progress import MetricLog, progress_bar, read_metrics


def test_every_figure_is_one_line_of_json(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log:
        log.write(1, {"train/loss": 0.5}, epoch=0)
        log.write(2, {"train/loss": 0.25, "train/learning_rate": 1e-3}, epoch=0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "epoch": 0, "train/loss": 0.25, "train/learning_rate": 1e-3}
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_resumed_log_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"train/loss": float(step)}, epoch=0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "tr')  # as a killed run leaves it
    with MetricLog(tmp_path, kept_lines=3, after_step=3) as log:
        log.write(4, {"train/loss": 40.0}, epoch=0)
        assert log.lines == 4
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_a_bar_draws_nothing_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("training", 10) as bar:
        bar.advance(4, note="loss 0.1")
        bar.set_total(4)
    assert capfd.readouterr() == ("", "")


def test_a_log_gets_a_line_a_minute_with_share_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.5)
    caplog.set_level(logging.INFO)
    threads = threading.active_count()
    with progress_bar("teacher logits", 2000, done=1000) as bar:
        bar.advance(500)
        while not caplog.messages:
            time.sleep(0.01)
    assert caplog.messages[0] == "teacher logits: 1,500 of 2,000 clips, 75 %, 1000.0 clips/s, 0:00:00 to go"
    assert threading.active_count() == threads


def test_a_line_tells_a_standstill_and_what_has_no_known_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    with progress_bar("index", None, unit="shards"):
        while not caplog.messages:
            time.sleep(0.01)
    assert caplog.messages[0] == "index: 0 shards, 0.0 shards/s"


def test_results_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("done")
    assert "done" in capsys.readouterr().out


FULL = """
import resource, signal, sys
from pathlib import Path
from pipeline.errors import StorageFullError
from pipeline.runtime.progress import MetricLog, read_metrics
run = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with MetricLog(run) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for step in range(1, 1000):
            log.write(step, {"train/loss": 0.5}, epoch=0)
except StorageFullError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit there")
def test_a_log_that_finds_no_room_is_one_error_and_keeps_its_lines(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "metrics.jsonl: there is no room left to write it" in done.stdout
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 10
