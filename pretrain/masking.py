"""Which patches the encoder sees, and grids cut into tiles. Legend: B batch, N cells of a grid, n patches."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Grid


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Mask the cells with the highest noise, per sample (MAE, `random_masking`).

    Args:
        noise: (B, N) numbers; equal ones are taken in order.
        mask_ratio: part that is masked; int(N * (1 - ratio)) cells stay visible, as in MAE.

    Returns:
        (B, V) indices of visible cells, in the order of their noise, and (B, N) mask that is True where masked.
    """
    N = noise.shape[1]
    visible = int(N * (1 - mask_ratio))
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_keep = ids_shuffle[:, :visible]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter_(1, ids_keep, False)
    return ids_keep, mask


def upsample_mask(mask: Tensor, grid: Grid, scale: int) -> Tensor:
    """(B, N) mask of the grid -> (B, s*s*N) mask of the grid s times as fine."""
    B = mask.shape[0]
    fine = mask.reshape(B, *grid).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return fine.reshape(B, -1)


def tile_ids(grid: Grid, tile: Grid) -> Tensor:
    """(T, t) indices of the cells of each of T tiles of t cells; tiles, and cells of a tile, in raster order."""
    (h, w), (a, b) = grid, tile
    return torch.arange(h * w).reshape(h // a, a, w // b, b).transpose(1, 2).reshape(-1, a * b)


def gather_cells(x: Tensor, ids: Tensor) -> Tensor:
    """(B, N, D) and (B, K) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
