"""One decoder: tokens of the coarse grid in, pixels of its own scale out.

Legend: B batch, n = h x w coarse patches, s scale, D decoder width, p patch side, C channels.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Grid, build_attention
from .config import ScaleSection
from .encoder import sincos_positions


class Decoder(nn.Module):
    """Upsample the grid s times, add its own positions, attend, predict p x p pixels a token (MIRAM, fig. 1).

    Args:
        section: the scale and its decoder's shape.
        in_dim: width of the shared grid of tokens.
        grid: (h, w) of the coarse grid.
        prefix_tokens: tokens before the grid, which take part in attention and are dropped at the end.
        out_dim: values a token predicts, p * p * C.
    """

    def __init__(self, section: ScaleSection, in_dim: int, grid: Grid, prefix_tokens: int, out_dim: int):
        super().__init__()
        self.scale, self.upsample, self.grid, self.prefix_tokens = (
            section.scale,
            section.upsample,
            grid,
            prefix_tokens,
        )
        fine = (grid[0] * section.scale, grid[1] * section.scale)
        self.widen = nn.Identity() if in_dim == section.width else nn.Linear(in_dim, section.width)
        positions = F.pad(sincos_positions(fine, section.width), (0, 0, prefix_tokens, 0))
        self.register_buffer("pos_embed", positions, persistent=False)
        self.pos_embed: Tensor
        self.blocks = nn.Sequential(*(decoder_block(section, fine, prefix_tokens) for _ in range(section.depth)))
        self.norm = nn.LayerNorm(section.width, eps=1e-6)
        self.head = nn.Linear(section.width, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, prefix + n, in_dim) -> (B, s*s*n, p*p*C)."""
        x = upsample_tokens(self.widen(tokens), self.grid, self.scale, self.prefix_tokens, self.upsample)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, self.prefix_tokens :])


def decoder_block(section: ScaleSection, grid: Grid, prefix_tokens: int) -> Block:
    """timm's pre-norm block around the attention that the scale asks for."""
    block = Block(section.width, section.heads, qkv_bias=True)
    block.attn = build_attention(
        section.attention, section.width, section.heads, grid, prefix_tokens, **section.options
    )
    return block


def upsample_tokens(tokens: Tensor, grid: Grid, scale: int, prefix_tokens: int, mode: str) -> Tensor:
    """(B, prefix + n, D) -> (B, prefix + s*s*n, D): fine token (s*i + a, s*j + b) comes from coarse token (i, j)."""
    if scale == 1:
        return tokens
    prefix, patches = tokens[:, :prefix_tokens], tokens[:, prefix_tokens:]
    B, n, D = patches.shape
    coarse = patches.transpose(1, 2).reshape(B, D, *grid)
    smooth = {} if mode == "nearest" else {"align_corners": False}
    fine = F.interpolate(coarse, scale_factor=float(scale), mode=mode, **smooth)
    return torch.cat([prefix, fine.reshape(B, D, scale * scale * n).transpose(1, 2)], dim=1)
