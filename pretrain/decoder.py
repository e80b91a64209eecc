"""One decoder: tokens of the coarse grid in, decoded tokens of its own scale out.

Legend: B batch, n = h x w coarse patches, s scale, N = s*s*n fine tokens, D decoder width, p patch side, C channels;
k of T tiles are decoded, of t tokens each.
"""

from __future__ import annotations

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import ATTENTIONS, Grid, build_attention
from .config import ScaleSection
from .encoder import sincos_positions
from .masking import gather_cells, tile_ids


class Decoder(nn.Module):
    """Upsample the grid s times, add its own positions, attend (MIRAM); `head` then predicts patches.

    With `decode_fraction` below 1 only k of T equal tiles of the grid are decoded. A tile is a sequence of its own in
    the batch, so that every attention still sees a grid, and the linear layers, which cost most, get cheaper too
    (decoding a part is CrossMAE's idea, Fu et al. 2024).

    Args:
        section: the scale and its decoder's shape.
        in_dim: width of the shared grid of tokens.
        grid: (h, w) of the coarse grid.
        prefix_tokens: tokens before the grid, which take part in attention and are dropped at the end.
        out_dim: values a token predicts, p * p * C.

    Raises:
        ValueError: the grid has no tiles that make up `decode_fraction`.
    """

    def __init__(self, section: ScaleSection, in_dim: int, grid: Grid, prefix_tokens: int, out_dim: int):
        super().__init__()
        self.prefix_tokens, self.checkpointing = prefix_tokens, section.checkpointing
        sides, self.chosen_tiles = divide(grid, section.decode_fraction)
        fine = (grid[0] * section.scale, grid[1] * section.scale)
        tile = (fine[0] // sides, fine[1] // sides)
        self.widen = nn.Identity() if in_dim == section.width else nn.Linear(in_dim, section.width)
        self.upsample = UpsampleTokens(section.width, grid, section.scale, prefix_tokens, section.upsample)
        positions = F.pad(sincos_positions(fine, section.width), (0, 0, prefix_tokens, 0))
        self.register_buffer("pos_embed", positions, persistent=False)
        self.register_buffer("tiles", tile_ids(fine, tile), persistent=False)
        self.pos_embed: Tensor
        self.tiles: Tensor
        self.blocks = nn.Sequential(*(decoder_block(section, tile, prefix_tokens, i) for i in range(section.depth)))
        self.norm = nn.LayerNorm(section.width, eps=1e-6)
        self.head = nn.Linear(section.width, out_dim)

    def forward(self, tokens: Tensor, chosen: Tensor | None = None) -> Tensor:
        """(B, prefix + n, in_dim) and (B, k) tiles -> (B, k*t, D), tile by tile; without `chosen` (B, N, D)."""
        x = self.upsample(self.widen(tokens)) + self.pos_embed
        x = self.blocks_on(self.cut(x, chosen))[:, self.prefix_tokens :]
        return self.join(self.norm(x), len(tokens), chosen)

    def blocks_on(self, x: Tensor) -> Tensor:
        """The blocks, recomputed in the backward pass if the section asks for it."""
        return checkpoint_seq(self.blocks, x) if self.checkpointing and x.requires_grad else self.blocks(x)

    def cut(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        """(B, prefix + N, D) -> (B*k, prefix + t, D): the tiles, each with the prefix before it."""
        if len(self.tiles) == 1:
            return x
        B, _, D = x.shape
        ids = self.tiles.expand(B, -1, -1) if chosen is None else self.tiles[chosen]
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        tiles = gather_cells(patches, ids.flatten(1)).reshape(-1, ids.shape[2], D)
        return torch.cat([prefix.repeat_interleave(ids.shape[1], 0), tiles], dim=1)

    def join(self, x: Tensor, B: int, chosen: Tensor | None) -> Tensor:
        """(B*k, t, D) -> (B, k*t, D), in raster order where all tiles were decoded."""
        x = x.reshape(B, -1, x.shape[-1])
        return x[:, self.tiles.flatten().argsort()] if chosen is None and len(self.tiles) > 1 else x


class UpsampleTokens(nn.Module):
    """(B, prefix + n, D) -> (B, prefix + N, D): fine token (s*i + a, s*j + b) comes from coarse token (i, j).

    Args:
        width: D.
        grid: (h, w) of the coarse grid.
        scale: s.
        prefix_tokens: tokens before the grid, left alone.
        mode: `nearest` (the paper's code), `bilinear`, or `learned`: one matrix for each of the s*s places (a, b),
            which starts as `nearest`.
    """

    def __init__(self, width: int, grid: Grid, scale: int, prefix_tokens: int, mode: str):
        super().__init__()
        self.grid, self.scale, self.prefix_tokens, self.mode = grid, scale, prefix_tokens, mode
        self.places = nn.ConvTranspose2d(width, width, scale, scale) if mode == "learned" and scale > 1 else None
        if self.places is not None:
            assert self.places.bias is not None
            nn.init.zeros_(self.places.bias)
            self.places.weight.data = torch.eye(width)[..., None, None].repeat(1, 1, scale, scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Upsample the grid, keep the prefix."""
        if self.scale == 1:
            return tokens
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        coarse = patches.transpose(1, 2).unflatten(2, self.grid)
        return torch.cat([prefix, self.enlarged(coarse).flatten(2).transpose(1, 2)], dim=1)

    def enlarged(self, coarse: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, s*h, s*w)."""
        if self.places is not None:
            return self.places(coarse)
        smooth = {} if self.mode == "nearest" else {"align_corners": False}
        return F.interpolate(coarse, scale_factor=float(self.scale), mode=self.mode, **smooth)


def decoder_block(section: ScaleSection, grid: Grid, prefix_tokens: int, index: int) -> Block:
    """timm's pre-norm block around the attention that the scale asks for."""
    options = ATTENTIONS[section.attention].options_of_block(index) | section.options
    block = Block(section.width, section.heads, qkv_bias=True)
    block.attn = build_attention(section.attention, section.width, section.heads, grid, prefix_tokens, **options)
    return block


def divide(grid: Grid, fraction: float) -> tuple[int, int]:
    """The fewest tiles, g x g of them, of which a whole number k makes up `fraction`: (g, k).

    Raises:
        ValueError: there are none.
    """
    for g in range(1, min(grid) + 1):
        k = round(fraction * g * g)
        if not grid[0] % g and not grid[1] % g and k and abs(k - fraction * g * g) < 1e-6:
            return g, k
    sides = [g for g in range(2, min(grid) + 1) if not grid[0] % g and not grid[1] % g]
    possible = f"it can be k/{sides[0] ** 2} with whole k" if sides else "it has none but itself"
    raise ValueError(
        f"decode_fraction {fraction} is no whole number of equal tiles of {grid[0]} x {grid[1]} patches; {possible}"
    )
