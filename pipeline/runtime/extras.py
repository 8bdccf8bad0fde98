"""Packages that only some commands need: what is missing, and the extra that brings it."""

from importlib.util import find_spec

from pipeline.errors import UsageError


def missing_packages(*packages: str, extra: str) -> str:
    """Returns what is not installed and how to install it, such as `jinja2: pip install …`; empty where all is there.

    Args:
        packages: the modules that are imported.
        extra: of this project's, which brings them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    return f"{', '.join(missing)}: pip install 'audioset-distill[{extra}]'" if missing else ""


def check_packages(command: str, *packages: str, extra: str) -> None:
    """Refuse to begin what can't be ended.

    Args:
        command: what needs them, for the message.
        packages: the modules that are imported.
        extra: of this project's, which brings them.

    Raises:
        UsageError: some are not installed.
    """
    if missing := missing_packages(*packages, extra=extra):
        raise UsageError(f"{command} needs {missing}")
