"""What a decoder reads of an encoder: the patch tokens of four of its blocks, as maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder
from ..peft.base import Tuned

COUNT = 4  # maps that every decoder reads


class Taps(nn.Module):
    """Images (B, C, H, W) -> 4 maps (B, D, h, w) of patch tokens, in the order of the blocks.

    Prefix and prompt tokens are left out, and the encoder's final norm is applied to each map, as timm's
    `forward_intermediates(norm=True)` does. An encoder of fewer than four blocks gives some of them twice.

    Args:
        tuned: the encoder and the method it learns by.
        layers: four numbers of blocks, from 0; None: evenly spaced, the last among them (2, 5, 8, 11 of 12).
        zeroed: give maps of zeros, the control without an encoder; the graph, and so what learns, stays the same.

    Raises:
        UserError: the method computes no map of a block, or there is no such block.
    """

    def __init__(self, tuned: Tuned, layers: Sequence[int] | None = None, zeroed: bool = False):
        super().__init__()
        blocks = tuned.shape.L
        if not hasattr(tuned.model, "forward_intermediates"):
            raise UserError(
                f"method {tuned.name} gives no maps of single blocks, which a decoder reads: choose another, e.g. lora"
            )
        self.layers = evenly_spaced(blocks) if layers is None else tuple(layers)
        refuse_layers(layers, blocks)
        self.tuned, self.zeroed = tuned, zeroed

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> 4 x (B, D, h, w)."""
        read = sorted(set(self.layers))
        model = cast(Any, self.tuned.model)
        found = model.forward_intermediates(images, indices=read, norm=True, intermediates_only=True)
        maps: dict[int, Tensor] = dict(zip(read, found, strict=True))
        return [maps[layer] * 0 if self.zeroed else maps[layer] for layer in self.layers]


def trimmed(vit: Encoder, layers: Sequence[int] | None) -> Encoder:
    """The encoder without what acts behind its maps: that would learn nothing, and DDP stops at such parameters.

    Raises:
        UserError: there is no such block.
    """
    last = len(vit.blocks) - 1 if layers is None else max(layers)
    refuse_layers(layers, len(vit.blocks))
    vit.prune_intermediate_layers([last], prune_norm=False, prune_head=True)
    return vit


def refuse_layers(layers: Sequence[int] | None, blocks: int) -> None:
    """Raises: UserError: there are no such blocks, or not so many."""
    if layers is not None and (len(layers) != COUNT or not all(0 <= layer < blocks for layer in layers)):
        raise UserError(f"layers must be {COUNT} blocks from 0 to {blocks - 1}, not {list(layers)}")


def evenly_spaced(blocks: int) -> tuple[int, ...]:
    """The last block of each quarter of the blocks."""
    return tuple(-(-blocks * quarter // COUNT) - 1 for quarter in range(1, COUNT + 1))
