"""The Ray that a command uses: a cluster's, or one on this machine for as long as the command runs.

Import this module before Ray: it sets what Ray reads while it is imported.
"""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ray reads these while it is imported and started. In order: `uv run` as launcher would make every worker rebuild the
# environment; no usage statistics are sent to Ray's makers; no internal notes between the lines of a progress bar.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray

from pipeline.errors import UsageError
from pipeline.runtime.cores import usable_cores

_OBJECT_STORE_BYTES = 100 * 2**20
"""Shard names and reports are all that travels; the default would claim a third of the machine's memory."""


@contextmanager
def running_ray(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or run Ray on this machine for as long as the block lasts; join a Ray that runs already.

    Raises:
        UsageError: there is no cluster at the address.
    """
    if address is not None:
        _check_reachable(address)
    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = {}
    if address is None:  # a cluster's machines were counted when they joined it
        local = {"num_cpus": usable_cores(), "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        with _muted_stderr():  # a note that the log level above was understood
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "Ray can't be started on this machine" if address is None else f"--address {address}"
        raise UsageError(f"{where}: {str(error.__cause__ or error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check first whether anybody is there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UsageError(
                f"--address {address}: no Ray cluster answers there ({error.strerror or error})"
            ) from error


@contextmanager
def _muted_stderr() -> Iterator[None]:
    # Ray's C++ part writes to the descriptor, past `sys.stderr`.
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
