"""What all attentions share: one qkv projection, heads, one output projection, named as in timm.

Legend: B batch, H heads, N tokens, D width, d = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Grid = tuple[int, int]  # height, width


class Attention(nn.Module):
    """Projects to queries, keys and values, mixes values by the variant's rule, projects back.

    Kept for the backward pass are x, Q, K, V and what `proj` reads, 5 N D numbers, and little more: a variant makes
    whatever else it needs again (`recomputed`). `forward` takes timm's `attn_mask` and `is_causal` so that it can
    stand in a timm block; images have neither.
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid, prefix_tokens: int = 0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is no multiple of {num_heads} heads")
        self.dim, self.num_heads, self.grid, self.prefix_tokens = dim, num_heads, grid, prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        assert attn_mask is None
        assert not is_causal
        B, N, D = x.shape
        Q, K, V = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.mix(Q, K, V).transpose(1, 2).reshape(B, N, D))

    def begin_step(self, step: int) -> None:
        """Called before every training step; a variant with random features may draw new ones from (itself, step)."""

    @classmethod
    def options_of_block(cls, index: int) -> dict[str, Any]:
        """Options in which the blocks of a stack differ, by the block's place; a user's own options go before them."""
        return {}

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) queries, keys, values -> (B, H, N, d)."""
        raise NotImplementedError


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which only the tensors are kept: the backward pass runs it again. It draws nothing."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
