"""Transformers whose blocks `torch.compile` has translated, for the shape of sequence that comes again and again."""

import logging

import torch
from torch import Tensor

from teacher.audio_transformer import AudioTransformer

_DEVIATIONS = {torch.float32: 0.001, torch.float16: 0.005, torch.bfloat16: 0.05}
"""What the 99.9th percentile of |difference| to the plain blocks, in the logits, may be: in bfloat16 what `--precision
auto` takes as harmless (docs/results.md); plain and compiled blocks of PaSST-S each lie 0.02 from float32."""

logger = logging.getLogger(__name__)


def compile_blocks(network: AudioTransformer, precision: torch.dtype) -> None:
    """Let a network's blocks run compiled; its logits stay within rounding errors of `precision`.

    The first sequence whose shape was there before has them compiled, and the result held to that of the plain blocks.
    Sequences of other shapes, such as a shard's last batch, go through the plain ones, and so does everything where
    that fails.
    """
    for block in network.blocks:
        block.compile(dynamic=False)
    network.transform = _Transform(network, _DEVIATIONS[precision])  # pyright: ignore[reportAttributeAccessIssue]


class _Transform:
    """Takes the place of `AudioTransformer.transform`."""

    def __init__(self, network: AudioTransformer, deviation: float) -> None:
        self._network, self._deviation = network, deviation
        self._run = network.transform
        self._seen: set[torch.Size] = set()
        self._compiled: torch.Size | None = None
        self._usable = True

    def __call__(self, sequence: Tensor) -> Tensor:
        """(batch, tokens, embed_dim) → the same, through all blocks."""
        if sequence.shape == self._compiled:
            return self._run(sequence)
        with torch.compiler.set_stance("force_eager"):
            plain = self._run(sequence)
        if self._usable and self._compiled is None and sequence.shape in self._seen:
            self._usable = self._try(sequence, plain)
        self._seen.add(sequence.shape)
        return plain

    def _try(self, sequence: Tensor, plain: Tensor) -> bool:
        """Compile the blocks for a shape; returns whether they give what the plain ones do."""
        try:
            found = self._run(sequence)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
            logger.warning("%s: can't be compiled here, and runs as it is (%s)", self._network.model_name, reason)
            return False
        logits = [self._network.forward_head(one) for one in (plain, found)]
        apart = (logits[0] - logits[1]).abs().flatten().float().quantile(0.999).item()
        if not apart <= self._deviation:
            logger.warning(
                "%s: compiled blocks change logits by %.4f, more than the %g of the precision; it runs as it is",
                self._network.model_name,
                apart,
                self._deviation,
            )
            return False
        self._compiled = sequence.shape
        return True
