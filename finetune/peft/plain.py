"""Methods that add nothing: some of the encoder's own tensors learn.

Closed forms are in the letters of `Shape`; there is none for encoders with parts that these do not tell.
"""

from __future__ import annotations

from typing import ClassVar

from timm.layers.norm import RmsNorm
from torch import nn

from ...pretrain.encoder import Encoder
from .base import Method
from .shape import Shape

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm)


class Plain(Method):
    """A choice among the encoder's own tensors."""

    merges: ClassVar[bool] = True

    def attach(self, vit: Encoder) -> nn.Module:
        for tensor in self.chosen(vit):
            tensor.requires_grad_(True)
        return vit

    def chosen(self, vit: Encoder) -> list[nn.Parameter]:
        """The tensors that learn."""
        raise NotImplementedError

    def merged(self, model: nn.Module) -> Encoder:
        assert isinstance(model, Encoder)
        return model


class Full(Plain):
    """Everything learns, positions that were fixed in pretraining too (as in MAE's fine-tuning).

    DCp^2 + D, (prefix + positions) D and 2D for every norm outside the blocks, and in each block
    3DA + AD + DH' + HD weights, the biases of `bitfit`, the norms of `ln`, and 2D of LayerScale where it has it; H' is
    H, or 2H in a gated FFN. With A = D and H = 4D: 12 D^2 + 13 D a block, 85,798,656 of ViT-B/16.
    """

    rates: ClassVar[tuple[float, float]] = (1e-5, 1e-3)

    def chosen(self, vit: Encoder) -> list[nn.Parameter]:
        return list(vit.parameters())

    def expected(self, shape: Shape) -> int | None:
        if not shape.plain:
            return None
        s = shape
        half = 4 * s.D * s.A + (s.gates + 1) * s.D * s.H + 2 * s.D * s.scaled
        outside = s.C * s.p**2 + s.prefix + s.positions
        return s.D * outside + s.L * s.branches * half + biases(s) + norm_weights(s)


class Linear(Plain):
    """Nothing of the encoder learns: 0, and a head on its features."""

    rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    def chosen(self, vit: Encoder) -> list[nn.Parameter]:
        return []

    def expected(self, shape: Shape) -> int:
        return 0


class BitFit(Plain):
    """Every bias learns, those of norms too (Ben Zaken et al. 2022, arXiv 2106.10199).

    D of the patches, D for every norm outside the blocks, and in each block q A + D + H' + D of projections (q of q, k
    and v have a bias: 3, of EVA 2) and 2D of norms: 11D, and 102,912 of ViT-B/16.
    """

    rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)

    def chosen(self, vit: Encoder) -> list[nn.Parameter]:
        """Tensors named bias; of EVA also q_bias and v_bias."""
        return [tensor for name, tensor in vit.named_parameters() if name.endswith("bias")]

    def expected(self, shape: Shape) -> int | None:
        return biases(shape) if shape.plain else None


class NormTuning(Plain):
    """Weight and bias of every norm learn.

    2D for every norm outside the blocks and 4D a block, with 2d for a norm of q or k: 38,400 of ViT-B/16.
    """

    rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)

    def chosen(self, vit: Encoder) -> list[nn.Parameter]:
        """Those of norms."""
        return [tensor for part in vit.modules() if isinstance(part, NORMS) for tensor in part.parameters()]

    def expected(self, shape: Shape) -> int | None:
        return 2 * norm_weights(shape) if shape.plain else None


def biases(s: Shape) -> int:
    """Numbers in all biases of a plain ViT."""
    half = s.qkv_biases * s.A + s.D + s.gates * s.H + s.D
    return s.D * s.patch_bias + s.L * s.branches * half + norm_weights(s)


def norm_weights(s: Shape) -> int:
    """Numbers in the weights of all norms, and in their biases."""
    block = s.branches * (2 * s.D + s.qk_norms * s.d + s.ffn_norms * s.H)
    return s.outer_norms * s.D + s.L * block
