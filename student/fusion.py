"""A student made ready to be used and not trained: the same function in fewer steps."""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from student.tagger import Tagger


def fuse(model: Tagger) -> Tagger:
    """Returns a copy for inference: batch norms folded into their convolutions, weights laid out channels-last.

    The logits stay the same to rounding. The copy's parameters go by other names than a checkpoint's, so save and train
    the original.

    Args:
        model: any student; it isn't changed. A DyMN keeps the batch norms behind convolutions that depend on the sound.

    Returns:
        The copy, in evaluation mode, on the same device.
    """
    return fuse_in_place(copy.deepcopy(model))


def fuse_in_place(model: Tagger) -> Tagger:
    """Do what `fuse` does to a model that nobody needs as it is; returns it."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for (_, first), (name, second) in pairwise(list(module.named_children())):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    _fold(first, second)
                    setattr(module, name, nn.Identity())
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
