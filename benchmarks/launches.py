"""What a training step asks of a device, counted: launching is all that the steps of small students wait for.

    python -m benchmarks.launches [--student mn04 mn10 dymn10] [--clips 4] [--eager]

A step is that of the product's own loop. On a GPU its launches are counted as they are made. Without one, the operators
that compute are: each is a kernel on a GPU, or a few. What only looks at memory in another way, or takes some, is not
counted. Of a compiled network those kernels are that inductor means to write, as it fuses for a CPU, and those that it
leaves to libraries; CUDA graphs then launch them by one call forwards and one back. What steps and averages the weights
is counted beside what does the same weight by weight.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    _recursive_record_original_output_strides,
    compile_fx,
    fake_tensor_prop,
    shape_env_from_inputs,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.autograd.profiler_util import FunctionEvent
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.profiler import ProfilerActivity, profile, record_function

import student
from benchmarks.student import make_batch
from pipeline.batches.join import TrainingBatch
from pipeline.batches.sampling import EpochSampler
from pipeline.commands.train_student import TrainStudentConfig
from pipeline.models.device import Precision, choose_device
from pipeline.training.loop import Trainer
from pipeline.training.optimizing import AverageConfig, OptimizerConfig, build_average, build_optimizer
from pipeline.training.student_learner import StudentLearner

_AT_ONCE = ("aten::_foreach_", "aten::_fused_")
"""Take all tensors of a list, on a GPU by few kernels; a CPU may take them one by one."""
_COMPILED = "compiled to kernels: "
_WITHOUT_A_KERNEL = re.compile(
    r"_?(alias|as_strided_?|clone|conj|contiguous|detach_?|diagonal|(new_)?empty(_like|_strided)?|expand|is_nonzero|item"
    r"|lift_fresh|local_scalar_dense|movedim|narrow|permute|real|reshape(_alias)?|resize_|resolve_(conj|neg)"
    r"|result_type|select|set_|slice|split|squeeze|t|to(_copy)?|transpose|unbind|unfold|unsqueeze|(unsafe_)?view(_as)?"
    r"|view_as_real)"
)
"""What is to be computed for one of these is an operator beneath it, such as `copy_`."""


def count_calls(act: Callable[[], object], device: torch.device) -> Counter[str]:
    """Counts what something asks of a device: `launches`, and of a GPU `copies` and `synchronisations`.

    The last synchronisation, which waits for its end, is one of them.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        act()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = list(profiler.events() or ())
    if on_gpu:
        return Counter(_kind_of_call(event.name) for event in events)
    return Counter(launches=sum(_kernels(event) for event in events if event.cpu_parent is None))


def _kind_of_call(name: str) -> str:
    if name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")):
        return "launches"
    if "Synchronize" in name:
        return "synchronisations"
    return "copies" if name.startswith("cudaMemcpy") else "other"


def _kernels(event: FunctionEvent) -> int:
    """Returns how many operators that compute are an event and what it is made of."""
    if event.name.startswith(_AT_ONCE):
        return 1
    if event.name.startswith(_COMPILED):
        return int(event.name.removeprefix(_COMPILED))
    beneath = sum(map(_kernels, event.cpu_children))
    library, _, name = event.name.partition("::")
    return beneath or int(library == "aten" and not _WITHOUT_A_KERNEL.fullmatch(name))


@contextmanager
def planned_by_inductor() -> Iterator[None]:
    """Let what is compiled in the block be planned as inductor does, and run as it is, called by its kernels' number.

    No code is made of the plan, which would take a C++ compiler minutes.
    """
    compile_as_always = torch.compile

    def plan(graph: GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx(graph, inputs, inner_compile=_plan)  # pyright: ignore[reportArgumentType]

    torch.compile = partial(compile_as_always, backend=plan)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.compile = compile_as_always


def _plan(graph: GraphModule, inputs: list[Tensor], **_: Any) -> Callable[..., Any]:
    """Takes the place of `torch._inductor.compile_fx.compile_fx_inner`, without what makes code of the plan."""
    with torch.no_grad():
        fake = fake_tensor_prop(graph, inputs)
    _recursive_record_original_output_strides(graph)
    with V.set_fake_mode(fake), DebugContext():
        _recursive_post_grad_passes(graph, False)
        lowering = GraphLowering(graph, inputs, shape_env=shape_env_from_inputs(inputs))
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering.codegen()  # text, which nobody translates
    nodes = lowering.scheduler.nodes
    name = f"{_COMPILED}{sum(not isinstance(node, NopKernelSchedulerNode) for node in nodes)}"

    def run(*given: Any) -> Any:
        with record_function(name):
            return graph.forward(*given)

    return make_boxed_func(run)


def training_step(
    name: str, clips: int, device: torch.device, precision: Precision = "float32", *, compiled: bool = False
) -> Callable[[], object]:
    """Returns the product's own step of a student: a batch in the loader's memory → updated weights."""
    config = TrainStudentConfig(data="", run="", batch_size=clips, precision=precision, compile=compiled)
    learner = StudentLearner(student.create_model(name), config.distill, config.mixup, config.augment)
    sampler = EpochSampler(weights=np.ones(clips), batch_size=clips, seed=0)
    trainer = Trainer(learner, config, sampler, lambda epoch: 1.0, device)
    batch = make_batch(clips).pack(pin_memory=device.type == "cuda")

    def endless() -> Iterator[TrainingBatch]:
        while True:
            yield batch

    steps = trainer.steps(endless())
    return lambda: next(steps)


def updates(name: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns what brings weights on, and an average of them, weight by weight and as the product does."""
    model = student.create_model(name).to(device)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    plain = AveragedModel(model, avg_fn=get_ema_avg_fn(), use_buffers=False)
    ours = build_average(model, AverageConfig(kind="ema"))
    assert ours is not None
    return {
        "optimizer, weight by weight": torch.optim.Adam(model.parameters(), foreach=False).step,
        "optimizer, ours": build_optimizer([{"params": list(model.parameters())}], OptimizerConfig()).step,
        "average, weight by weight": lambda: plain.update_parameters(model),
        "average, ours": lambda: ours.update_parameters(model),
    }


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--student", nargs="+", default=["mn04", "mn10", "dymn10"])
    parser.add_argument("--clips", type=int, default=4, help="a step")
    parser.add_argument("--eager", action="store_true", help="leave out compiled steps, which take a CPU minutes")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = choose_device(options.device)
    header = ["student", "step", *([] if options.eager else ["step, compiled"]), *updates("mn01", device)]
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
    for name in options.student:
        acts = [training_step(name, options.clips, device)]
        if not options.eager:
            with planned_by_inductor() if device.type == "cpu" else nullcontext():
                acts.append(training_step(name, options.clips, device, compiled=True))
        counts: list[int] = []
        for act in (*acts, *updates(name, device).values()):
            for _ in range(2):  # what is done but once is done then
                act()
            counts.append(count_calls(act, device)["launches"])
        print(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |", flush=True)


if __name__ == "__main__":
    main()
