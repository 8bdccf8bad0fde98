"""Starts processes that train together on this machine, as torchrun would, without its seconds of imports for each."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line has it
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.utils.tensorboard", "pandas", "pipeline.training.run", "student", "tiny_learner"]
)


def run_ranks(
    size: int, target: Callable[..., Any], *arguments: Any, timeout: float = 120, last: float | None = None
) -> list[Any]:
    """Call `target(*arguments)` in `size` processes; give what each returned or raised, or its exit code if killed.

    Args:
        size: how many.
        target: what they do.
        arguments: for that.
        timeout: how long the first one may take, in seconds.
        last: how long each of the others may take from then on, if not as long; what takes longer is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(theirs, rank, size, port, target, arguments), daemon=False)
        process.start()
        theirs.close()
        started.append((process, ours))
    outcomes: dict[int, Any] = {}
    while len(outcomes) < size:
        seconds = last if outcomes and last is not None else timeout
        waiting = {ours: rank for rank, (_, ours) in enumerate(started) if rank not in outcomes}
        answered = wait(list(waiting), seconds)
        for pipe in answered or waiting:
            outcomes[waiting[pipe]] = _end(*started[waiting[pipe]], answered=bool(answered), timeout=seconds)
    return [outcomes[rank] for rank in range(size)]


def _end(process: Any, pipe: Any, *, answered: bool, timeout: float) -> Any:
    """Returns what became of a process, and sees that it is gone."""
    outcome: Any = TimeoutError(f"no answer in {timeout} s")
    if answered:
        try:
            outcome = pipe.recv()
            process.join(30)
        except EOFError:  # it was killed
            process.join()
            outcome = process.exitcode
    if process.is_alive():
        process.kill()
    return outcome


def _run(pipe: Any, rank: int, size: int, port: int, target: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        pipe.send(target(*arguments))
    except Exception as error:  # the test wants to see it
        pipe.send(error)
