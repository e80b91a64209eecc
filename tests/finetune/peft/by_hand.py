"""A plain ViT's forward, written out: what the prompts' tests compare with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miram.pretrain.encoder import Encoder


def embed(vit: Encoder, images: Tensor) -> Tensor:
    """Class token and patches with their positions; patches cut and projected by hand."""
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    side = weight.shape[-1]
    cut = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    patches = cut.reshape(len(images), -1, weight[0].numel()) @ weight.flatten(1).T + bias
    return torch.cat([vit.cls_token.expand(len(images), 1, -1), patches], dim=1) + vit.pos_embed


def norm(layer: Any, x: Tensor) -> Tensor:
    """Layer norm."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def attention(block: Any, x: Tensor, temperature: float = 1.0) -> Tensor:
    """The stream after the attention half, head by head."""
    attn, y = block.attn, norm(block.norm1, x)
    q, k, v = (y @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=-1)
    d = q.shape[-1] // attn.num_heads
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * d, (h + 1) * d)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d) / temperature
        heads.append(logits.softmax(-1) @ v[..., part])
    return x + torch.cat(heads, dim=-1) @ attn.proj.weight.T + attn.proj.bias


def ffn(block: Any, x: Tensor) -> Tensor:
    """What the FFN adds to the stream."""
    y = norm(block.norm2, x)
    hidden = F.gelu(y @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def through(block: Any, x: Tensor, temperature: float = 1.0) -> Tensor:
    """One block."""
    x = attention(block, x, temperature)
    return x + ffn(block, x)
