"""SAViT as a backbone of its own, trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.errors import UserError
from ...pretrain.encoder import initialise, run, sincos_positions
from .mixpool import MixPool
from .prior import EPS, CrossAttention, SharedPrior, split_heads
from .regions import Regions


class LowRankAttention(nn.Module):
    """Lr-MSA (Liu et al. 2025): queries and keys have D / tau channels, values and output all D.

    softmax(q k^T / sqrt(d / tau)) v for heads of d channels. 2 D^2 (1 + 1 / tau) + 2 D (1 + 1 / tau) numbers.
    """

    def __init__(self, dim: int, num_heads: int, tau: int = 4, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.q, self.k, self.v = nn.Linear(dim, dim // tau), nn.Linear(dim, dim // tau), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.q, self.k, self.v))
        drop = self.attn_drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal)
        out: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return out


class SAViT(nn.Module):
    """Regions through shared blocks (SharedPrior with cross-attention), then MixPool: images -> features or logits.

    Args:
        image_size: height and width in pixels, multiples of the patch.
        in_chans: C.
        embed_dim: D, a multiple of 4 and of num_heads tau.
        depth: blocks; the last is MixPool's.
        tau: of low-rank attention.
        K: regions a side.
        residual: a region's own tokens go on beside what its cross-attention gives; published without.
        num_classes: 0 for features.
        drop_rate, attn_drop_rate, drop_path_rate: of projections, attention and, growing with depth, blocks.

    Raises:
        UserError: sizes that do not go together.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        in_chans: int = 1,
        embed_dim: int = 768,
        depth: int = 11,
        num_heads: int = 12,
        *,
        tau: int = 4,
        K: int = 2,
        residual: bool = False,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
        size = (height, width)
        _check(size, patch_size, embed_dim, depth, num_heads, tau, K)
        self.num_features = self.embed_dim = embed_dim
        self.num_classes, self.grad_checkpointing, self.num_prefix_tokens = num_classes, False, 0
        self.patch_embed = PatchEmbed(size, patch_size, in_chans, embed_dim, flatten=False, output_fmt="NHWC")
        Regions(self.patch_embed.grid_size, K)
        self.pos_embed = nn.Parameter(torch.zeros(1, *self.patch_embed.grid_size, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            _block(embed_dim, num_heads, tau, mlp_ratio, drop_rate, attn_drop_rate, drop_path)
            for drop_path in cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.prior = SharedPrior(embed_dim, K, CrossAttention(embed_dim, num_heads, residual))
        self.mixpool = MixPool(embed_dim, K)
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAE's initialisation: xavier-uniform, zero biases; positions begin as sines and cosines, and learn."""
        initialise(self)
        with torch.no_grad():
            grid = self.patch_embed.grid_size
            self.pos_embed.copy_(sincos_positions(grid, self.embed_dim).view(self.pos_embed.shape))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what they computed."""
        self.grad_checkpointing = enable

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D) tokens of all regions in raster order of the grid, before MixPool."""
        return self._regions(images).flatten(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), or (B, num_classes)."""
        pooled = self.mixpool(self._regions(images), partial(self._through, self.blocks[-1:]))
        out: Tensor = self.head(self.norm(pooled))
        return out

    def _regions(self, images: Tensor) -> Tensor:
        x = self.pos_drop(self.patch_embed(images) + self.pos_embed)
        out: Tensor = self.prior(x, partial(self._through, self.blocks[:-1]))
        return out

    def _through(self, blocks: nn.ModuleList, x: Tensor, places: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        for block in blocks:
            tokens = run(block, tokens, self.grad_checkpointing)
        return tokens.view(x.shape)


def savit_base(image_size: int | Sequence[int] = 224, **options: Any) -> SAViT:
    """Width 768, 12 heads, 10 blocks for the regions and MixPool's: 70,743,173 numbers with 3 channels, 5 classes."""
    return SAViT(image_size, embed_dim=768, depth=11, num_heads=12, **options)


def savit_small(image_size: int | Sequence[int] = 224, **options: Any) -> SAViT:
    """Width 384, 6 heads, 10 blocks for the regions and MixPool's: 17,898,053 numbers with 3 channels, 5 classes."""
    return SAViT(image_size, embed_dim=384, depth=11, num_heads=6, **options)


def expected(
    D: int, depth: int, patches: int, *, in_chans: int = 1, patch_size: int = 16, tau: int = 4, num_classes: int = 0
) -> int:
    """How many numbers a SAViT has with FFNs of 4 D, by the closed form.

    patch embedding (C p^2 + 1) D, positions N D, a block (10 + 2 / tau) D^2 + (11 + 2 / tau) D, cross-attention
    3 D^2 + 3 D, three norms 6 D, head (D + 1) classes.
    """
    block = 10 * D**2 + 2 * D**2 // tau + 11 * D + 2 * D // tau
    outer = (in_chans * patch_size**2 + 1) * D + patches * D + 3 * D**2 + 3 * D + 6 * D
    return depth * block + outer + (D + 1) * num_classes


def _block(dim: int, heads: int, tau: int, ratio: float, drop: float, attn_drop: float, drop_path: float) -> Block:
    norm = partial(nn.LayerNorm, eps=EPS)
    block = Block(dim, heads, ratio, proj_drop=drop, drop_path=drop_path, norm_layer=cast(Any, norm))
    block.attn = LowRankAttention(dim, heads, tau, attn_drop, drop)
    return block


def _check(size: tuple[int, int], patch: int, dim: int, depth: int, heads: int, tau: int, K: int) -> None:
    if min(*size, patch, dim, heads, tau, K) < 1:
        raise UserError(f"sizes and numbers must be 1 or more: {(*size, patch, dim, heads, tau, K)}")
    if size[0] % patch or size[1] % patch:
        raise UserError(f"an image of {size[0]} x {size[1]} is not made of patches of {patch} x {patch}")
    if dim % 4 or dim % (heads * tau):
        raise UserError(f"embed_dim {dim} must be a multiple of 4 and of num_heads x tau = {heads * tau}")
    if depth < 2:
        raise UserError("depth must be 2 or more: MixPool has the last block, the regions have the others")
