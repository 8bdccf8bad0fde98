"""The decoding processes that a test has started, and nothing that an earlier test shares with others, such as Ray."""

import psutil


def decoding_processes() -> list[psutil.Process]:
    """Returns those that live."""
    return [child for child in psutil.Process().children() if _decodes(child)]


def _decodes(process: psutil.Process) -> bool:
    try:
        return "pipeline.decoding.worker" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended; a zombie has no command line any more
        return False
