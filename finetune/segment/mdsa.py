"""Multi-scale dynamic sparse attention (MDSA) and the block around it (Li et al., IEEE JBHI 2025, MDSA-UNet).

    x --1x1--> 4 scales --1x1--> x'      windows of x' choose k windows      softmax(q k^T) v over those, + LePE --> out

The authors' article is closed and their release has no licence: what is here follows a description of the release, not
its code. A linear layer of tokens is a 1 x 1 convolution of their map: only attention leaves (B, C, H, W).

Legend: B batch, C channels, H W of a map, n windows of t tokens each, K windows that a window attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from ...pretrain.attention.base import Grid, recomputed

KERNELS = (3, 5, 7)  # of the scales beside the one that is left as it is


@dataclass(frozen=True)
class Switches:
    """What a block leaves to choose; MDSAUNet says why which is the default."""

    head_dim: int = 32
    scale: Literal["head", "dim"] = "head"
    drop: Literal["path", "dropout"] = "path"
    rate: float = 0.1
    norm: Literal["group", "batch"] = "group"
    qkv: Literal["shared", "learned"] = "shared"

    def normalisation(self, channels: int) -> nn.Module:
        """The norm that follows a convolution: 2 C numbers either way; groups of 16 channels (Wu and He 2018)."""
        if self.norm == "batch":
            return nn.BatchNorm2d(channels)
        return nn.GroupNorm(channels // gcd(channels, 16), channels)

    def dropping(self) -> nn.Module:
        """What a residual branch goes through in training: all of an image's branch is dropped, or single numbers."""
        return DropPath(self.rate) if self.drop == "path" else nn.Dropout(self.rate)


class MultiScale(nn.Module):
    """Multi-scale aggregation: a quarter of the channels as it is, three through separable convolutions of 3, 5 and 7.

    2.1875 C^2 + 24.75 C numbers.
    """

    def __init__(self, dim: int, switches: Switches):
        super().__init__()
        part = dim // 4
        self.enter, self.leave = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        own = nn.Sequential(switches.normalisation(part), nn.ReLU())
        self.scales = nn.ModuleList([own, *(_separable(part, kernel, switches) for kernel in KERNELS)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        parts = self.enter(x).chunk(4, dim=1)
        out: Tensor = self.leave(
            torch.cat([scale(part) for scale, part in zip(self.scales, parts, strict=True)], dim=1)
        )
        return out


class MDSA(nn.Module):
    """Attention of every token to those of K windows, which its window chose by the means of windows.

        q = k = v = aggregated x                             qkv="learned": a linear layer of it, as in BiFormer
        windows    the K of most similar direction of the mean; no parameters, no gradient, not weighed
        out        Linear(softmax(scale q k^T) v + depthwise 5x5 of v)

    With q = k a window is the most similar to itself, so it always is among the K; K = 1 is attention within windows.
    Kept for the backward pass are the tokens and the choice: what was gathered, K times the tokens, is made again.

    Args:
        dim: C, a multiple of head_dim and of 4.
        topk: K, at most: a map with fewer windows uses all.
    """

    def __init__(self, dim: int, topk: int, switches: Switches):
        super().__init__()
        self.dim, self.topk, self.heads = dim, topk, dim // switches.head_dim
        self.scale = (switches.head_dim if switches.scale == "head" else dim) ** -0.5
        self.aggregate = MultiScale(dim, switches)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1) if switches.qkv == "learned" else None
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, C, H, W) and the (rows, columns) of windows, which divide H and W -> (B, C, H, W)."""
        kv = q = x = self.aggregate(x)
        if self.qkv is not None:
            q, kv = self.qkv(x).split((self.dim, 2 * self.dim), dim=1)
        Q = cut(q, grid)
        KV = Q if self.qkv is None else cut(kv, grid)
        if self.qkv is None and self.topk == 1:
            mixed = self.attend(Q, KV.flatten(0, 1))
        else:
            chosen = nearest(Q, KV[..., : self.dim], self.topk, own=self.qkv is None)
            mixed = recomputed(self.gather_and_attend, Q, KV, chosen)
        out: Tensor = self.out(put_back(mixed, grid, x.shape[2:]) + self.lepe(kv[:, -self.dim :]))
        return out

    def gather_and_attend(self, Q: Tensor, KV: Tensor, chosen: Tensor) -> Tensor:
        """(B, n, t, C), (B, n, t, C or 2 C) and (B, n, K) windows -> (B, n, t, C)."""
        B, n, K = chosen.shape
        first = n * torch.arange(B, device=chosen.device)[:, None, None]
        gathered = KV.flatten(0, 1).index_select(0, (first + chosen).flatten())
        return self.attend(Q, gathered.unflatten(0, (B * n, K)).flatten(1, 2))

    def attend(self, Q: Tensor, KV: Tensor) -> Tensor:
        """(B, n, t, C) and (B n, K t, C or 2 C), keys first and values last -> (B, n, t, C)."""
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (Q.flatten(0, 1), KV[..., : self.dim], KV[..., -self.dim :])
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return mixed.transpose(1, 2).reshape(Q.shape)


class ConvGLU(nn.Module):
    """h = Linear(x); Linear(GELU(LN(depthwise 3x3(h) * h))). 2 r C^2 + (13 r + 1) C numbers for r C hidden channels."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = int(dim * ratio)
        self.enter, self.leave = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.gate = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = LayerNorm2d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.enter(x)
        out: Tensor = self.leave(F.gelu(self.norm(self.gate(h) * h)))
        return out


class Block(nn.Module):
    """x + depthwise 3x3(x), then x + MDSA(LN(x)), then x + ConvGLU(LN(x)); norms have an eps of 1e-6.

    C^2 (3.1875 + 2 r) + C (66.75 + 13 r) numbers with q = k = v.
    """

    def __init__(self, dim: int, topk: int, ratio: float, switches: Switches):
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = LayerNorm2d(dim), LayerNorm2d(dim)
        self.attention, self.glu = MDSA(dim, topk, switches), ConvGLU(dim, ratio)
        self.drop = switches.dropping()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, C, H, W) and the (rows, columns) of windows -> (B, C, H, W)."""
        x = x + self.position(x)
        x = x + self.drop(self.attention(self.norm1(x), grid))
        out: Tensor = x + self.drop(self.glu(self.norm2(x)))
        return out


def cut(x: Tensor, grid: Grid) -> Tensor:
    """(B, C, H, W) -> (B, n, t, C): windows, and the tokens of each, in raster order."""
    x = x.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def put_back(x: Tensor, grid: Grid, size: tuple[int, ...]) -> Tensor:
    """`cut`, undone: (B, n, t, C) -> (B, C, H, W)."""
    x = x.unflatten(2, (size[0] // grid[0], size[1] // grid[1])).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def nearest(Q: Tensor, K: Tensor, topk: int, own: bool) -> Tensor:
    """(B, n, K): of each window of queries the windows whose keys have the mean of the most similar direction.

    In 32 bits, whatever the autocast: rounded to bf16, many are equally near. `own`: every window has itself, which
    holds by itself where q = k, but for rounding and for windows of the same mean (air).
    """
    with torch.autocast(Q.device.type, enabled=False):
        q, k = (F.normalize(x.mean(2, dtype=torch.float32), dim=-1) for x in (Q, K))
        score = q @ k.mT
    if own:
        itself = torch.eye(score.shape[-1], dtype=torch.bool, device=score.device)
        score = score.masked_fill(itself, torch.inf)  # not in place on the diagonal, which ONNX cannot say
    return score.topk(min(topk, score.shape[-1])).indices


def _separable(channels: int, kernel: int, switches: Switches) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        switches.normalisation(channels),
        nn.ReLU(),
    )
