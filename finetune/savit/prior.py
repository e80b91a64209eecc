"""Shared Prior Attention: regions one after the other through the same blocks, each told of those before it."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .regions import Regions

EPS = 1e-6  # of layer norms, as in ViTs

Blocks = Callable[[Tensor, Tensor], Tensor]
"""Runs blocks over tokens (B, h, w, D) whose places (1, h w) on the whole grid, counted in raster order, are given."""


class SharedPrior(nn.Module):
    """SPA (Liu et al. 2025): what earlier regions gave, as a running mean, is fused into the next region's input.

        Z~_1 = LN(blocks(Z_1))                           AP_1 = stop-grad(Z~_1)
        Z~_i = LN(blocks(fuse(Z_i, AP_i))),  i = 2…K^2   AP_i = mu_i AP_{i-1} + (1 - mu_i) Z~_{i-1}

    mu_i goes from .5 to .9 on a cosine, so that late regions are told of an average and not of their neighbour. The
    prompt AP has no parameters. Nothing flows back through AP_1, but its values are in every later region, and blocks
    and fusion learn to use them; Z~_{i-1} in the second formula is not cut off, so that the share 1 - mu_i of what a
    region does to its followers does flow back, as in the released code.

    Args:
        dim: D.
        K: the grid is cut into K x K regions.
        fuse: (Z, AP), both (B, h, w, D) -> (B, h, w, D); without it their mean, which has no parameters either.
    """

    def __init__(self, dim: int, K: int = 2, fuse: nn.Module | None = None):
        super().__init__()
        self.K = K
        self.fuse = fuse or Mean()
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, blocks: Blocks) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        height, width = x.shape[1:3]
        regions = Regions((height, width), self.K)
        places = regions.cut(torch.arange(height * width, device=x.device).view(1, height, width))
        return regions.put_back(self.in_turn(regions.cut(x), [place.flatten(1) for place in places], blocks))

    def in_turn(self, Z: list[Tensor], places: list[Tensor], blocks: Blocks) -> list[Tensor]:
        """Z_1, Z_2, … -> Z~_1, Z~_2, …."""
        done = [self.norm(blocks(Z[0], places[0]))]
        prompt = done[0].detach()
        for z, place, mu in zip(Z[1:], places[1:], momenta(len(Z)), strict=True):
            prompt = mu * prompt + (1 - mu) * done[-1]
            done.append(self.norm(blocks(self.fuse(z, prompt), place)))
        return done


def momenta(regions: int, lowest: float = 0.5, highest: float = 0.9) -> list[float]:
    """mu_2, mu_3, … of the regions after the first, from the lowest to the highest on half a cosine."""
    last = max(regions - 2, 1)
    return [highest - (highest - lowest) * (1 + cos(pi * i / last)) / 2 for i in range(regions - 1)]


class Mean(nn.Module):
    """(Z + AP) / 2: the fusion of the tuning method."""

    def forward(self, z: Tensor, prompt: Tensor) -> Tensor:
        """Two (B, h, w, D) -> one."""
        return (z + prompt) / 2


class CrossAttention(nn.Module):
    """The fusion of the backbone: Z asks, as it is; keys and values are projections of AP. 3 D^2 + 3 D numbers.

    As published there is no residual: of every region but the first only its questions go on. With `residual` Z itself
    goes on too, at no further numbers, and what a later region alone shows is learnt faster.
    """

    def __init__(self, dim: int, num_heads: int, residual: bool = False):
        super().__init__()
        self.num_heads, self.residual = num_heads, residual
        self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, z: Tensor, prompt: Tensor) -> Tensor:
        """Two (B, h, w, D) -> one."""
        q, k, v = (split_heads(part.flatten(1, 2), self.num_heads) for part in (z, self.k(prompt), self.v(prompt)))
        mixed = F.scaled_dot_product_attention(q.type_as(k), k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2)).view(z.shape)
        return z + out if self.residual else out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
