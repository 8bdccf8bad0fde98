"""One model among several ranks: who averages which gradients, and what batch norms see."""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.models.hearing import noise_features
from pipeline.training.global_batch import GlobalBatchNorm, convert_batch_norm


def divide_among_ranks(model: nn.Module, device: torch.device, *, sync_batch_norm: bool) -> nn.Module:
    """Returns a model that averages its gradients over the ranks; all of them have to call this.

    Weights that nothing uses, as some variants of DyMN have, are left out: no gradient of theirs is waited for.

    Args:
        model: on the device, with its `front_end`.
        device: this rank's.
        sync_batch_norm: whether batch norms see the global batch; they then have the same statistics everywhere.
    """
    unused = unused_weights(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, unused)
    for name in unused:
        model.get_parameter(name).register_hook(partial(_refuse, name))
    if sync_batch_norm:
        convert_batch_norm(model, GlobalBatchNorm)
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=not sync_batch_norm,
        gradient_as_bucket_view=True,
    )


def unused_weights(model: nn.Module) -> list[str]:
    """Returns the names of the weights that no logit depends on, by one backward pass of a copy."""
    twin = copy.deepcopy(model).train()
    twin(noise_features(model, clips=2)).sum().backward()  # two, for there are norms over the batch
    return [name for name, weight in twin.named_parameters() if weight.requires_grad and weight.grad is None]


def _refuse(name: str, gradient: Tensor) -> None:
    raise RuntimeError(f"{name} has a gradient, though no logit depended on it before: the ranks would not share it")
