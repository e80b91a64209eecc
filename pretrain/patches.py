"""Images as patches and as training targets. Legend: B batch, C channels, p patch side, N patches."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p*p*C): patches, and pixels of a patch, in raster order, channels last (as MAE)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, p*p*C) -> (B, C, H, W), the inverse of `patchify`."""
    B, h, w = patches.shape[0], *grid
    x = patches.reshape(B, h, w, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * p, w * p)


def patch_moments(patches: Tensor, variance_floor: float) -> tuple[Tensor, Tensor]:
    """(B, N, P) -> mean and standard deviation of each patch, both (B, N, 1).

    The floor is added to the variance: without it a patch of air is stretched until its noise fills the target, and
    the model is asked to predict noise.
    """
    mean = patches.mean(-1, keepdim=True)
    return mean, torch.sqrt(patches.var(-1, keepdim=True) + variance_floor)


def normalise_patches(patches: Tensor, variance_floor: float) -> Tensor:
    """Each patch minus its mean, over its standard deviation (MAE, section 3, with unbiased variance as released)."""
    mean, std = patch_moments(patches, variance_floor)
    return (patches - mean) / std
