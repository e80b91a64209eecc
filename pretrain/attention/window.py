"""Attention in windows of the grid (Liu et al. 2021, Swin transformer, arXiv 2103.14030, section 3.2).

A window of w x w tokens attends to itself, which is linear in N; in every other block the cuts lie half a window
further, so that what was apart meets. Prefix tokens (class, registers) attend to all tokens and are seen by every
window: through them, global context costs next to nothing. With one window this is softmax attention.

            cuts of a line of 14 with w = 4:   ....|....|....|..      shifted:   ..|....|....|....

What differs from Swin, and why: windows are cut short at the border, where Swin rolls the map round and masks what
does not belong together: the same windows, without a mask, so that the fused kernels run and any grid will do. There
is no relative position bias: the decoder's tokens carry positions, and a bias would be tied to the window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Attention, Grid, recomputed
from .grid import to_map, to_tokens


class Run(NamedTuple):
    """Neighbouring windows of one side along a line."""

    start: int
    """its first token"""
    number: int
    """of windows"""
    side: int
    """tokens of each"""

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.number * self.side


class WindowAttention(Attention):
    """Attention in windows, linear in N.

    Args:
        window: side of a window, at most: a grid of 14 with windows of at most 8 has windows of 7.
        shift: cut half a window further, in directions that have more than one window; blocks take turns.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: Grid, prefix_tokens: int = 0, *, window: int = 8, shift: bool = False
    ):
        super().__init__(dim, num_heads, grid, prefix_tokens)
        if window < 1:
            raise ValueError("window must be at least 1")
        self.rows, self.columns = (runs(length, window, shift) for length in grid)

    @classmethod
    def options_of_block(cls, index: int) -> dict[str, Any]:
        """Every other block is shifted."""
        return {"shift": index % 2 == 1}

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        return recomputed(self.mix_windows, Q, K, V)

    def mix_windows(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Each block of equal windows in one call of the fused kernel."""
        p, grid = self.prefix_tokens, self.grid
        maps, seen_by_all = [to_map(x, grid) for x in (Q, K, V)], (K[:, :, :p], V[:, :, :p])
        strips = [
            torch.cat([self.block(maps, rows, columns, seen_by_all) for columns in self.columns], dim=2)
            for rows in self.rows
        ]
        out = to_tokens(torch.cat(strips, dim=1), self.num_heads)
        return torch.cat([F.scaled_dot_product_attention(Q[:, :, :p], K, V), out], dim=2) if p else out

    def block(self, maps: list[Tensor], rows: Run, columns: Run, seen_by_all: tuple[Tensor, Tensor]) -> Tensor:
        """Three (B, h, w, D) maps -> (B, rows.number * rows.side, columns.number * columns.side, D)."""
        H, windows = self.num_heads, rows.number * columns.number
        Q, K, V = (partition(x[:, rows.start : rows.stop, columns.start : columns.stop], rows, columns) for x in maps)
        Q, K, V = (x.unflatten(2, (H, -1)).transpose(1, 2) for x in (Q, K, V))  # (B windows, H, tokens, d)
        if self.prefix_tokens:
            shared_K, shared_V = (x.repeat_interleave(windows, dim=0) for x in seen_by_all)
            K, V = torch.cat([shared_K, K], dim=2), torch.cat([shared_V, V], dim=2)
        out = F.scaled_dot_product_attention(Q, K, V).transpose(1, 2).flatten(2)
        return assemble(out, rows, columns)


def runs(length: int, window: int, shift: bool) -> list[Run]:
    """The windows of a line: equal ones as far as they reach, shorter ones at its ends; see the picture above."""
    count = -(-length // window)
    side = -(-length // count)  # the window as the line's length suits it
    first = side // 2 if shift and count > 1 else 0
    whole = (length - first) // side
    found = [Run(0, 1, first), Run(first, whole, side), Run(first + whole * side, 1, (length - first) % side)]
    return [run for run in found if run.number and run.side]


def partition(x: Tensor, rows: Run, columns: Run) -> Tensor:
    """(B, h, w, D) -> (B windows, tokens of a window, D)."""
    x = x.unflatten(2, (columns.number, columns.side)).unflatten(1, (rows.number, rows.side))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def assemble(x: Tensor, rows: Run, columns: Run) -> Tensor:
    """`partition`, undone."""
    x = x.unflatten(1, (rows.side, columns.side)).unflatten(0, (-1, rows.number, columns.number))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
