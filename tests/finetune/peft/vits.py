"""Small ViTs of every kind that an encoder may be; random weights everywhere, also where training starts at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch

from miram.pretrain.encoder import Encoder

SIZE = 64


def small(name: str = "vit_tiny_patch16_224", image: Any = SIZE, seed: int = 0, **kwargs: Any) -> Encoder:
    """Two blocks of width 48, 3 heads, patches of 16 pixels, one channel."""
    torch.manual_seed(seed)
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": image, "in_chans": 1, "num_classes": 0}
    vit = timm.create_model(name, **(options | kwargs))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vit.eval()


VITS: dict[str, Callable[[], Encoder]] = {
    "class token": small,
    "no class token": lambda: small("vit_base_patch16_gap_224"),
    "registers, LayerScale": lambda: small("vit_base_patch14_reg4_dinov2", patch_size=16),
    "average of registers": lambda: small("vit_medium_patch16_reg4_gap_256"),
    "not square": lambda: small(image=(64, 32)),
    "map pooling": lambda: small("vit_base_patch16_siglip_224"),
    "post-norm": lambda: small("vit_base_patch16_rpn_224"),
    "q and k norms": lambda: small(qk_norm=True),
    "rotary, apart": lambda: small("vit_base_patch16_rope_224"),
    "rotary, registers": lambda: small("vit_small_patch16_dinov3"),
    "SwiGLU": lambda: small("eva02_base_patch14_224", patch_size=16),
    "things in parallel": lambda: small("vit_small_patch16_18x2_224"),
}


def pictures(vit: Encoder, count: int = 2, seed: int = 1) -> torch.Tensor:
    """Random images of the size and channels that an encoder takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size, generator=generator)
