"""A command of a test's own in a process of its own, on the real command line."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import sys, types
from pipeline import cli

module = types.ModuleType("pipeline.commands.made")
exec(sys.argv.pop(1), module.__dict__)
sys.modules[module.__name__] = module
cli.COMMANDS["made"] = ("made", "What a test made.")
cli.main()
"""


def command_line(body: str, *flags: str) -> list[str]:
    """Say how to start `pipeline made`, whose function does what `body` says; it knows `log`."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    source = f'import logging\nlog = logging.getLogger("pipeline.made")\ndef run() -> None:\n    """Do it."""\n{lines}'
    return [sys.executable, "-c", _PROGRAM, source, "made", *flags]


def run_command(body: str, *flags: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end; its temporary files lie in `tmp_path`."""
    return subprocess.run(
        command_line(body, *flags),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path), **environment},
    )
