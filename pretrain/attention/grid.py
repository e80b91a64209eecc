"""Tokens on a 2-D grid: what the variants that know where a token lies have in common.

    tokens (B, H, N, d)  =  prefix tokens (class, registers), then the grid row by row, N = prefix + h w
    map    (B, h, w, D)  =  the grid alone, the heads side by side in D = H d

Q, K and V are slices of one tensor in which a token's 3 D values lie together, so that the map is a view of it, and
stays one for the convolution and for the pooling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Attention, Grid


class GridAttention(Attention):
    """Attention with a depth-wise convolution of the values on the grid beside it, and landmarks on request.

    Args:
        conv_kernel: side of the convolution's kernel, odd; 0: none.
        landmarks: m, at most (see `landmark_grid`).
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid, prefix_tokens: int, conv_kernel: int, landmarks: int):
        super().__init__(dim, num_heads, grid, prefix_tokens)
        self.conv = depthwise_conv(dim, conv_kernel)
        self.landmark_grid = landmark_grid(grid, landmarks)
        for axis, name in enumerate(("cell_rows", "cell_columns")):
            self.register_buffer(name, cells_of(grid[axis], self.landmark_grid[axis]), persistent=False)
        self.cell_rows: Tensor
        self.cell_columns: Tensor

    def landmarks(self, x: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, prefix + m, d): prefix tokens, then means over the cells of the grid."""
        if self.landmark_grid == self.grid:
            return x
        rows, columns = (F.normalize(cells.to(x.dtype), p=1) for cells in (self.cell_rows, self.cell_columns))
        cells = columns @ to_map(x, self.grid)  # (B, h, columns, D)
        cells = rows @ cells.flatten(2)  # (B, rows, columns D)
        means = to_tokens(cells.unflatten(2, (self.landmark_grid[1], self.dim)), self.num_heads)
        return torch.cat([x[:, :, : self.prefix_tokens], means], dim=2)

    def add_skip(self, out: Tensor, V: Tensor) -> Tensor:
        """out + conv(V), both (B, H, N, d); prefix tokens have no neighbours and get nothing added."""
        if self.conv is None:
            return out
        convolved = self.conv(to_map(V, self.grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return out + F.pad(to_tokens(convolved, self.num_heads), (0, 0, self.prefix_tokens, 0))


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """(B, H, N, d) -> (B, h, w, D), without the prefix tokens."""
    n = grid[0] * grid[1]
    return x[:, :, x.shape[2] - n :].transpose(1, 2).flatten(2).unflatten(1, grid)


def to_tokens(x: Tensor, num_heads: int) -> Tensor:
    """(B, h, w, D) -> (B, H, h w, d)."""
    return x.flatten(1, 2).unflatten(2, (num_heads, -1)).transpose(1, 2)


def depthwise_conv(dim: int, kernel: int) -> nn.Conv2d | None:
    """A convolution that looks at each channel alone and keeps the grid's size.

    Raises:
        ValueError: the kernel is even or negative.
    """
    if kernel < 0 or (kernel and kernel % 2 == 0):
        raise ValueError(f"conv_kernel must be odd, or 0 for none (got {kernel})")
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False) if kernel else None


def cells_of(length: int, cells: int) -> Tensor:
    """(cells, length) 1 where a place of a line belongs to a cell, as adaptive pooling cuts them, else 0.

    Averaging is then two matrix products. The pooling operator's backward pass is not deterministic on a GPU.
    """
    return (F.adaptive_avg_pool1d(torch.eye(length)[None], cells)[0].T > 0).float()


def landmark_grid(grid: Grid, num_landmarks: int) -> Grid:
    """The largest landmark grid of at most m cells, of the token grid's shape as nearly as whole numbers allow.

    It is the token grid itself exactly where m reaches the number of its tokens.
    """
    height, width = grid
    shrink = min(1.0, math.sqrt(num_landmarks / (height * width)))
    rows = min(height, num_landmarks, max(1, round(height * shrink)))
    return rows, min(width, max(1, num_landmarks // rows))
