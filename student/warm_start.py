"""Starts a student from weights that are not its own: ImageNet's MobileNetV3-Large as timm and torchvision have it.

| written by | becomes |
|---|---|
| torchvision `mobilenet_v3_large` | `features.*` as it is; squeeze-excitation 1 x 1 convolutions as linear layers |
| timm `mobilenetv3_large_100` | its blocks, in order, as `features.1` to `16`; `conv_head` as the hidden layer |

The first convolution's three colours are added up, which is what a grey image gives. The ImageNet classifier stays
behind. Two differences remain that training soon evens out: the gates' hard sigmoid is a sigmoid here, and timm's batch
norms have another epsilon.
"""

import logging
import re
from collections.abc import Mapping

from torch import Tensor, nn

from student.state_dicts import describe_difference, shapes_of

logger = logging.getLogger(__name__)

IMAGENET_WEIGHTS: Mapping[str, str] = {
    "mobilenetv3_large_100": "https://huggingface.co/timm/mobilenetv3_large_100.ra_in1k/resolve/main/model.safetensors",
    "mobilenet_v3_large": "https://download.pytorch.org/models/mobilenet_v3_large-5c1a4163.pth",
}
"""timm's and torchvision's names → their weights; Apache-2.0 and BSD-3-Clause."""

_STEM = "features.0.0.weight"

_TORCHVISION = (
    (r"\.block\.(\d)\.(fc[12])\.", r".block.\1.conc_se_layers.0.\2."),
    (r"^classifier\.0\.", "classifier.2."),
    (r"^classifier\.3\.", "classifier.5."),
)
_TIMM_ENDS = (
    (r"^conv_stem\.", "features.0.0."),
    (r"^bn1\.", "features.0.1."),
    (r"^conv_head\.", "classifier.2."),
    (r"^classifier\.", "classifier.5."),
)
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(.+)")
_TIMM_LAYERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "inverted residual": (
        (r"^conv_pw\.", "block.0.0."),
        (r"^bn1\.", "block.0.1."),
        (r"^conv_dw\.", "block.1.0."),
        (r"^bn2\.", "block.1.1."),
        (r"^se\.conv_reduce\.", "block.2.conc_se_layers.0.fc1."),
        (r"^se\.conv_expand\.", "block.2.conc_se_layers.0.fc2."),
    ),
    "without expansion": (
        (r"^conv_dw\.", "block.0.0."),
        (r"^bn1\.", "block.0.1."),
        (r"^conv_pw\.", "block.1.0."),
        (r"^bn2\.", "block.1.1."),
    ),
    "last convolution": ((r"^conv\.", "0."), (r"^bn1\.", "1.")),
}


def from_imagenet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns timm's or torchvision's MobileNetV3-Large under MN's keys; None for a checkpoint that is neither."""
    if "conv_stem.weight" in tensors and "conv_head.weight" in tensors:
        renamed = {_from_timm(key, tensors): value for key, value in tensors.items()}
    elif "classifier.3.weight" in tensors and "features.16.0.weight" in tensors:
        renamed = {_substitute(_TORCHVISION, key): value for key, value in tensors.items()}
    else:
        return None
    ours = {key: value.flatten(1) if _is_linear(key, value) else value for key, value in renamed.items()}
    if _STEM in ours:
        ours[_STEM] = ours[_STEM].sum(dim=1, keepdim=True)
    return ours


def _is_linear(key: str, value: Tensor) -> bool:
    return value.ndim == 4 and (".conc_se_layers." in key or key.startswith("classifier."))


def _from_timm(key: str, tensors: Mapping[str, Tensor]) -> str:
    found = _TIMM_BLOCK.fullmatch(key)
    if found is None:
        return _substitute(_TIMM_ENDS, key)
    stage, block, layer = found.groups()
    places = list(dict.fromkeys(match.groups()[:2] for name in tensors if (match := _TIMM_BLOCK.fullmatch(name))))
    prefix = f"blocks.{stage}.{block}."
    if f"{prefix}conv_pwl.weight" in tensors:
        kind = "inverted residual"
        end = 3 if f"{prefix}se.conv_reduce.weight" in tensors else 2
        layer = re.sub(r"^bn3\.", f"block.{end}.1.", re.sub(r"^conv_pwl\.", f"block.{end}.0.", layer))
    else:
        kind = "without expansion" if f"{prefix}conv_dw.weight" in tensors else "last convolution"
    return f"features.{1 + places.index((stage, block))}.{_substitute(_TIMM_LAYERS[kind], layer)}"


def _substitute(patterns: tuple[tuple[str, str], ...], text: str) -> str:
    """Apply the first pattern that is found."""
    for pattern, name in patterns:
        if re.search(pattern, text):
            return re.sub(pattern, name, text)
    return text


def same_keys(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint names the model's own tensors, whatever their shapes."""
    return model.state_dict().keys() == tensors.keys()


def backbone_from(model: nn.Module, tensors: Mapping[str, Tensor], final_layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Make a state dict of the model's own values and of those of another's backbone that fit; logs which is which.

    The backbone's convolutions and normalisations have to fit. Squeeze-excitation and the head start afresh where they
    don't, and the last layer does in any case.

    Args:
        model: it isn't changed.
        tensors: under MN's names.
        final_layers: prefixes of the keys whose shape follows from the number of classes.

    Raises:
        ValueError: the backbone is another one; the message names keys and shapes.
    """
    own = model.state_dict()
    backbone = {
        key for key in {**own, **tensors} if not key.startswith("classifier.") and ".conc_se_layers." not in key
    }
    expected, found = ({key: value for key, value in shapes_of(of).items() if key in backbone} for of in (own, tensors))
    if difference := describe_difference(expected, found):
        raise ValueError(difference)
    taken = {
        key: value
        for key, value in tensors.items()
        if key in own and own[key].shape == value.shape and not key.startswith(final_layers)
    }
    logger.warning(
        "Warm start: %d of %d tensors taken; afresh: %s; left behind: %s",
        len(taken),
        len(own),
        ", ".join(key for key in own if key not in taken) or "none",
        ", ".join(key for key in tensors if key not in taken) or "none",
    )
    return {**own, **taken}
