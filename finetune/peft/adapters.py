"""Bottleneck adapters: up(act(down(x))), one module, put behind a block's halves or beside its FFN."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ...pretrain.encoder import Encoder
from .base import Method, Size
from .blocks import attention_halves, ffn_halves
from .shape import Shape


class Bottleneck(nn.Module):
    """(…, D) -> (…, D): scale * up(dropout(act(down(x)))), and x itself where it is residual.

    It gives 0, or x, at first, since `up` starts at zero, weight and bias. `down` must not: with both at zero every
    gradient but that of up's bias is zero and stays so, as in the public code of VPT's adapter.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        activation: nn.Module,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        residual: bool = False,
    ):
        super().__init__()
        self.down, self.up = nn.Linear(width, dim), nn.Linear(dim, width)
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        self.scale, self.residual = scale, residual
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        change: Tensor = self.up(self.dropout(self.activation(self.down(x)))) * self.scale
        return x + change if self.residual else change


class Houlsby(Method):
    """Adapters behind attention and FFN: h <- h + up(GELU(down(h))), h = what attention or FFN gives.

    Houlsby et al. 2019 (arXiv 1902.00751); behind the FFN only, after Pfeiffer et al. 2021 (arXiv 2005.00247). It acts
    before LayerScale, drop-path and a post-norm. The weights of `down` start as a normal of deviation 0.01 cut at 0.02,
    `up` and biases at zero, so step 0 is the encoder. Norms stay frozen, as in benchmarks on ViTs; the paper trains
    them too. The adapter in VPT's public code starts `down` at zero: all it ever learns is a bias.

    L adapters for each attention and FFN, each 2 D dim + dim + D: 313,536 of ViT-B with dim 8, 156,768 after the FFN.
    """

    dim: Size = 8
    """Width of the bottleneck."""
    after: Literal["both", "ffn"] = "both"
    """Adapters behind attention and FFN, or behind the FFN only."""

    def attach(self, vit: Encoder) -> nn.Module:
        """One adapter behind every half."""
        like = next(vit.parameters())
        for block in vit.blocks:
            halves = {"attn": attention_halves(block) if self.after == "both" else [], "ffn": ffn_halves(block)}
            for kind, found in halves.items():
                for i, half in enumerate(found):
                    half.after(self.adapter(vit.embed_dim).to(like), f"{kind}_adapter{i}")
        return vit

    def adapter(self, width: int) -> Bottleneck:
        """A new one."""
        made = Bottleneck(width, self.dim, nn.GELU(), residual=True)
        nn.init.trunc_normal_(made.down.weight, std=0.01, a=-0.02, b=0.02)
        return made

    def expected(self, shape: Shape) -> int:
        places = shape.L * shape.branches * (2 if self.after == "both" else 1)
        return places * bottleneck_size(shape.D, self.dim)


class AdaptFormer(Method):
    """An adapter beside the FFN: x <- x + FFN(x) + scale * up(dropout(ReLU(down(x)))), x = the stream, not normed.

    Chen et al. 2022 (arXiv 2205.13535), as released for images. It is added outside LayerScale and drop-path. `down`
    starts kaiming-uniform (a = sqrt 5), `up` and biases at zero, so step 0 is the encoder.

    L adapters for each FFN, each 2 D dim + dim + D: 1,189,632 of ViT-B with dim 64.
    """

    dim: Size = 64
    """Width of the bottleneck."""
    scale: float = 0.1
    """What the adapter's output is multiplied with; fixed."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout within the bottleneck."""

    def attach(self, vit: Encoder) -> nn.Module:
        """One adapter beside every FFN."""
        like = next(vit.parameters())
        for block in vit.blocks:
            for i, half in enumerate(ffn_halves(block)):
                half.branch(self.adapter(vit.embed_dim).to(like), f"ffn_adapter{i}")
        return vit

    def adapter(self, width: int) -> Bottleneck:
        """A new one."""
        made = Bottleneck(width, self.dim, nn.ReLU(), scale=self.scale, dropout=self.dropout)
        nn.init.kaiming_uniform_(made.down.weight, a=math.sqrt(5))
        return made

    def expected(self, shape: Shape) -> int:
        return shape.L * shape.branches * bottleneck_size(shape.D, self.dim)


def bottleneck_size(width: int, dim: int) -> int:
    """Numbers in one adapter: two matrices and two biases."""
    return 2 * width * dim + dim + width
