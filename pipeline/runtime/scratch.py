"""Folders for what lives as long as a run."""

import os
import tempfile
from pathlib import Path

from pipeline.errors import PipelineError

LONGEST_SOCKET_PATH = 103
"""Bytes that the path of a Unix socket may have on every system: 107 on Linux, 103 on macOS."""


def socket_folder(longest_name: int, *, variable: str = "TMPDIR") -> Path:
    """Returns a folder for temporary files in which sockets can be opened, too.

    The temporary folder, where its path is short enough; batch systems and macOS give longer ones. Else the first
    that is there of those that systems have.

    Args:
        longest_name: bytes that follow the folder's path in the path of a socket.
        variable: the environment variable that somebody may choose the folder by; then it must do.

    Raises:
        PipelineError: there is none.
    """
    longest = LONGEST_SOCKET_PATH - longest_name - 1
    chosen = os.environ.get(variable) if variable != "TMPDIR" else None
    candidates = [chosen] if chosen else [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    for candidate in candidates:
        folder = Path(candidate).absolute()
        if len(os.fsencode(folder)) <= longest and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise PipelineError(
        f"no folder for sockets: {' and '.join(candidates)} can't be written or have paths of more than {longest} "
        f"bytes. Set {variable} to a folder with a shorter path"
    )
