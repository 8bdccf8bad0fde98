"""The precision that suits the machines on which teachers will run; the one that starts a run may be another kind."""

import logging

import pipeline.runtime.ray_session as ray_session  # first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import PipelineError
from pipeline.models.device import Precision, common_precision, fastest_precision
from pipeline.runtime.ray_capacity import wait_with_a_word
from pipeline.runtime.watching import PATIENCE_SECONDS

_SHARE_OF_A_GPU = 0.01
"""A task that claims none is shown none."""

_log = logging.getLogger(__name__)


def fastest_on_cluster(
    address: str | None, gpus_per_actor: float | None, patience: float = PATIENCE_SECONDS
) -> Precision:
    """Ask every machine of a cluster that can take an actor for its fastest precision; give the one that suits all.

    Args:
        address: the cluster's.
        gpus_per_actor: GPUs that each actor will claim; None is 1 where there are any.
        patience: how long the machines may take to answer, in seconds; those that do not are passed over.

    Raises:
        PipelineError: none of them answers.
        UsageError: there is no cluster at the address.
    """
    with ray_session.running_ray(address):
        machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        with_gpus = [node for node in machines if node["Resources"].get("GPU")]
        on_gpus = bool(gpus_per_actor or (gpus_per_actor is None and with_gpus))
        claimed = _SHARE_OF_A_GPU if on_gpus else 0
        places = [
            NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in (with_gpus if on_gpus else machines)
        ]  # none where a cluster has yet to grow: then the task is what makes it grow
        asked = [
            _fastest.options(num_gpus=claimed, scheduling_strategy=place).remote("cuda" if on_gpus else "cpu")
            for place in places or ["DEFAULT"]
        ]
        answered, silent = wait_with_a_word(asked, patience, "machines say in which precision they compute")
        if not answered:
            raise PipelineError(
                f"none of the cluster's {len(asked)} machines has said within {patience:g} s in which precision it "
                "computes. End what else runs there, or choose by --precision"
            )
        if silent:
            _log.warning("%d of %d machines have not said in which precision they compute", len(silent), len(asked))
        return common_precision(ray.get(answered, timeout=patience))


@ray.remote(num_cpus=0, max_retries=1)
def _fastest(device: str) -> Precision:
    return fastest_precision(device)
