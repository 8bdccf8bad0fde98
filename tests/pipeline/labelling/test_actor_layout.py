"""Actors fit the machines that can host them, and leave neither GPUs nor cores idle."""

import pytest

from pipeline.labelling.actor_layout import Layout, fit_to_machines, own_share

HEAD = {"CPU": 2.0}
GPU_BOX = {"CPU": 64.0, "GPU": 8.0}
SMALL_GPU_BOX = {"CPU": 4.0, "GPU": 1.0}


def claims(layout: Layout) -> tuple[int, float, float]:
    return layout.actors, layout.cpus_per_actor, layout.gpus_per_actor


def test_machines_without_gpus_neither_host_gpu_actors_nor_lessen_their_cores() -> None:
    layout = fit_to_machines([HEAD, GPU_BOX], None, None, None)
    assert claims(layout) == (8, 8, 1)
    assert own_share(GPU_BOX, layout) == 8


def test_on_machines_of_unlike_size_each_gpu_has_an_actor_that_uses_its_machines_cores() -> None:
    layout = fit_to_machines([HEAD, GPU_BOX, SMALL_GPU_BOX], None, None, None)
    assert claims(layout) == (9, 4, 1)
    assert [own_share(machine, layout) for machine in (GPU_BOX, SMALL_GPU_BOX)] == [8, 4]


@pytest.mark.parametrize(
    ("cores", "actors", "each"),
    [([8], 1, 8), ([8, 8, 8], 3, 8), ([0, 4, 4], 2, 4), ([1, 64], 1, 64), ([2, 16], 9, 2), ([4, 6], 3, 3), ([], 1, 1)],
)
def test_without_gpus_actors_of_one_size_use_nearly_all_cores(cores: list[int], actors: int, each: int) -> None:
    machines = [{"CPU": float(cpus)} for cpus in cores]
    assert claims(fit_to_machines(machines, None, None, None)) == (actors, each, 0)


def test_fewer_actors_than_there_is_room_for_have_more_cores() -> None:
    assert claims(fit_to_machines([{"CPU": 8.0}, {"CPU": 8.0}], (4, 4), None, 0)) == (4, 4, 0)
    assert claims(fit_to_machines([HEAD, GPU_BOX], (2, 2), None, None)) == (2, 32, 1)


def test_more_gpus_than_cores_are_all_used() -> None:
    assert claims(fit_to_machines([{"CPU": 4.0, "GPU": 8.0}], None, None, None)) == (8, 0.5, 1)
    assert claims(fit_to_machines([{"CPU": 4.0, "GPU": 1.0}], None, None, 0.5)) == (2, 2, 0.5)


def test_what_is_said_is_asked_for_also_where_there_is_nothing_yet() -> None:
    layout = fit_to_machines([], (1, 4), 8, 1.0)
    assert layout == Layout(1, 4, 8, 1.0, own_share=False)
    assert own_share(GPU_BOX, layout) == 8
    assert claims(fit_to_machines([{"CPU": 2.0}], None, 1, None)) == (1, 1, 0)
