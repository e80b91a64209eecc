"""Scaling and shifting of features, which folds into the layers it stands behind."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder
from .base import Method
from .blocks import attention_halves, linears
from .shape import Shape

NORMS = re.compile(r"\d+\.(norm[12]|(attns|ffns)\.\d+\.norm)")  # within `blocks`


class ScaleShift(nn.Module):
    """Turns the output of the layer it is put on into scale * output + shift, channel by channel."""

    def __init__(self, layer: nn.Module, channels: int, axis: int = -1):
        super().__init__()
        like = next(layer.parameters(), torch.empty(0))
        self.scale = nn.Parameter(torch.ones(channels, device=like.device))
        self.shift = nn.Parameter(torch.zeros(channels, device=like.device))
        self.axis = axis
        layer.add_module("ssf", self)
        self.hook = layer.register_forward_hook(self.go_over)

    def go_over(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the layer; in full precision under autocast, as near 1 a bfloat16 has steps of 0.8 %."""
        shape = [1] * output.dim()
        shape[self.axis] = -1
        return (output * self.scale.view(shape) + self.shift.view(shape)).to(output.dtype)

    @torch.no_grad()
    def fold(self, layer: Any) -> None:
        """Put scale and shift into the layer's weight and bias, making those it lacks, and go."""
        weight = torch.ones_like(self.scale) if layer.weight is None else layer.weight
        rows = self.scale.view(-1, *[1] * (weight.dim() - 1))
        bias = self.shift if layer.bias is None else self.scale * layer.bias + self.shift
        layer.weight = nn.Parameter((rows * weight).to(weight.dtype), requires_grad=False)
        layer.bias = nn.Parameter(bias.to(weight.dtype, copy=True), requires_grad=False)
        self.hook.remove()
        del layer.ssf


class SSF(Method):
    """A scale and a shift for every channel: y <- scale * y + shift, y = what a layer gives (Lian et al. 2022).

    They stand behind the patch projection, every norm1, q, k, v, proj, norm2, fc1 and fc2, and the last norm: the
    encoder's, or the one behind its pooling where that is all it has (arXiv 2210.08823). The paper starts them at
    N(1, 0.02) and N(0, 0.02), here they start at 1 and 0, so step 0 is the encoder. Where timm adds EVA's bias of q and
    v behind a fused projection, it comes after the shift. Weight decay would pull scales to 0: leave them out of it.

    Merging folds them into the layer before. One without a bias gets one, so CLIP's patch projection, or a q, k, v
    without biases, has a key that timm's own model of that name has not. An RmsNorm can have none: no merging.

    2 (2D + L (4D + 3A + H')) with H' = H, or 2H in a gated FFN: 205,824 of ViT-B.
    """

    merges: ClassVar[bool] = True

    def attach(self, vit: Encoder) -> nn.Module:
        """A child named ssf on every layer."""
        inner = inner_layers(vit)
        ScaleShift(vit.patch_embed.proj, vit.embed_dim, axis=1)
        for layer in inner:
            ScaleShift(layer, layer.out_features if isinstance(layer, nn.Linear) else vit.embed_dim)
        ScaleShift(last_norm(vit), vit.embed_dim)
        return vit

    def expected(self, shape: Shape) -> int | None:
        """See the class; none where some blocks have fewer keys than queries."""
        if shape.grouped:
            return None
        qkv = sum(shape.linear(role)[1] for role in "qkv")
        half = 4 * shape.D + qkv + shape.gates * shape.H
        return 2 * (2 * shape.D + shape.L * shape.branches * half)

    def merged(self, model: nn.Module) -> Encoder:
        """The encoder with every scale and shift folded into the layer before it.

        Raises:
            UserError: a layer has no place for a shift; nothing has been changed then.
        """
        assert isinstance(model, Encoder)
        layers = {path: part for path, part in model.named_modules() if hasattr(part, "ssf")}
        for path, layer in layers.items():
            if not isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm):
                raise UserError(
                    f"ssf does not merge here: {path}, of {type(layer).__name__}, has no bias for the shift"
                )
        for layer in layers.values():
            layer.ssf.fold(layer)
        return model


def inner_layers(vit: Encoder) -> list[nn.Module]:
    """Norms and projections of the blocks.

    Raises:
        UserError: blocks that make attention and FFN in one step, and have none of these.
    """
    for block in vit.blocks:
        attention_halves(block)
    norms = [part for path, part in vit.blocks.named_modules() if NORMS.fullmatch(path)]
    return norms + [vit.get_submodule(path) for path in linears(vit)]


def last_norm(vit: Encoder) -> nn.Module:
    """The norm of the tokens, or of the pooled features where tokens have none."""
    return vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
