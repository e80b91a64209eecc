"""Linformer attention (Wang et al. 2020) on a 2-D grid of tokens.

    out = softmax(Q K'^T / sqrt(d)) V',    K' = E K,  V' = F V,    E, F learnt, k rows on the grid             (eq. 7)

What differs from the reference, and why:
 - prefix tokens stay keys and values of their own beside the k projected ones; E and F see the grid alone;
 - E and F are kept as pictures (k, height, width), so that weights of another grid can be resized when they are
   loaded: spread bilinearly in 2-D, every row keeping its sum, so that K' of an enlarged image stays what it was;
 - they start as means over k cells that tile the grid, which is exact attention to a coarser grid (and attention
   itself at k = N). The papers' random rows of variance 1 / k give K' a variance N / k times that of K: at N = 12544
   a softmax ten times too sharp. No noise is added: the rows differ, so there is no symmetry to break.
There is no sharing between layers, as a module knows no other. The code behind the MIRAM paper takes V := K and one
head for keys and values; that is no Linformer but a weaker thing, and not offered.
Softmax is the fused kernel: nothing of size N x k is kept.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Attention, Grid


class LinformerAttention(Attention):
    """Attention to k learnt mixtures of the tokens, linear in N.

    Args:
        num_projected: k, at most the grid's tokens. The paper finds 128 enough for 512 tokens, 256 for 1024. Each of
            E and F has k N weights (a head, if sharing is none): at 3136 tokens and 256, a quarter of what a block of
            width 512 has.
        sharing: `headwise`: heads share E and F; `key_value`: and E = F, as good in the paper at half the weights;
            `none`: a head has its own E and F.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        prefix_tokens: int = 0,
        *,
        num_projected: int = 256,
        sharing: Literal["headwise", "key_value", "none"] = "key_value",
    ):
        super().__init__(dim, num_heads, grid, prefix_tokens)
        if num_projected < 1:
            raise ValueError("num_projected must be at least 1")
        if sharing not in ("headwise", "key_value", "none"):
            raise ValueError(f"sharing must be headwise, key_value or none, not {sharing!r}")
        start = cell_means(grid, min(num_projected, grid[0] * grid[1]))
        groups = num_heads if sharing == "none" else 1
        self.E = nn.Parameter(start.repeat(groups, 1, 1, 1))
        self.register_parameter("F", None if sharing == "key_value" else nn.Parameter(self.E.detach().clone()))
        self.F: Tensor | None

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        F = self.E if self.F is None else self.F
        return functional.scaled_dot_product_attention(Q, self.project(self.E, K), self.project(F, V))

    def project(self, E: Tensor, X: Tensor) -> Tensor:
        """(B, H, prefix + N, d) -> (B, H, prefix + k, d)."""
        prefix, patches = X[:, :, : self.prefix_tokens], X[:, :, self.prefix_tokens :]
        B, H, N, d = patches.shape
        rows = patches.transpose(1, 2).reshape(B, N, H * d)
        # One product a group of heads: a broadcast over heads would copy E, and its gradient, for each of them.
        mixed = [
            torch.bmm(part.flatten(1).expand(B, -1, -1), group)
            for part, group in zip(E, rows.chunk(len(E), dim=-1), strict=True)
        ]
        return torch.cat([prefix, torch.cat(mixed, dim=-1).reshape(B, -1, H, d).transpose(1, 2)], dim=2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Weights of another grid are resized to this one."""
        for name in (f"{prefix}E", f"{prefix}F"):
            if name in state_dict and state_dict[name].shape[-2:] != self.grid:
                state_dict[name] = resize(state_dict[name], self.grid)
        super()._load_from_state_dict(state_dict, prefix, *args)


def cell_means(grid: Grid, k: int) -> Tensor:
    """(k, height, width): row i is the mean over cell i of k, of nearly equal shape, that tile the grid."""
    height, width = grid
    bands = max(-(-k // width), min(height, k, round(math.sqrt(k * height / width))))
    means = torch.zeros(k, height, width)
    for band in range(bands):
        first, last = band * k // bands, (band + 1) * k // bands
        rows = slice(band * height // bands, (band + 1) * height // bands)
        for cell in range(first, last):
            left, right = ((cell - first + side) * width // (last - first) for side in (0, 1))
            means[cell, rows, left:right] = 1 / ((rows.stop - rows.start) * (right - left))
    return means


def resize(E: Tensor, grid: Grid) -> Tensor:
    """(…, height, width) -> (…, *grid), bilinear, sums over the grid unchanged."""
    across, down = (spread(old, new).to(E) for old, new in zip(E.shape[-2:], grid, strict=True))
    return across @ E @ down.T


def spread(old: int, new: int) -> Tensor:
    """(new, old): how much of each old place goes to each new one; columns sum to one, so that no mass is lost."""
    weights = functional.interpolate(
        torch.eye(old, dtype=torch.double)[None, None], (new, old), mode="bilinear", antialias=True
    )[0, 0]
    return weights / weights.sum(0)
