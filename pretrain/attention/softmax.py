"""Exact softmax attention (Vaswani et al. 2017)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from .base import Attention, Grid


class SoftmaxAttention(Attention):
    """softmax(Q K^T / sqrt(d)) V.

    Args:
        backend: `sdpa` is torch's fused kernel, whose memory grows with N; `eager` keeps the N x N map, for checking.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        prefix_tokens: int = 0,
        *,
        backend: Literal["auto", "sdpa", "eager"] = "auto",
    ):
        super().__init__(dim, num_heads, grid, prefix_tokens)
        self.backend = backend

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        if self.backend == "eager":
            return (Q @ K.transpose(-1, -2) * Q.shape[-1] ** -0.5).softmax(-1) @ V
        return F.scaled_dot_product_attention(Q, K, V)
