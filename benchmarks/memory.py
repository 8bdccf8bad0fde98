"""Measures how much memory a command needs, with all processes that it starts: `python -m benchmarks.memory COMMAND…`.

The figure is the largest sum of the processes' proportional set sizes (shared pages are counted once), looked at ten
times a second: what a container's `--memory` has to be above. Linux only.
"""

import subprocess
import sys
import time

import psutil

_PAUSE_SECONDS = 0.1


def tree_bytes(root: psutil.Process) -> int:
    """Returns the memory of a process and all below it."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def main() -> None:
    """Run the command and print its largest memory."""
    started, largest = time.monotonic(), 0
    with subprocess.Popen(sys.argv[1:]) as command:
        root = psutil.Process(command.pid)
        while command.poll() is None:
            try:
                largest = max(largest, tree_bytes(root))
            except psutil.Error:
                break
            time.sleep(_PAUSE_SECONDS)
    seconds = time.monotonic() - started
    print(f"{largest / 1e6:.0f} MB at most, {seconds:.0f} s, exit code {command.returncode}: {' '.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
