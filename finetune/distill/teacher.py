"""The frozen encoder that a student learns from.

Legend: B images, C channels, H x W pixels, n patches, V visible ones, D width, h heads of d channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...data.views import Normalisation
from ...engine.errors import UserError
from ...pretrain.encoder import Encoder, layers, normalisation
from ...pretrain.weights.loading import read_encoder

QKV = tuple[Tensor, Tensor, Tensor]


class Teacher:
    """An encoder in eval mode, without gradients, read in its middle; nothing behind that block is computed.

    No module: what holds one has it neither in its parameters nor in its checkpoints, and a copy shares it. It sees
    the student's view with its own normalisation, at the student's size and channels (`load_encoder` adapts both).

    Args:
        name: whatever `load_encoder` takes.
        student: whose view it is shown.
        depth: share of its blocks after which it is read, at least one block.

    Raises:
        UserError: there is no such encoder, or its patches are others than the student's.
    """

    def __init__(self, name: str, student: Encoder, depth: float):
        patches = student.patch_embed
        with naming():
            vit, self.said = read_encoder(name, patches.img_size, patches.proj.in_channels)
        if vit.patch_embed.grid_size != patches.grid_size:
            grids = [f"{one.patch_embed.grid_size[0]} x {one.patch_embed.grid_size[1]}" for one in (vit, student)]
            raise UserError(
                f"distill.teacher: {name} cuts the image into {grids[0]} patches, the student into {grids[1]}; set "
                f"model.encoder to a ViT with patches of {vit.patch_embed.patch_size[0]} pixels"
            )
        self.name, self.vit = name, vit.eval().requires_grad_(False)
        self.block = block_at(vit, depth)
        self.scale, self.shift = change_of(normalisation(student), normalisation(vit))

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    @torch.no_grad()
    def tokens(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """(B, C, H, W) the student's view and (B, V) visible patches -> (B, prefix + V, D) after the chosen block."""
        return nth(layers(self.vit, self.seen(images), ids_keep), self.block)

    @torch.no_grad()
    def attention(self, images: Tensor) -> QKV:
        """(B, C, H, W) the student's view -> Q, K, V as they enter the chosen block's softmax, (B, h, prefix + n, d).

        Raises:
            UserError: the block attends in another way.
        """
        every = torch.arange(self.vit.patch_embed.num_patches, device=images.device).expand(len(images), -1)
        with Attended() as attended:
            for number, _ in enumerate(layers(self.vit, self.seen(images), every), 1):
                if number == self.block:
                    break
                attended.calls.clear()
        if len(attended.calls) != 1 or len({x.shape for x in attended.calls[0]}) != 1:
            kind = type(getattr(self.vit.blocks[self.block - 1], "attn", self.vit.blocks[self.block - 1])).__name__
            raise UserError(
                f"distill.teacher: {self.name} has no plain attention to relate to ({kind}); set kind: dmae"
            )
        return attended.calls[0]

    def seen(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in the teacher's normalisation; the teacher comes to where the images are."""
        if self.shift.device != images.device:
            self.vit.to(images.device)
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
        return images * self.scale + self.shift


class Attended(TorchFunctionMode):
    """Inside, keeps what fused attention is given: normed, rotated and expanded as the block has it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[QKV] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called in the place of every function of torch."""
        if function is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], args[2]))
        return function(*args, **(kwargs or {}))


@contextmanager
def naming() -> Iterator[None]:
    """Say of which setting a fault is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from error


def nth(tensors: Iterator[Tensor], number: int) -> Tensor:
    """Number 1 is the first."""
    return next(x for i, x in enumerate(tensors, 1) if i == number)


def block_at(vit: Encoder, depth: float) -> int:
    """The block after which a share of all is done, counted from 1: of 24 and 0.75 the 18th."""
    return max(1, int(depth * len(vit.blocks) + 0.5))


def shared(x: Tensor, vit: Encoder, other: Encoder) -> Tensor:
    """(…, prefix + V, D) tokens of an encoder -> those that the other has too: class token, if so, and patches."""
    first = int(vit.cls_token is not None and other.cls_token is not None)
    return torch.cat([x[..., :first, :], x[..., vit.num_prefix_tokens :, :]], dim=-2)


def change_of(old: Normalisation, new: Normalisation) -> tuple[Tensor, Tensor]:
    """(C, 1, 1) a and b: what was normalised as x = (g - m) / s is a * x + b by the new mean and deviation."""
    (m, s), (mean, std) = ((torch.tensor(n.mean), torch.tensor(n.std)) for n in (old, new))
    return (s / std).reshape(-1, 1, 1), ((m - mean) / std).reshape(-1, 1, 1)
