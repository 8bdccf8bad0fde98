"""Whether the machines that work together have the same version of this program and of what computes in it.

Their results are put together. Ray itself lets in no machine that has another Ray or Python.
"""

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.errors import UsageError

_OWN = ("pipeline", "teacher", "student")
_COMPUTING = ("torch", "torchaudio", "timm", "numpy", "soundfile", "av")
"""What decodes, and what networks are made of: another version may give other logits."""


@cache
def code_version() -> str:
    """Returns the version of this program, and a hash of its modules' text."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in _OWN for path in (root / package).rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return f"{version('audioset-distill')} ({found.hexdigest()[:12]})"


def versions() -> dict[str, str]:
    """Returns the versions of this program and of what computes in it, for `check_versions` elsewhere."""
    return {"audioset-distill": code_version(), **{package: _release(package) for package in _COMPUTING}}


def check_versions(of_driver: Mapping[str, str]) -> None:
    """Refuse to work for a program of other versions.

    Args:
        of_driver: `versions` there.

    Raises:
        UsageError: this machine has others.
    """
    here = versions()
    if unlike := [package for package, release in of_driver.items() if here.get(package) != release]:
        ours, theirs = (", ".join(f"{one} {of.get(one, 'none')}" for one in unlike) for of in (here, of_driver))
        raise UsageError(
            f"{platform.node()} has {ours}, but the run was started by {theirs}. Give every machine the same image or "
            "installation"
        )


def _release(package: str) -> str:
    """Returns a version without what its build was made for: machines with and without GPUs have different ones."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "none"
