"""The commands that the docs show are run as they stand, in a folder that holds what they name, or it is said why not.

What stands for what nobody has here: tiny sets in the published layouts, random weights under the names of released
files, the sample's tiny teachers for the large ones, one short epoch for a training. `/data` is a folder of the test's,
`s3://bucket` a bucket on a server of this machine. A new command in the docs is run like the others; what can't be run
needs a line in `NOT_RUN`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from cyclopts import CycloptsError
from documented_commands import ShownCommand, shown_commands
from documented_world import lay_out, lay_weights
from object_servers import ACCESS_KEY, SECRET_KEY, S3Server

from pipeline.cli import build_app, run

pytestmark = pytest.mark.ray

NOT_RUN = {
    "make ": "takes minutes: the gate runs `make test`, and `make demo` in a fresh clone",
    "pip install|npm pack": "asks a package index",
    "ray |DATA=.* sbatch |.*--ranks 8": "needs a cluster: `make cluster-test`, tests/test_cluster_jobs.py",
    "export RAY_AUTH_MODE": "changes the shell alone",
    r"docker |cp \.env": "needs containers: docs/docker.md says how each was run",
    "arecord |ffmpeg -i rtsp": "needs a microphone or a camera: tests/pipeline/commands/test_tag_at_length.py",
    "python -m http.server": "serves until somebody stops it",
    "hear-validator": "is somebody else's: tests/pipeline/embeddings/test_hear.py has what it asks for",
    "pipeline plan": "measures for a minute: tests/pipeline/commands/test_plan_command.py",
    ".*--teacher hf:|.*--to hf://": "asks the Hub: tests/pipeline/publishing, labelling/test_foreign_teachers.py",
    r".*three_teachers\.toml": "loads three transformers in full size: tests/pipeline/runtime/test_recipes.py reads it",
    ".*my_sounds:build": "tests/test_docs_teachers.py runs that page's module",
    "pipeline finetune (esc50|fsd50k|openmic|dcase20)": "trains many times: tests/integration/test_finetune.py",
    "pipeline export (runs/mn|mn10=)|.*--web": "takes 10 s: tests/pipeline/exporting; one of them is run here",
    "pipeline publish runs/mn10": "takes 10 s; that of docs/publish.md is run",
    "pipeline import-logits": "FILE stands for three formats: tests/pipeline/commands/test_import_logits.py",
}
"""How commands begin that are not run here → why, and what shows that they are right."""
TINY = {
    "passt_s_swa_p16_128_ap476": "passt_tiny=manifests/sample/passt_tiny.safetensors",
    "passt_s@2": "passt_tiny=manifests/sample/passt_tiny.safetensors@2",
    "ced_tiny": "passt_tiny=manifests/sample/passt_tiny.safetensors",
    "ast_base": "ast_tiny=manifests/sample/ast_tiny.safetensors",
    "ast_base=~/ast/model.safetensors": "ast_tiny=manifests/sample/ast_tiny.safetensors",
}
SHORT = {
    "train-student": "--epochs 1 --clips-per-epoch 2 --batch-size 2 --workers 0",
    "publish": "--no-onnx",
    "finetune": "--epochs 1 --batch-size 4 --workers 0",
    "ingest": "--workers 1",
    **dict.fromkeys(("evaluate", "report", "embed", "tag"), "--workers 0"),
}
"""Flags of how much, never of what, which are added or take the place of the command's."""
MADE = ("--out", "--run", "--to", "--train", "--eval")
"""Flags that name what a command makes; stage 1's store, too."""
RANKS = "--data data/mine --model mn01 --epochs 1 --batch-size 4 --workers 0 --run runs/ranks"
"""For the `…` of a command that torchrun starts."""


def is_complete(shown: ShownCommand) -> bool:
    """Whether a command can be typed; a sentence may name no more of it than a flag."""
    if shown.whole or not shown.line.startswith("pipeline") or "…" in shown.line:
        return shown.whole
    try:
        build_app().parse_args(shlex.split(shown.line)[1:], exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError):
        return False
    return " -" in shown.line


def reason_against(command: str) -> str | None:
    return next((why for beginning, why in NOT_RUN.items() if re.match(beginning, command)), None)


ALL = list(shown_commands())
COMMANDS = {shown.line: shown for shown in reversed(ALL) if is_complete(shown)}
"""Each once: where it is shown first."""
RUN = [shown for shown in reversed(COMMANDS.values()) if reason_against(shown.line) is None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, s3: S3Server, make_dataset: Callable[..., Path]) -> Iterator[Path]:
    """A folder with all that the commands name, and the environment that finds released weights and the server."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        keys = {"ACCESS_KEY_ID": ACCESS_KEY, "SECRET_ACCESS_KEY": SECRET_KEY, "DEFAULT_REGION": "us-east-1"}
        for name, value in {"ENDPOINT_URL": s3.endpoint, **keys}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("TORCH_HOME", str(folder / "cache"))
        patch.chdir(folder)
        lay_out(folder, make_dataset, do)
        shutil.copytree(folder / "data/mine", s3.folder / "bucket/mine")
        yield folder


@pytest.fixture(scope="module")
def folders(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the working folder of a page, in which its commands are run in their order."""

    @cache
    def of_page(page: str) -> Path:
        folder = tmp_path_factory.mktemp("page") / "world"
        return Path(shutil.copytree(world, folder, symlinks=True, ignore=shutil.ignore_patterns("cache")))

    return of_page


def do(line: str) -> None:
    assert run(shlex.split(line)) == 0, line


def words_here(line: str, folder: Path) -> list[str]:
    """Returns a command's words with what stands for things that nobody has here, and with less to do."""
    words = [TINY.get(word, re.sub("^/data/", f"{folder}/data/", word)) for word in shlex.split(line)[1:]]
    words = [word.replace("mn10_as", "runs/mn10") if words[0] == "export" else word for word in words]
    for flag, *value in map(str.split, re.findall(r"--\S+(?: [^-]\S*)?", SHORT.get(words[0], ""))):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 1 + len(value)]
        words += [flag, *value]
    return [str(path) for word in words for path in (sorted(folder.glob(word)) if "*" in word else [word])]


def make_room(words: list[str]) -> None:
    """Remove what a command is to make, unless it adds to that."""
    for flag, value in pairwise(words):
        made = flag in MADE or (words[0], flag) == ("teacher-logits", "--store")
        if made and "--add" not in words and not value.startswith("s3:"):
            shutil.rmtree(value, ignore_errors=True)


@pytest.mark.parametrize("shown", RUN, ids=str)
def test_a_shown_command_does_its_work(
    shown: ShownCommand,
    folders: Callable[[str], Path],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folders(shown.page)
    monkeypatch.chdir(folder)
    words = words_here(shown.line, folder)
    make_room(words)
    lay_weights(folder, words)
    if words[0] == "teacher-logits":
        request.getfixturevalue("shared_ray")
    exit_code = run(words)
    assert exit_code == 0, capsys.readouterr().err


def test_what_is_not_run_is_shown_somewhere() -> None:
    left_out = [line for line in COMMANDS if reason_against(line)]
    unused = [beginning for beginning in NOT_RUN if not any(re.match(beginning, line) for line in left_out)]
    assert not unused, "the docs show no such command any more"
    assert len(RUN) > 40


def test_the_line_for_torchrun_trains_as_it_stands(world: Path) -> None:
    [line] = {shown.line for shown in ALL if shown.line.startswith("torchrun --standalone")}
    typed = line.replace("--nproc-per-node 8", "--nproc-per-node 2").replace("…", RANKS)
    program = Path(sys.executable).parent / "torchrun"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [str(program), *shlex.split(typed)[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert (world / "runs/ranks/last.safetensors").exists()
