"""MixPool: from tokens of single regions to one vector that knows the whole image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .prior import EPS, Blocks
from .regions import Regions

WINDOWS = (3, 5)


class MixPool(nn.Module):
    """Three scales of the whole grid averaged, one block over the result, layer norm, mean.

        M = (mean over 3 x 3 + mean over 5 x 5 + mean over all) / 3      windows slide; edges average what is there
        out = mean(LN(block(adaptive average of M to the size of a region)))

    The paper (Liu et al. 2025) aggregates "local features by multi-pooling". Its released code pools the K x K grid of
    regions, for every token of a region apart, with padding by zeros, and then averages over that grid: for K = 2 its
    three scales are 1, 4/9 and 4/25 of the plain mean over the regions, so that their sum is 1.604 times that mean, a
    constant, whatever the image. Here the regions are put back first, so that the scales differ.
    """

    def __init__(self, dim: int, K: int = 2):
        super().__init__()
        self.K = K
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, block: Blocks) -> Tensor:
        """(B, H, W, D) -> (B, D)."""
        regions = Regions((x.shape[1], x.shape[2]), self.K)
        tokens = mixed(x, regions.size)
        return self.norm(block(tokens, centres(regions.grid, regions.size).to(x.device))).mean((1, 2))


def mixed(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, D) -> (B, *size, D): the three scales, averaged and pooled."""
    x = x.permute(0, 3, 1, 2)
    scales = [F.avg_pool2d(x, side, stride=1, padding=side // 2, count_include_pad=False) for side in WINDOWS]
    mix = (sum(scales) + x.mean((2, 3), keepdim=True)) / (len(scales) + 1)
    return F.adaptive_avg_pool2d(mix, size).permute(0, 2, 3, 1)


def centres(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(1, h w): of every token that adaptive pooling gives, the place on the grid of the middle of what it averages.

    Rotary encoders need to know where a token is: a rotation cannot be averaged, so it has that of a cell.
    """
    rows, columns = (
        torch.tensor([(i * n // S + -(-(i + 1) * n // S) - 1) // 2 for i in range(S)])
        for n, S in zip(grid, size, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).view(1, -1)
