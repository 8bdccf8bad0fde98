"""What every student is, whatever its network: a front end, feature maps, a head, and timm's habits."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from student.front_end import FrontEndConfig, LogMelFrontEnd
from student.heads import FullyConvolutionalHead, Head
from student.timm_model import TimmModel
from student.tracing import is_traced


class Tagger(TimmModel):
    """Base of the students: log-mel images in, class logits out, with the front end that makes the images.

    A subclass builds its network with its `block_info`, then calls `_finish`, and implements `blocks_in_order`.
    """

    input_seconds = 10.0
    """Length of the sounds that the released models were trained on; other lengths work too."""

    takes_any_length = True
    """Whether sounds of other lengths than `input_seconds` can be tagged."""

    model_name = ""
    """The registered name that the model was created by."""

    last_convolution: ClassVar[str]
    """Key of the last convolution's weights; its shape tells the width of a checkpoint."""

    untold: ClassVar[tuple[str, ...]]
    """Keywords that change what a network computes, and leave no trace in the shapes of its weights."""

    front_end: LogMelFrontEnd

    def _finish(self, classifier: Head, num_features: int, front_end: FrontEndConfig) -> None:
        self.classifier = classifier
        self.set_feature_location("stage")
        self.num_features = num_features
        self.head_hidden_size = classifier.hidden_features
        # Last, because timm's feature extractors run the children in the order of their registration.
        self.front_end = LogMelFrontEnd(front_end)

    @property
    def sample_rate_hz(self) -> int:
        """Sampling rate of the waveforms that the front end takes, in hertz."""
        return self.front_end.config.sample_rate_hz

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """Turn the network's maps into logits (batch, classes), or into what the last layer sees.

        Either is float32 also under autocast.
        """
        if not self.pools:
            return maps
        return _in_full(self.classifier.pre_logits if pre_logits else self.classifier, maps)

    @property
    def hears_frames(self) -> bool:
        """Whether its logits are the mean of those of each frame, which `forward_frames` then leaves apart."""
        return isinstance(self.classifier, FullyConvolutionalHead)

    def forward_frames(self, maps: Tensor) -> Tensor:
        """Turn the network's maps into logits over time, the head applied frame by frame.

        Args:
            maps: (batch, num_features, mels / 32, frames / 32), from `forward_features`.

        Returns:
            (batch, frames / 32, classes), logits; one frame is as long as the last stage's `reduction` of the front
            end's.
        """
        return _in_full(self.classifier.frame_logits, maps)

    def forward(self, features: Tensor) -> Tensor:
        """Tag log-mel images.

        Args:
            features: (batch, 1, mels, frames), from `front_end`.

        Returns:
            (batch, classes), logits (before the sigmoid), float32 also under autocast.
        """
        return self.forward_head(self.forward_features(features))

    def embed(self, features: Tensor) -> Tensor:
        """Describe sounds for another task: (batch, 1, mels, frames) → (batch, num_features), the maps' mean."""
        return _in_full(lambda maps: maps.mean(dim=(2, 3)), self.forward_features(features))


def _in_full(compute: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    # A head costs next to nothing, and bfloat16 would round a logit of 5 to steps of 0.03.
    if is_traced(maps) or maps.is_meta or not torch.is_autocast_enabled(maps.device.type):
        return compute(maps)
    with torch.autocast(maps.device.type, enabled=False):
        return compute(maps.float())
