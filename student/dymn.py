"""MobileNetV3 with dynamic convolutions ("DyMN"): Schmid, Koutini, Widmer 2023, arXiv:2310.15648.

Modules carry EfficientAT's names, so that its released checkpoints load unchanged.
"""

from collections.abc import Sequence
from typing import Literal, Unpack

from torch import Tensor, nn

from student.dynamic_layers import ContextGenerator, CoordinateAttention, DynamicConv, DynamicReLU, Static
from student.front_end import FrontEndKeywords, front_end_config
from student.heads import HeadType, build_head
from student.layers import batch_norm, conv_norm_act, init_weights, make_divisible
from student.mobilenetv3 import (
    InvertedResidual,
    InvertedResidualConfig,
    block_configs,
    block_info,
    scaled_channels,
)
from student.tagger import Tagger


def kernel_temperature(
    epoch: float, *, start: float = 30.0, end: float = 1.0, fall: float = 1.0, late_fall: float = 0.02
) -> float:
    """Returns the temperature of the softmax over a dynamic convolution's kernels at an epoch.

    It falls by `fall` an epoch from `start` to 1, and from there by `late_fall` an epoch, never below `end`.
    High temperatures train all kernels alike at first (arXiv:2310.15648, Equation 5 and Section V).
    """
    first_line = start - fall * epoch
    second_line = 1 + late_fall * (start - 1) / fall - late_fall * epoch
    return max(first_line, second_line, end)


class DynamicInvertedResidual(nn.Module):
    """An inverted residual block whose layers depend on the sound."""

    def __init__(
        self,
        config: InvertedResidualConfig,
        context_size: int,
        *,
        dyrelu_k: int = 2,
        dyconv_k: int = 4,
        no_dyrelu: bool = False,
        no_dyconv: bool = False,
        no_ca: bool = False,
    ) -> None:
        super().__init__()
        expanded, stride, activation = config.expanded_channels, config.effective_stride, config.activation
        self.config = config

        def conv(
            in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1, groups: int = 1
        ) -> nn.Module:
            if no_dyconv:
                padding = (kernel - 1) // 2 * dilation
                return Static(
                    nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
                )
            return DynamicConv(
                in_channels,
                out_channels,
                context_size,
                kernel,
                stride=stride,
                dilation=dilation,
                groups=groups,
                kernels=dyconv_k,
            )

        expands = expanded != config.in_channels
        self.exp_conv = conv(config.in_channels, expanded) if expands else Static(nn.Identity())
        self.exp_norm = batch_norm(expanded) if expands else nn.Identity()
        self.exp_act = Static(activation(inplace=True) if expands else nn.Identity())
        self.depth_conv = conv(
            expanded, expanded, config.kernel, stride=stride, dilation=config.dilation, groups=expanded
        )
        self.depth_norm = batch_norm(expanded)
        self.depth_act = (
            Static(activation(inplace=True)) if no_dyrelu else DynamicReLU(expanded, context_size, dyrelu_k)
        )
        self.ca = Static(nn.Identity()) if no_ca else CoordinateAttention()
        self.proj_conv = conv(expanded, config.out_channels)
        self.proj_norm = batch_norm(config.out_channels)
        self.context_gen = ContextGenerator(context_size, config.in_channels, expanded, stride)

    def forward(self, maps: Tensor) -> Tensor:
        """Run the block on (batch, in_channels, mels, frames)."""
        context = self.context_gen(maps)
        out = self.exp_act(self.exp_norm(self.exp_conv(maps, context)), context)
        out = self.depth_act(self.depth_norm(self.depth_conv(out, context)), context)
        out = self.proj_norm(self.proj_conv(self.ca(out, context), context))
        return out + maps if self.config.is_residual else out


class DyMN(Tagger):
    """The student network "DyMN", with EfficientAT's variants under EfficientAT's keywords."""

    last_convolution = "out_c.0.weight"
    untold = ("strides", "T_max")

    def __init__(
        self,
        num_classes: int = 527,
        *,
        width_mult: float = 1.0,
        strides: Sequence[int] = (2, 2, 2, 2),
        context_ratio: int = 4,
        max_context_size: int = 128,
        min_context_size: int = 32,
        dyrelu_k: int = 2,
        no_dyrelu: bool = False,
        dyconv_k: int = 4,
        no_dyconv: bool = False,
        no_ca: bool = False,
        use_dy_blocks: Literal["all", "replace_se"] = "all",
        T_max: float = 30.0,  # noqa: N803 - upstream's keywords
        T_min: float = 1.0,  # noqa: N803
        T0_slope: float = 1.0,  # noqa: N803
        T1_slope: float = 0.02,  # noqa: N803
        head_type: HeadType = "mlp",
        multihead_attention_heads: int = 4,
        dropout: float = 0.2,
        **front_end: Unpack[FrontEndKeywords],
    ) -> None:
        """Build the network with fresh weights.

        Args:
            num_classes: size of the output; 0 leaves the last layer out.
            width_mult: scales the channels of every layer; 1.0 is MobileNetV3-Large.
            strides: steps of the four stages after the first convolution, 1 or 2 each.
            context_ratio: how many times a block's context is smaller than its expanded channels.
            max_context_size: limit of a context at width 1.
            min_context_size: limit of a context at width 1.
            dyrelu_k: lines of a dynamic ReLU.
            no_dyrelu: takes ordinary activations.
            dyconv_k: kernels of a dynamic convolution.
            no_dyconv: takes ordinary convolutions.
            no_ca: leaves coordinate attention out.
            use_dy_blocks: "all" blocks are dynamic, or only those that would have squeeze-excitation ("replace_se").
            T_max: kernel temperature before training, and now; 1 for a model that was trained to the end.
            T_min: lowest kernel temperature.
            T0_slope: how fast the temperature falls, in units an epoch.
            T1_slope: how fast it falls near its end.
            head_type: "mlp", "fully_convolutional" or "multihead_attention_pooling".
            multihead_attention_heads: heads of the last of these.
            dropout: share of the hidden layer that the mlp head drops in training, 0 to 1.
            front_end: how sound becomes an image; see `FrontEndKeywords`.
        """
        super().__init__()
        if use_dy_blocks not in ("all", "replace_se"):
            raise ValueError(f"use_dy_blocks is {use_dy_blocks!r}; choose all or replace_se")
        self.num_classes = num_classes
        self._temperature_line = {"start": T_max, "end": T_min, "fall": T0_slope, "late_fall": T1_slope}

        configs = block_configs(width_mult, strides)
        smallest, largest = (make_divisible(size * width_mult, 8) for size in (min_context_size, max_context_size))
        self.in_c = conv_norm_act(1, configs[0].in_channels, 3, stride=2, activation=nn.Hardswish)
        blocks, reduction = [], 2
        self.block_info = [block_info(configs[0].in_channels, reduction, "in_c.2")]
        for index, config in enumerate(configs, start=1):
            if use_dy_blocks == "all" or config.squeeze:
                wanted = make_divisible(config.expanded_channels // context_ratio, 8)
                block = DynamicInvertedResidual(
                    config,
                    min(max(wanted, smallest), largest),
                    dyrelu_k=dyrelu_k,
                    dyconv_k=dyconv_k,
                    no_dyrelu=no_dyrelu,
                    no_dyconv=no_dyconv,
                    no_ca=no_ca,
                )
            else:
                block = InvertedResidual(config)
            blocks.append(block)
            reduction *= config.effective_stride
            self.block_info.append(block_info(config.out_channels, reduction, f"layers.{index - 1}"))
        self.layers = nn.Sequential(*blocks)
        num_features = 6 * configs[-1].out_channels
        self.block_info.append(block_info(num_features, reduction, "out_c.2"))
        self.out_c = conv_norm_act(configs[-1].out_channels, num_features, activation=nn.Hardswish)

        hidden = scaled_channels(1280, width_mult)
        head = build_head(head_type, num_features, hidden, num_classes, dropout, multihead_attention_heads)
        self._finish(head, num_features, front_end_config(**front_end))
        self.apply(init_weights)
        self._temperature = 1.0
        self.temperature = T_max

    @property
    def temperature(self) -> float:
        """Softness of the choice among kernels, 1 or more; no checkpoint holds it, so keep it as `T_max`."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if value == self._temperature:
            return
        self._temperature = value
        for module in self.modules():
            if isinstance(module, DynamicConv):
                module.temperature = value

    def update_params(self, epoch: float) -> None:
        """Set the temperature for an epoch; training calls this before each one, under upstream's name."""
        self.temperature = kernel_temperature(epoch, **self._temperature_line)

    def blocks_in_order(self) -> list[nn.Module]:
        return [self.in_c, *self.layers, self.out_c]
