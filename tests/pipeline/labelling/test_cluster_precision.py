import pytest

from pipeline.models.device import fastest_precision


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_machines_without_a_gpu_say_what_their_cpus_compute_in() -> None:
    from pipeline.labelling.cluster_precision import fastest_on_cluster

    assert fastest_on_cluster(None, None) == fastest_precision("cpu")


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_machines_that_never_answer_are_told_within_the_patience() -> None:
    from pipeline.errors import PipelineError
    from pipeline.labelling.cluster_precision import fastest_on_cluster

    with pytest.raises(PipelineError, match=r"none of the cluster's 1 machines has said within 1 s"):
        fastest_on_cluster(None, 1.0, patience=1.0)  # a GPU, which nobody has
