"""The Ray that a command uses: a cluster's, or one on this machine for as long as the command runs.

Import this module before Ray: it sets what Ray reads while it is imported.
"""

import atexit
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_tb
from typing import Any

# Ray reads these while it is imported and started. In order: `uv run` as launcher would make every worker rebuild the
# environment; no usage statistics are sent to Ray's makers; no internal notes between the lines of a progress bar; a
# cluster that is gone is asked for the better part of a minute, not for ten; a thread of Ray's own that outlives a
# session starts or joins no other one.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

from pipeline.errors import LostProcessError, PipelineError, UsageError
from pipeline.interruption import interrupt_main

try:
    import ray
except ModuleNotFoundError as error:
    raise UsageError(
        "Ray, which labels and packs in many processes, is not installed here; there is none for Intel Macs. The rest "
        "works without it: make the logits on another machine, and leave out --address and --ranks"
    ) from error
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray._raylet import InnerGcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError, RayError

from pipeline.runtime.cores import limit_threads, usable_cores
from pipeline.runtime.ray_address import address_source, cluster_address
from pipeline.runtime.scratch import socket_folder

_OBJECT_STORE_BYTES = 100 * 2**20
"""Shard names and reports are all that travels; the default would claim a third of the machine's memory."""
_ANSWER_SECONDS = 10
_START_SECONDS = 90
"""A busy machine takes longer than Ray's half a minute to start its first process."""
_HEAD_SECONDS = 40.0
"""How long a cluster's head may be gone: less than the minute after which Ray ends this process without a word."""
_LOOK_SECONDS = 2.0
_AGAIN_SECONDS = 5.0
_END_SECONDS = 30.0
"""How long Ray may take to end on this machine by itself, or to leave a cluster, which is a matter of seconds."""
_LONGEST_SOCKET_NAME = len("ray-4294967295/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")

_log = logging.getLogger(__name__)

limit_threads()  # before torch is loaded, in a process that Ray has started, on whatever machine


def _keep_for_the_log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
    for line in data.get("lines", ()):
        _log.debug("Ray says: %s", line)


# Whatever ends a worker, Ray prints paragraphs about it between a command's lines; `log_to_driver` does not cover that.
ray_worker.print_to_stdstream = _keep_for_the_log


@contextmanager
def running_ray(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or run Ray on this machine for as long as the block lasts; join a Ray that runs already.

    Raises:
        UsageError: there is no cluster at the address.
        PipelineError: Ray can't be started on this machine.
        LostProcessError: the cluster's head went away meanwhile.
    """
    cluster = cluster_address(address)
    if cluster is not None:
        _check_reachable(cluster)
    if ray.is_initialized():
        yield
        return
    if cluster is not None:
        _join(cluster)
        with _head_watched(ray.get_runtime_context().gcs_address):
            yield
        return
    _start()
    try:
        yield
    finally:
        _shut_down()


@contextmanager
def _head_watched(address: str) -> Iterator[None]:
    """Interrupt what the main thread does in the block where a cluster's head is gone, and say so.

    Raises:
        LostProcessError: it is.
    """
    gone, ended = threading.Event(), threading.Event()

    def watch() -> None:
        heard = time.monotonic()
        while not ended.wait(_LOOK_SECONDS):
            with suppress(OSError):
                _knock(address, _LOOK_SECONDS)
                heard = time.monotonic()
            if time.monotonic() - heard > _HEAD_SECONDS:
                gone.set()
                interrupt_main()
                ended.wait(_AGAIN_SECONDS)  # the first one may be taken for a wish to stop: ranks save, and that is all

    threading.Thread(target=watch, name="head of the cluster", daemon=True).start()
    try:
        yield
    except BaseException as error:
        ended.set()
        if not gone.is_set():
            raise
        raise LostProcessError(
            f"the head of the Ray cluster at {address} is gone. Start the cluster again; the same command goes on, for "
            "training with --resume"
        ) from error
    finally:
        ended.set()
        if not gone.is_set():  # else Ray would wait for it
            _leave(address)


def _leave(address: str) -> None:
    """Take leave of a cluster, which Ray waits for without a limit where the head stands still."""
    leaving = threading.Thread(target=ray.shutdown, name="leave of the cluster", daemon=True)
    leaving.start()
    leaving.join(_END_SECONDS)
    if leaving.is_alive():
        _log.warning("the Ray cluster at %s has not answered for %g s: left all the same", address, _END_SECONDS)
        atexit.unregister(ray_worker.shutdown)  # Ray's own last try, at the end of this process


def _shut_down() -> None:
    """End the Ray that was started here, which waits for its daemons without a limit: what stands still is killed."""
    node = ray_worker._global_node

    def kill() -> None:
        _log.warning("Ray has not ended within %g s: its processes are killed", _END_SECONDS)
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=False)

    timer = threading.Timer(_END_SECONDS, kill)
    timer.daemon = True
    timer.start()
    try:
        ray.shutdown()
    finally:
        timer.cancel()


def _join(address: str) -> None:
    try:
        _init(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        # Ray's own of versions, of itself or of Python, have nothing that says what to do.
        remedy = ". Give every machine the same image or installation" if "ersion mismatch" in str(error) else ""
        raise UsageError(f"{address_source(address)}: {_reason(error)}{remedy}") from error


def _start() -> None:
    """Start Ray on this machine; once more where it did not come up in time, as on a machine that is very busy."""
    _give_token()
    folder = _session_folder()
    options = {
        "num_cpus": usable_cores(),  # a cluster's machines were counted when they joined it
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": str(folder),
    }
    for tries_left in (1, 0):
        try:
            with _more_time():
                _init("local", **options)
        except Exception as error:  # Ray has no class of its own for it
            _end_what_was_started(error)
            if tries_left and not isinstance(error, OSError | ValueError):
                _log.warning("Ray did not start (%s); trying once more", _reason(error))
                continue
            raise PipelineError(
                f"Ray can't be started on this machine: {_reason(error)}. Where the machine is too busy, or a limit on "
                f"memory, processes or open files too low, change that; Ray's own logs are in {folder}/session_latest/"
                "logs"
            ) from error
        return


@contextmanager
def _more_time() -> Iterator[None]:
    name = "RAY_gcs_server_port_wait_time_s"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(_START_SECONDS)
    try:
        yield
    finally:
        del os.environ[name]


def _init(address: str, **options: Any) -> None:
    with _muted_stderr():  # a note that the log level above was understood
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0].rstrip(".")
    return " ".join(text.split()) if first.endswith(":") else first


def _session_folder() -> Path:
    """Returns the folder of Ray's sessions: where Ray's own tools look, unless its path is too long or not ours."""
    folder = socket_folder(_LONGEST_SOCKET_NAME, variable="RAY_TMPDIR") / "ray"
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):  # another user's
        folder = folder.with_name(f"ray-{os.getuid()}")
    return folder


def _give_token() -> None:
    """Give a local Ray the secret that its processes know each other by where Ray can't keep one in the home folder."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    with suppress(OSError, RuntimeError):  # a home that can't be written, or none at all
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / "auth_token"
        if os.access(token, os.R_OK) if token.exists() else os.access(folder, os.W_OK):
            return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _end_what_was_started(error: Exception) -> None:
    """End the processes of a Ray that did not come up, of which Ray itself keeps no record."""
    for frame, _ in walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check first whether the head of a cluster is there that lets us in: Ray itself would try for many minutes."""
    if ":" not in address:  # `auto`
        return
    try:
        _knock(address, _ANSWER_SECONDS)
    except OSError as error:
        raise UsageError(
            f"{address_source(address)}: no Ray cluster answers there ({error.strerror or error})"
        ) from error
    try:
        with _muted_stderr():
            InnerGcsClient.standalone(address, None, 1000 * _ANSWER_SECONDS)
    except AuthenticationError as error:
        raise UsageError(
            f"{address_source(address)}: the cluster wants its token, with RAY_AUTH_MODE=token ({_reason(error)})"
        ) from error
    except RayError as error:
        raise UsageError(
            f"{address_source(address)}: what answers there is no head of a Ray cluster ({_reason(error)}). Its port "
            "is 6379 as a rule; the dashboard (8265) and Ray's client (10001) have others"
        ) from error


def _knock(address: str, seconds: float) -> None:
    """Connect to HOST:PORT, or raise OSError."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()


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
