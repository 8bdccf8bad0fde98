"""No wait of the product is without a limit, but for those that are told here with the reason why they end."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

BARE = {"accept", "acquire", "communicate", "get", "join", "recv", "result", "wait"}
"""Methods that wait for ever where they are given neither a time nor anything else. A GPU's `synchronize` is none of
them: kernels only compute, and where the driver stands still, whoever waits for that process sees that it does."""
TIMED = {"ray.get", "ray.wait", "socket.create_connection", "subprocess.call", "subprocess.check_call"}
TIMED |= {"subprocess.check_output", "subprocess.run", "urllib.request.urlopen"}
"""Functions that wait for ever without a `timeout`."""
POOLS = {"ThreadPoolExecutor", "ProcessPoolExecutor", "Pool"}
"""Whoever waits for their work has no limit, nor has the end of the process: `pipeline.runtime.threads` has both."""

LOOKS_ITSELF = "its `result` looks for signs of life, and gives up without"
NEWS_OR_NOTHING = "a daemon thread that does nothing else: nobody waits for it, and it ends with its process"
LIMITED_REQUESTS = "each request has limits of its own, see `pipeline.storage.remote.stores`"

REASONS = {
    "pipeline/decoding/parts_ahead.py: order.result()": LOOKS_ITSELF,
    "pipeline/decoding/pool.py: order.result()": LOOKS_ITSELF,
    "pipeline/decoding/pool.py: self._outgoing.get()": NEWS_OR_NOTHING,
    "pipeline/decoding/worker.py: messages.get()": "a process that works for another one, and ends with it",
    "pipeline/ingest/preparing.py: begun.order.result()": LOOKS_ITSELF,
    "pipeline/labelling/label_actor.py: publisher.wait()": "whoever waits for the actor sees that it stands still",
    "pipeline/labelling/publisher.py: last.result()": "whoever waits for the actor sees that it stands still",
    "pipeline/labelling/publisher.py: self.wait()": "whoever waits for the actor sees that it stands still",
    "pipeline/labelling/shard_decoder.py: current.prepared.popleft().result()": LOOKS_ITSELF,
    "pipeline/labelling/shard_decoder.py: order.result()": LOOKS_ITSELF,
    "pipeline/labelling/shard_fetching.py: self._jobs[number].result()": LOOKS_ITSELF,
    "pipeline/models/weights_cache.py: job.result()": LOOKS_ITSELF,
    "pipeline/runtime/threads.py: job.result()": LOOKS_ITSELF,
    "pipeline/runtime/threads.py: self._jobs.get()": NEWS_OR_NOTHING,
    "pipeline/storage/cache.py: lock.acquire()": "the folder's lock was given a time when it was made, and the "
    "name of the other one was drawn just now",
    "pipeline/storage/one_writer.py: lease.acquire()": "it is refused where another one has it, not waited for",
    "pipeline/storage/remote/calls.py: answer.result()": LIMITED_REQUESTS,
    "pipeline/storage/remote/calls.py: queue.get()": NEWS_OR_NOTHING,
    "pipeline/training/heartbeats.py: work.wait()": "it is completed by then, and raises what went wrong",
    "pipeline/training/rank_board.py: self._stop.wait()": "`asyncio.wait_for` around it limits it",
    "pipeline/training/ray_ranks.py: done.result()": "it is done by then",
}


def unlimited_waits(path: Path) -> Iterator[str]:
    """Yields the calls of a module that may wait for ever, as they stand there."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        is_bare = isinstance(node.func, ast.Attribute) and node.func.attr in BARE and not node.args
        if (
            (is_bare and not given & {"timeout", "blocking"})
            or (function in TIMED and "timeout" not in given)
            or function.rpartition(".")[2] in POOLS
        ):
            yield f"{path.relative_to(ROOT).as_posix()}: {ast.unparse(node)}"


def test_each_wait_has_a_limit_or_a_reason_why_it_ends() -> None:
    modules = [path for package in ("pipeline", "teacher", "student") for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 100
    found = {wait for path in modules for wait in unlimited_waits(path)}
    assert not found - set(REASONS), "give it a limit, or tell here why it needs none"
