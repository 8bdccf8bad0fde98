"""The command line: finds the command, reads its recipe, turns errors into one line and an exit code.

It holds no logic. Each command is one module of `pipeline.commands` with one settings class and one function, and is
imported only when it is called, so that `--help` answers at once.
"""

import logging
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict
from rich.markup import escape

from pipeline.errors import PipelineError, UsageError
from pipeline.redaction import install, redact, redacted_traceback
from pipeline.runtime.cores import limit_threads
from pipeline.runtime.imports import lasting_imports
from pipeline.runtime.last_resort import explain, keep_traceback, speak_in_lines
from pipeline.runtime.output import (
    LineHandler,
    NobodyReadsError,
    accept_any_text,
    console,
    flush_output,
    forget_messages,
    status_console,
)
from pipeline.runtime.renamed_settings import present_flag, present_settings
from pipeline.runtime.stopping import StoppedError, stopping_signal

COMMANDS = {
    "ingest audioset": ("ingest_audioset", "AudioSet's CSV and audio files → a dataset of shards and a manifest."),
    "ingest passt": ("ingest_passt", "PaSST's and EfficientAT's HDF5 files, MP3 bytes as they are → a dataset."),
    "ingest panns": ("ingest_panns", "PANNs' HDF5 files of waveforms, as FLAC → a dataset."),
    "ingest huggingface": ("ingest_huggingface", "The Hugging Face Hub's Parquet, bytes as they are → a dataset."),
    "ingest webdataset": ("ingest_webdataset", "WebDataset tars of any layout, or bare tars and a list → a dataset."),
    "ingest folder": ("ingest_folder", "A folder of sounds for each class → a dataset."),
    "ingest csv": ("ingest_csv", "Any CSV of paths and labels, and the sounds → a dataset."),
    "index": ("index_dataset", "A manifest for WebDataset tars that somebody else made."),
    "split": ("split_dataset", "A dataset → one for training and one for evaluation, by id hash."),
    "merge": ("merge_datasets", "Several datasets → one; of a clip in several, the first counts."),
    "reshard": ("reshard_dataset", "A dataset in shards of another size."),
    "teacher-logits": ("teacher_logits", "Stage 1: run transformers over a dataset on Ray → a store of their logits."),
    "import-logits": ("import_logits", "Logits that another program made, EfficientAT's and CED's too → a store."),
    "reweight": ("reweight", "Another store from one that keeps its members: other weights, or a smaller copy."),
    "train-student": ("train_student", "Stage 2: train a small CNN on shards joined with the teachers' logits."),
    "train-teacher": ("train_teacher", "Fine-tune a transformer on a dataset's own classes."),
    "finetune esc50": ("finetune_esc50", "ESC-50 as published: five folds, accuracy."),
    "finetune fsd50k": ("finetune_fsd50k", "FSD50K as published: mAP on its evaluation set."),
    "finetune openmic": ("finetune_openmic", "OpenMIC-2018 as published: mAP over the known instruments."),
    "finetune dcase20": ("finetune_dcase20", "TAU Urban Acoustic Scenes 2020 Mobile as published: accuracy."),
    "finetune dataset": ("finetune_dataset", "Any dataset, with one class a clip or any number of them."),
    "evaluate": ("evaluate", "mAP, ROC AUC, d' and a per-class table of checkpoints and stores."),
    "compare": ("compare", "Several runs and their teachers side by side: one table, one picture."),
    "report": ("report", "What runs learned, as one HTML file that opens without a network."),
    "publish": ("publish", "A model, a store or a dataset as others can use it: a folder with a card, or the Hub."),
    "tag": ("tag", "What is to be heard in sound files."),
    "export": ("export", "A student as one ONNX file that runs anywhere, compared with its checkpoint first."),
    "embed": ("embed", "An embedding of each clip, of a student's or a teacher's layers → Parquet."),
    "probe": ("probe", "What embeddings are worth on a dataset's classes, by a linear classifier, cross-validated."),
    "teachers": ("teachers", "The teachers that can be named: cost, published mAP, licence, cached or not."),
    "students": ("students", "The students that can be named: cost, published mAP, licence, cached or not."),
    "plan": ("plan", "Hours, GPU hours and bytes of both stages, from measured speeds, before anything runs."),
    "inspect": ("inspect_path", "What a dataset, a store or a run holds; coverage of one by the other."),
    "verify": ("verify_path", "Read a dataset, a store or a run again, list every fault, and repair what can be."),
}
"""Command → module of `pipeline.commands` and a line of help."""


_STANDARD_INPUT = {"-": "/dev/stdin"}
"""A lone hyphen is no option, which the parser would take it for."""


def build_app(called: str = "") -> App:
    """Build the command tree; the commands' modules are not imported yet.

    Args:
        called: The command that will run, such as `train-student`: its help is its function's whole docstring. The
            other commands show their line of `COMMANDS`.
    """
    app = App(
        name="pipeline",
        help="Distil AudioSet transformers into small CNNs: teacher logits once, on Ray; students from tar shards.",
        help_epilogue="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM.",
        version=lambda: version("audioset-distill"),
        default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
        result_action="return_none",
        exit_on_error=False,
        print_error=False,
        console=console(),
        suppress_keyboard_interrupt=False,
    )
    groups = {
        "ingest": App(name="ingest", help="Turn audio that you have into a dataset of shards and a manifest."),
        "finetune": App(name="finetune", help="Train a pretrained student on another set, with its field's protocol."),
    }
    for group in groups.values():
        app.command(group)
    for command, (module, help_line) in COMMANDS.items():
        group, _, name = command.rpartition(" ")
        help_text = {} if command == called else {"help": help_line}
        groups.get(group, app).command(f"pipeline.commands.{module}:run", name=name, **help_text)
    app.meta.suppress_keyboard_interrupt = False  # `meta` does not inherit it, and would exit without a word
    app.meta.default(_launcher(app))
    return app


def _launcher(app: App) -> Callable[..., None]:
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(name="--config")] = None,
        offline: Annotated[bool, Parameter(negative="")] = False,
        verbose: Annotated[bool, Parameter(negative="")] = False,
    ) -> None:
        """Run one command.

        Args:
            tokens: The command and its flags.
            config: A TOML recipe: any of the command's flags as keys, nested ones as tables. Flags on the command
                line win over it.
            offline: Fetch no released weights: use what is in the caches. The same as HF_HUB_OFFLINE=1.
            verbose: Log what the program does, and show where an error came from.
        """
        _log_lines(verbose)
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # where the Hub's client and the processes of a run look, too
        if config is not None:
            app.config = (_recipe(config),)
        try:
            with lasting_imports():  # of the command's module
                command, bound, _ = app.parse_args(
                    [_STANDARD_INPUT.get(token, present_flag(token)) for token in tokens]
                )
        except ValueError as error:  # a settings class refused a value
            raise UsageError(str(error)) from error
        result = command(*bound.args, **bound.kwargs)
        if getattr(result, "finished", True) is False:
            raise StoppedError

    return launch


def _called_command(arguments: Sequence[str]) -> str:
    words = " ".join(argument for argument in arguments if not argument.startswith("-"))
    return next((command for command in COMMANDS if f"{words} ".startswith(f"{command} ")), "")


def _recipe(path: Path) -> Dict:
    try:
        with path.open("rb") as stream:
            settings = tomllib.load(stream)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: not a TOML file: {error}") from error
    source = str(path.absolute())
    return Dict(present_settings(settings, source), source=source, use_commands_as_keys=False, allow_unknown=False)


def _log_lines(verbose: bool) -> None:
    handler = LineHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s" if verbose else "%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("pipeline", "teacher", "student"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by a signal."""
    install()
    verbose = "--verbose" in arguments
    try:
        build_app(_called_command(arguments)).meta(list(arguments))
        flush_output()
    except CycloptsError as error:
        return _complain(str(error), 2)
    except PipelineError as error:
        return _complain(str(error), error.exit_code, error if verbose else None)
    except NobodyReadsError:
        return 0
    except StoppedError:
        return 128 + stopping_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        return _complain("stopped; the same command goes on from here", 128 + stopping_signal(signal.SIGINT))
    except Exception as error:
        return _complain(f"{explain(error)}. {keep_traceback(error)}", 1, error if verbose else None)
    return 0


def _complain(message: str, exit_code: int, shown: Exception | None = None) -> int:
    if shown is not None and exit_code == 1:
        trace = redacted_traceback(type(shown), shown, shown.__traceback__)
        status_console().print(trace, markup=False, soft_wrap=True)
    status_console().print(f"[bold red]error:[/] {escape(redact(message))}", soft_wrap=True)
    return exit_code


def main() -> None:
    """Entry point of the `pipeline` command."""
    limit_threads()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are pages long, of connections that break
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # on the CPU is done what Apple's GPUs can't do
    accept_any_text()
    speak_in_lines()
    exit_code = run(sys.argv[1:])
    forget_messages()
    sys.exit(exit_code)
