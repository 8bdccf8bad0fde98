import os
import subprocess
import sys

import pytest

CPUS_OF_RAY = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from pipeline.runtime.ray_session import running_ray
import ray
with running_ray(None):
    print(ray.cluster_resources()["CPU"])
"""


@pytest.mark.ray
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes can't be bound to cores")
def test_ray_of_this_machine_has_the_cores_that_may_be_used() -> None:
    done = subprocess.run([sys.executable, "-c", CPUS_OF_RAY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0"]
