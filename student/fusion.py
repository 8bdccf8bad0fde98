"""A student made ready to be used and not trained: the same function in fewer steps."""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if isinstance(module, nn.Sequential):
            for (name, first), (next_name, second) in pairwise(list(module.named_children())):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    setattr(module, name, fuse_conv_bn_eval(first, second))
                    setattr(module, next_name, nn.Identity())
    return fused.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
