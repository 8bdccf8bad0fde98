import platform
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys, numpy as np
from pipeline.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, np.uint8)  # freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large freed blocks back at once")
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert faults["give back"] > 100  # at least 10 steps of 32 huge pages, or of 16,384 small ones
    assert faults["keep"] < faults["give back"] / 10
