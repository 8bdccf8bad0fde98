"""Networks that torch.compile has translated, for steps whose batches keep their shape, and held to the untranslated.

A GPU's launching thread makes 830 launches in a step of mn04, 2,200 and more in one of dymn10, and is all that such a
step waits for. Compiled, a network's maps go through fewer kernels, and CUDA graphs launch those at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.errors import UsageError

WORTHWHILE_STEPS = 2_000
"""A run of fewer steps ends sooner without the minutes that compiling takes."""
MAX_DEVIATION = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.1}
"""How far the gradient may be from the uncompiled one's, as a share of its length: several times what rounding does."""


def pays_to_compile(device: torch.device, *, steps: int, keeps_shape: bool) -> bool:
    """Whether a run is to be compiled where its settings don't say: a long one, on a GPU, in batches of one shape."""
    return device.type == "cuda" and keeps_shape and steps >= WORTHWHILE_STEPS


def check_compiler(device: torch.device) -> None:
    """Compile one addition, so that a missing compiler shows at once and not after the first batch is loaded.

    Raises:
        UsageError: torch.compile does not work here.
    """
    try:
        torch.compile(lambda value: value + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the tools beneath it raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--compile: torch.compile does not work on this machine ({reason}). Install a C++ compiler, such as "
            "g++, or leave --compile out: the steps are then slower, and nothing else changes"
        ) from error


def compile_network(network: nn.Module, device: torch.device, *, keeps_shape: bool, at_once: bool) -> nn.Module:
    """Returns a network that is compiled when it is first called.

    Args:
        network: on the device.
        device: a GPU replays the kernels of a step as CUDA graphs, where the other arguments let it.
        keeps_shape: whether all batches have one shape.
        at_once: whether a step takes its batch in one piece: a graph's gradients last until its next replay.
    """
    if not keeps_shape:
        return torch.compile(network)  # pyright: ignore[reportReturnType]
    if device.type == "cuda" and at_once:
        return torch.compile(network, dynamic=False, mode="reduce-overhead")  # pyright: ignore[reportReturnType]
    return torch.compile(network, dynamic=False)  # pyright: ignore[reportReturnType]


def deviation(network: nn.Module, compiled: nn.Module, features: Tensor, run: Callable[..., Tensor]) -> float:
    """Returns how far a compiled network's gradient is from the network's own, as a share of that one's length.

    The compiled one runs three times: CUDA graphs are recorded in the second and first replayed in the third. No
    statistics and no gradients are left behind.

    Args:
        network: in training mode.
        compiled: the same, compiled.
        features: (batch, …), from its front end.
        run: a network, features → logits, (batch, classes), in the precision of a step.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def gradient(of: nn.Module) -> Tensor:
        run(of, features).float().square().mean().backward()
        flat = [torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in weights]
        found = torch.cat(flat)  # a copy, which no replay overwrites
        for weight in weights:
            weight.grad = None
        return found

    try:
        expected, *_, found = (gradient(one) for one in (network, compiled, compiled, compiled))
        return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(kept[name])
