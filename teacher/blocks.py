"""Layers of transformers that timm does not have."""

from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from teacher.tracing import is_traced


class PooledNorm(nn.BatchNorm1d):
    """Normalises pooled vectors, in training by the batch; a batch of one clip by the running statistics, as ever."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, dim) → the same."""
        assert self.momentum is not None
        by_batch = self.training and input.shape[0] > 1
        if self.training and not is_traced(input):
            self.num_batches_tracked.add_(input.shape[0] > 1)  # pyright: ignore[reportOptionalMemberAccess]
        return F.batch_norm(input, self.running_mean, self.running_var, None, None, by_batch, self.momentum, self.eps)


class PostNormBlock(Block):
    """A block whose layer norms follow the sums, as BERT's do; in timm's own they precede attention and MLP.

    Attributes:
        residual_scale: what the sequence is multiplied by before attention's or the MLP's result is added; above 1 in
            DeepNorm (Wang et al. 2022, arXiv:2203.00555).
    """

    residual_scale: float = 1.0

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(batch, tokens, embed_dim) → the same; `attn_mask` is added to the attention's scores."""
        x = self.norm1(self.residual_scale * x + self.attn(x, attn_mask=attn_mask, is_causal=is_causal))
        return self.norm2(self.residual_scale * x + self.mlp(x))
