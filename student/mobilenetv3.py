"""MobileNetV3-Large for log-mel images, scaled by width ("MN"): Schmid, Koutini, Widmer 2022, arXiv:2211.04772.

Modules carry EfficientAT's names, so that its released checkpoints load unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

from torch import Tensor, nn

from student.front_end import FrontEndKeywords, front_end_config
from student.heads import HeadType, build_head
from student.layers import conv_norm_act, init_weights, make_divisible
from student.squeeze_excitation import ConcurrentSqueezeExcitation, SeAggregation, check_squeeze_excitation
from student.tagger import Tagger


@dataclass(frozen=True, kw_only=True, slots=True)
class InvertedResidualConfig:
    """One inverted residual block: channels in, expanded and out, and how its depthwise convolution steps."""

    in_channels: int
    expanded_channels: int
    out_channels: int
    kernel: int
    stride: int
    dilation: int
    squeeze: bool
    hardswish: bool

    @property
    def activation(self) -> type[nn.Module]:
        """The block's activation: ReLU in the first half of the network, hardswish in the second."""
        return nn.Hardswish if self.hardswish else nn.ReLU

    @property
    def is_residual(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def effective_stride(self) -> int:
        """The stride of the depthwise convolution: a dilated one looks wider instead of stepping."""
        return 1 if self.dilation > 1 else self.stride


def scaled_channels(channels: int, width_mult: float) -> int:
    """Scale a number of channels, to a multiple of 8."""
    return make_divisible(channels * width_mult, 8)


def block_configs(
    width_mult: float, strides: Sequence[int] = (2, 2, 2, 2), *, dilated: bool = False, reduced_tail: bool = False
) -> list[InvertedResidualConfig]:
    """Lay out the 15 blocks of MobileNetV3-Large (arXiv:1905.02244, Table 1), scaled by a width.

    Raises:
        ValueError: there aren't four strides of 1 or 2, or the width isn't positive.
    """
    if len(strides) != 4 or not set(strides) <= {1, 2}:
        raise ValueError(f"strides is {tuple(strides)}; choose four numbers out of 1 and 2")
    if width_mult <= 0:
        raise ValueError(f"width_mult is {width_mult}; choose a positive number")
    first, second, third, last = strides
    shrink, dilation = 2 if reduced_tail else 1, 2 if dilated else 1
    tail = 160 // shrink
    rows = (  # expanded, out, kernel, stride, dilation, squeeze, hardswish
        (16, 16, 3, 1, 1, False, False),
        (64, 24, 3, first, 1, False, False),
        (72, 24, 3, 1, 1, False, False),
        (72, 40, 5, second, 1, True, False),
        (120, 40, 5, 1, 1, True, False),
        (120, 40, 5, 1, 1, True, False),
        (240, 80, 3, third, 1, False, True),
        (200, 80, 3, 1, 1, False, True),
        (184, 80, 3, 1, 1, False, True),
        (184, 80, 3, 1, 1, False, True),
        (480, 112, 3, 1, 1, True, True),
        (672, 112, 3, 1, 1, True, True),
        (672, tail, 5, last, dilation, True, True),
        (960 // shrink, tail, 5, 1, dilation, True, True),
        (960 // shrink, tail, 5, 1, dilation, True, True),
    )
    configs, in_channels = [], scaled_channels(16, width_mult)
    for expanded, out, kernel, stride, block_dilation, squeeze, hardswish in rows:
        config = InvertedResidualConfig(
            in_channels=in_channels,
            expanded_channels=scaled_channels(expanded, width_mult),
            out_channels=scaled_channels(out, width_mult),
            kernel=kernel,
            stride=stride,
            dilation=block_dilation,
            squeeze=squeeze,
            hardswish=hardswish,
        )
        configs.append(config)
        in_channels = config.out_channels
    return configs


def block_info(channels: int, reduction: int, module: str) -> dict[str, int | str]:
    """Describe a block's maps in timm's words."""
    return {"num_chs": channels, "reduction": reduction, "module": module}


class InvertedResidual(nn.Module):
    """Expands the channels, convolves each on its own, weighs them, and projects them back."""

    def __init__(self, config: InvertedResidualConfig, squeeze_excitation: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.squeezes = config, squeeze_excitation is not None
        expanded, activation = config.expanded_channels, config.activation
        layers: list[nn.Module] = []
        if expanded != config.in_channels:
            layers.append(conv_norm_act(config.in_channels, expanded, activation=activation))
        layers.append(
            conv_norm_act(
                expanded,
                expanded,
                config.kernel,
                stride=config.effective_stride,
                dilation=config.dilation,
                groups=expanded,
                activation=activation,
            )
        )
        if squeeze_excitation is not None:
            layers.append(squeeze_excitation)
        layers.append(conv_norm_act(expanded, config.out_channels))
        self.block = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> Tensor:
        """Run the block on (batch, in_channels, mels, frames)."""
        out = self.block(maps)
        return out + maps if self.config.is_residual else out


class MobileNetV3(Tagger):
    """The student network "MN", with EfficientAT's variants under EfficientAT's keywords."""

    last_convolution = "features.16.0.weight"
    untold = ("strides", "dilated")

    def __init__(
        self,
        num_classes: int = 527,
        *,
        width_mult: float = 1.0,
        reduced_tail: bool = False,
        dilated: bool = False,
        strides: Sequence[int] = (2, 2, 2, 2),
        head_type: HeadType = "mlp",
        multihead_attention_heads: int = 4,
        se_dims: str = "c",
        se_agg: SeAggregation = "max",
        se_r: int = 4,
        dropout: float = 0.2,
        input_dim_f: int | None = None,
        input_dim_t: int | None = None,
        **front_end: Unpack[FrontEndKeywords],
    ) -> None:
        """Build the network with fresh weights.

        Args:
            num_classes: size of the output; 0 leaves the last layer out.
            width_mult: scales the channels of every layer; 1.0 is MobileNetV3-Large.
            reduced_tail: halves the channels of the last blocks and the head.
            dilated: the last blocks dilate by 2 instead of stepping.
            strides: steps of the four stages after the first convolution, 1 or 2 each.
            head_type: "mlp", "fully_convolutional" or "multihead_attention_pooling".
            multihead_attention_heads: heads of the last of these.
            se_dims: axes of squeeze-excitation, letters out of c (channel), f (mel), t (frame), or "none".
            se_agg: how several axes are combined: "max", "avg", "add" or "min".
            se_r: how many times the gates' hidden layers are smaller than their axes.
            dropout: share of the hidden layer that the mlp head drops in training, 0 to 1.
            input_dim_f: mel bands that gates over f are built for; None is the front end's.
            input_dim_t: frames that gates over t are built for; None is those of 10 s.
            front_end: how sound becomes an image; see `FrontEndKeywords`.
        """
        super().__init__()
        check_squeeze_excitation(se_dims, se_agg, se_r)
        self.num_classes = num_classes
        self.takes_any_length = "t" not in se_dims.replace("none", "")  # gates over frames are built for so many
        images = front_end_config(**front_end)
        mels = input_dim_f or images.mels
        frames = input_dim_t or images.frames(round(self.input_seconds * images.sample_rate_hz))

        configs = block_configs(width_mult, strides, dilated=dilated, reduced_tail=reduced_tail)
        layers: list[nn.Module] = [
            conv_norm_act(1, configs[0].in_channels, 3, stride=2, activation=nn.Hardswish),
        ]
        mels, frames, reduction = -(-mels // 2), -(-frames // 2), 2
        self.block_info = [block_info(configs[0].in_channels, reduction, "features.0")]
        for index, config in enumerate(configs, start=1):
            step = config.effective_stride
            mels, frames, reduction = -(-mels // step), -(-frames // step), reduction * step
            squeeze = None
            if config.squeeze and se_dims != "none":
                sizes = (config.expanded_channels, mels, frames)
                squeeze = ConcurrentSqueezeExcitation(sizes, se_dims, se_agg, se_r)
            layers.append(InvertedResidual(config, squeeze))
            self.block_info.append(block_info(config.out_channels, reduction, f"features.{index}"))
        num_features = 6 * configs[-1].out_channels
        self.block_info.append(block_info(num_features, reduction, f"features.{len(layers)}"))
        layers.append(conv_norm_act(configs[-1].out_channels, num_features, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)

        hidden = scaled_channels(1280 // (2 if reduced_tail else 1), width_mult)
        head = build_head(head_type, num_features, hidden, num_classes, dropout, multihead_attention_heads)
        self._finish(head, num_features, images)
        self.apply(init_weights)

    def blocks_in_order(self) -> list[nn.Module]:
        return list(self.features)
