"""How far each parameter of an encoder is from what reads it, in blocks: the depth that layer-wise decay counts."""

from __future__ import annotations

from timm.models import group_parameters

from .encoder import Encoder


def distances(encoder: Encoder, prefix: str = "encoder.") -> dict[str, int]:
    """Parameter name -> blocks up to what reads the encoder, as timm groups a ViT's parameters.

    Of n blocks, patch embedding, tokens and positions are at n + 1, block i at n - i, the last norm at 1 with the last
    block (MAE has it at 0), and whatever acts on all blocks or after pooling at 0.
    """
    layers: dict[str, int] = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    return {prefix + name: len(encoder.blocks) + 1 - layer for name, layer in layers.items()}
