"""Which patches the encoder sees. Legend: B batch, N patches of the grid, M masked ones."""

from __future__ import annotations

import torch
from torch import Tensor


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Mask the patches with the highest noise, per sample (MAE, `random_masking`).

    Args:
        noise: (B, N) numbers; equal ones are taken in order.
        mask_ratio: part that is masked; int(N * (1 - ratio)) patches stay visible, as in MAE.

    Returns:
        (B, N - M) indices of visible patches, in the order of their noise, and (B, N) mask that is True where masked.
    """
    N = noise.shape[1]
    visible = int(N * (1 - mask_ratio))
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_keep = ids_shuffle[:, :visible]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter_(1, ids_keep, False)
    return ids_keep, mask


def upsample_mask(mask: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """(B, N) mask of the grid -> (B, s*s*N) mask of the grid s times as fine."""
    B = mask.shape[0]
    fine = mask.reshape(B, *grid).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return fine.reshape(B, -1)
