"""Dynamic visual prompt tuning: prompts ask the sample's own patches, through a bottleneck beside every FFN."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ...pretrain.encoder import Encoder
from .base import Method, Size
from .blocks import ffn_halves
from .prompts import Prompted, new_prompts
from .shape import Shape


class Aggregate(nn.Module):
    """(B, prefix + m + N, D) -> same: gate * up([x at the prefix | attention at the prompts | x at the patches]).

    x = gelu(down(stream)) of width r. The prompts' rows of x are the queries, the patches' are keys and values, in one
    head with no projections: softmax(p x^T / sqrt(r)) x. The prefix is neither asked nor asks.
    """

    def __init__(self, width: int, dim: int, prefix: int, prompts: int):
        super().__init__()
        self.prefix, self.prompts = prefix, prompts
        self.down, self.up = nn.Linear(width, dim), nn.Linear(dim, width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, stream: Tensor) -> Tensor:
        """The stream as the FFN half reads it, before its norm."""
        x = F.gelu(self.down(stream))
        ends = self.prefix, self.prefix + self.prompts
        prefix, prompts, patches = x.tensor_split(ends, dim=1)
        q, kv = prompts[:, None], patches[:, None]  # of one head: ONNX has no attention without that dimension
        found = F.scaled_dot_product_attention(q, kv, kv, scale=x.shape[-1] ** -0.5)[:, 0]
        out: Tensor = self.gate * self.up(torch.cat([prefix, found, patches], dim=1))
        return out


class Dynamic(Prompted):
    """A ViT with prompts in its sequence, carried, and an Aggregate beside every FFN, shared by successive blocks."""

    def __init__(self, vit: Encoder, options: DVPT):
        L, D, m = len(vit.blocks), vit.embed_dim, options.num_prompts
        period, shape = options.period(L), (D, options.dim, vit.num_prefix_tokens, m)
        halves = [ffn_halves(block)[0] for block in vit.blocks]  # or refuses, before anything is changed
        super().__init__(vit, [m] * L)
        self.prompts = new_prompts(vit, m)
        self.positions = nn.Parameter((torch.randn(m, D) / math.sqrt(D)).to(self.prompts))
        self.shared = nn.ModuleList(Aggregate(*shape) for _ in range(0, L, period)).to(self.prompts)
        for i, half in enumerate(halves):
            half.branch(self.shared[i // period], "dvpt", own=False)

    def enter(self, i: int, entered: Tensor, left: Tensor) -> Tensor:
        """Prompts with their positions at the first block, then what the block before made of them."""
        return left if i else (self.prompts + self.positions).expand(left.shape[0], -1, -1)


class DVPT(Method):
    """Prompts that gather from the patches of the sample at hand (He et al., arXiv 2307.09787; Neural Networks 2025).

    m prompts, each with a position of its own, stand in the sequence of every block. In parallel with its FFN, from the
    stream x after attention, outside LayerScale:

        X = gelu(x W_d + b_d)                                     width r = dim
        Z = softmax(X_prompts X_patches^T / sqrt(r)) X_patches
        x <- x + FFN(LN x) + gate ([X_prefix | Z | X_patches] W_u + b_u)

    The gate is 0 at first, but the prompts are in the sequence, so step 0 is not the encoder. Prompts start as
    vpt_shallow's, smaller than the released N(0, 1); positions as released, N(0, 1/D); down and up as torch's Linear. A
    module stands in `share_every` blocks (with FFNs in parallel, beside the first): ceil(L / share_every) modules and

        2 m D + ceil(L / share_every) (2 D r + r + D + 1)          numbers learn: 202,836 on a ViT-B

    The released ViT code computes the attention and drops its result; a reimplementation scales by sqrt(D) in a space
    of width r, and reads prompt 0 for the class token. The released read-out averages class token and prompts; here
    the encoder pools its own tokens as it always did, so Z works through the attention of the next block, and that of
    the last block reaches nothing.
    """

    rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)
    additive: ClassVar[bool] = False

    num_prompts: Size = 50
    """Prompts in the sequence, m."""
    dim: Size = 20
    """Width of the bottleneck, r."""
    share_every: PositiveInt | Literal["all"] = 3
    """Successive blocks with one module: 3 as released, 1 for the 0.5 % of the abstract, all for a single one."""

    def period(self, blocks: int) -> int:
        """Successive blocks with one module."""
        return blocks if self.share_every == "all" else self.share_every

    def attach(self, vit: Encoder) -> nn.Module:
        """Prompts in the sequence, a bottleneck beside the FFNs."""
        return Dynamic(vit, self)

    def expected(self, shape: Shape) -> int:
        D, L, m, r = shape.D, shape.L, self.num_prompts, self.dim
        return 2 * m * D + math.ceil(L / self.period(L)) * (2 * D * r + r + D + 1)
