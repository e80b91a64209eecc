"""Attention by name: every variant maps (B, N, D) tokens to (B, N, D), N = prefix tokens + grid height x width."""

from __future__ import annotations

from typing import Any

from .agent import AgentAttention
from .base import Attention, Grid
from .linformer import LinformerAttention
from .nystrom import NystromAttention
from .performer import PerformerAttention
from .softmax import SoftmaxAttention
from .window import WindowAttention

ATTENTIONS: dict[str, type[Attention]] = {
    "softmax": SoftmaxAttention,
    "nystrom": NystromAttention,
    "performer": PerformerAttention,
    "linformer": LinformerAttention,
    "agent": AgentAttention,
    "window": WindowAttention,
}

__all__ = ["ATTENTIONS", "Attention", "Grid", "build_attention"]


def build_attention(
    name: str, dim: int, num_heads: int, grid: Grid, prefix_tokens: int = 0, **options: Any
) -> Attention:
    """An attention module for tokens on a grid.

    Args:
        name: a key of ATTENTIONS.
        dim: D, width of a token.
        num_heads: heads; D must be a multiple.
        grid: (height, width) of the token grid.
        prefix_tokens: tokens before the grid (class, registers).
        options: keyword-only parameters of the variant.

    Raises:
        ValueError: unknown name, or D is no multiple of the heads.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attention {name!r}; known: {', '.join(ATTENTIONS)}")
    return ATTENTIONS[name](dim, num_heads, grid, prefix_tokens, **options)
