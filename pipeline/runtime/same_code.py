"""Whether the machines that work together have the same version of this program: their results are put together."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pipeline.errors import UsageError

_PACKAGES = ("pipeline", "teacher", "student")


@cache
def code_version() -> str:
    """Returns the version of this program, and a hash of its modules' text."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return f"{version('audioset-distill')} ({found.hexdigest()[:12]})"


def check_code(of_driver: str) -> None:
    """Refuse to work for a program of another version.

    Args:
        of_driver: `code_version` there.

    Raises:
        UsageError: this machine has another one.
    """
    if code_version() != of_driver:
        raise UsageError(
            f"{platform.node()} has audioset-distill {code_version()}, but the run was started by {of_driver}. Give "
            "every machine the same image or installation"
        )
