"""Where the encoder's last block looks: the class token's attention to the patches, head by head.

Legend: B batch, H heads, N tokens, n patches, d width of a head.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .drawing import Panel, Picture, draw, grey_range

MOST_HEADS = 6  # in the picture
CAPTION = (
    "What {query} attends to in the last block, over the patches of the whole view: mean of the {heads} heads, then "
    "{shown}. Every map is scaled by itself, from none to its 99th percentile. "
    "{images}, cropped as in training, with no patch hidden."
)


def has_maps(vit: VisionTransformer) -> bool:
    """Whether the last block's attention is softmax(Q K^T / sqrt(d)) and nothing more; else a map would be wrong."""
    return type(getattr(vit.blocks[-1], "attn", None)) is Attention


def attention_maps(vit: VisionTransformer, images: Tensor) -> Tensor:
    """(B, C, height, width) -> (B, H, n): attention of the class token; without one, of the patches' mean query.

    Fused kernels keep no map, so it is made again from what the block was given, for that one query only.
    """
    attention = cast(Attention, vit.blocks[-1].attn)
    given: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        vit.forward_features(images)
    finally:
        hook.remove()
    B, N, _ = given[0].shape
    Q, K, _ = attention.qkv(given[0]).reshape(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    Q, K = attention.q_norm(Q), attention.k_norm(K)  # (B, H, N, d)
    query = Q[:, :, :1] if vit.has_class_token else Q[:, :, vit.num_prefix_tokens :].mean(2, keepdim=True)
    A = torch.softmax(attention.scale * query @ K.transpose(-2, -1), dim=-1)
    return A[:, :, 0, vit.num_prefix_tokens :]


def picture_of_attention(vit: VisionTransformer, images: Tensor) -> Picture:
    """A row an image: the image, its heads' mean map, single heads."""
    maps = attention_maps(vit, images).float().cpu()
    B, H, _ = maps.shape
    grids = maps.reshape(B, H, 1, *vit.patch_embed.grid_size)
    named = [("mean of heads", grids.mean(1)), *((f"head {h + 1}", grids[:, h]) for h in range(min(H, MOST_HEADS)))]
    image = Panel("image", images.float().cpu(), grey_range(images))
    panels = [Panel(name, grid, [(0.0, high) for _, high in grey_range(grid, 0.99)], "magma") for name, grid in named]
    return Picture("attention", draw([image, *panels]), caption(vit, H))


def caption(vit: VisionTransformer, heads: int) -> str:
    """What the picture shows."""
    return CAPTION.format(
        query="the class token" if vit.has_class_token else "the mean of the patches' queries",
        heads=heads,
        shown="each" if heads <= MOST_HEADS else f"the first {MOST_HEADS}",
        images="Images of the pretraining set",
    )
