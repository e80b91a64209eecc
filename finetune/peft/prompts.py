"""Learnable prompts in the sequence of a frozen ViT, and visual prompt tuning: shallow, deep and gated.

    prefix | prompts | patches    into every block; what comes out at the prompts is carried on, replaced or mixed

The prompts are taken out before the final norm, so that pooling and every reader see the encoder's own tokens only.
They carry no position: rotary ones are kept off them, and a block treats all its tokens alike, so that their place in
the sequence decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, NonNegativeInt
from timm.models.eva import Eva
from torch import Tensor, nn

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder, embed, run
from .base import Method, Size
from .shape import Shape

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]


class Prompted(nn.Module):
    """A ViT with prompts in its sequence: images (B, C, H, W) -> features (B, D), read without prompts."""

    def __init__(self, vit: Encoder, counts: Sequence[int]):
        """`counts`: how many prompts each block sees."""
        super().__init__()
        self.vit = vit
        for block, count in zip(vit.blocks, counts, strict=True):
            for module in block.modules():
                if hasattr(module, "num_prefix_tokens"):  # attention that rotates all tokens but these
                    cast(Any, module).num_prefix_tokens = vit.num_prefix_tokens + count

    def enter(self, i: int, entered: Tensor, left: Tensor) -> Tensor:
        """The prompts (B, m, D) that enter block i.

        Args:
            i: the block.
            entered: (B, m', D) the prompts that entered the block before; none, (B, 0, D), before the first.
            left: (B, m', D) what came out of that block in their place.
        """
        raise NotImplementedError

    def walk(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Prefix (B, prefix, D) and patches (B, N, D) after every block; the prompts go from block to block here."""
        x, rope = embed(self.vit, images)
        if not isinstance(self.vit, Eva):
            x = self.vit.patch_drop(x)
        x = self.vit.norm_pre(x)
        prefix, patches = x[:, : self.vit.num_prefix_tokens], x[:, self.vit.num_prefix_tokens :]
        entered = left = x[:, :0]
        for i, block in enumerate(self.vit.blocks):
            prompts = self.enter(i, entered, left)
            rotated: dict[str, Any] = {} if rope is None else {"rope": self.angles(rope, i)}
            sequence = run(block, torch.cat([prefix, prompts, patches], dim=1), self.vit.grad_checkpointing, **rotated)
            entered = prompts
            prefix, left, patches = sequence.split([prefix.shape[1], prompts.shape[1], patches.shape[1]], dim=1)
            yield prefix, patches

    def angles(self, rope: Tensor, i: int) -> Tensor:
        """Block i's rotary positions: its own where every block has its own."""
        return rope[i] if getattr(self.vit, "rope_mixed", False) else rope

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, prefix + N, D), normed, no prompts among them."""
        *_, last = self.walk(images)
        tokens: Tensor = self.vit.norm(torch.cat(last, dim=1))
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), pooled as the encoder pools."""
        features: Tensor = self.vit.forward_head(self.forward_features(images))
        return features

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Intermediates | tuple[Tensor, Intermediates]:
        """What timm's method of that name gives, the prompts taken out.

        Args:
            images: (B, C, H, W).
            indices: of blocks; n the last n, None all.
            return_prefix_tokens: pairs of patches and prefix (B, prefix, D), if the encoder has any.
            norm: pass each through the encoder's final norm.
            output_fmt: patches as (B, D, rows, columns) or (B, N, D).
            intermediates_only: without the final tokens (B, prefix + N, D) before them.
        """
        blocks = range(len(self.vit.blocks))
        last = blocks[-indices:] if isinstance(indices, int) else blocks
        taken = [blocks[i] for i in indices] if isinstance(indices, Sequence) else last
        prefix, found, tokens = self.vit.num_prefix_tokens, [], torch.empty(0)
        for i, parts in enumerate(self.walk(images)):
            tokens = torch.cat(parts, dim=1)
            if i in taken:
                found.append(self.vit.norm(tokens) if norm else tokens)
        patches = [x[:, prefix:] for x in found]
        if output_fmt == "NCHW":
            height, width = images.shape[-2:]
            grid = self.vit.patch_embed.dynamic_feat_size((height, width))
            patches = [x.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for x in patches]
        chosen: Intermediates = patches
        if return_prefix_tokens and prefix:
            chosen = [(x, y[:, :prefix]) for x, y in zip(patches, found, strict=True)]
        return chosen if intermediates_only else (self.vit.norm(tokens), chosen)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass."""
        self.vit.set_grad_checkpointing(enable)


def new_prompts(vit: Encoder, *shape: int) -> nn.Parameter:
    """(*shape, D) from U(-v, v), v = sqrt(6 / (C p^2 + D)) (VPT; v is the Xavier bound of the patch projection).

    The paper writes 3 p^2: its pictures have 3 channels. Ours have C.
    """
    weight = cast(Tensor, vit.patch_embed.proj.weight)
    bound = math.sqrt(6 / (weight[0].numel() + vit.embed_dim))
    return nn.Parameter(torch.empty(*shape, vit.embed_dim).uniform_(-bound, bound).to(weight))


# ---------------------------------------------------------------------------------------------- the modules


class Shallow(Prompted):
    """Prompts enter at one block and are carried through the rest."""

    def __init__(self, vit: Encoder, options: VPT, *sets: int):
        """`sets`: how many sets of prompts there are, if more than one."""
        p, start = options.num_prompts, options.start
        super().__init__(vit, [0] * start + [p] * (len(vit.blocks) - start))
        self.start = start
        self.dropout = nn.Dropout(options.dropout)
        self.prompts = new_prompts(vit, *sets, p)

    def enter(self, i: int, entered: Tensor, left: Tensor) -> Tensor:
        """New ones at the first block, then what the block before made of them."""
        return self.fresh(self.prompts, left) if i == self.start else left

    def fresh(self, prompts: Tensor, left: Tensor) -> Tensor:
        """Prompts (p, D) for every sample of a batch: (B, p, D)."""
        dropped: Tensor = self.dropout(prompts.expand(left.shape[0], -1, -1))
        return dropped


class Deep(Shallow):
    """New prompts at every block, in the place of those that the block before made."""

    def __init__(self, vit: Encoder, options: VPT):
        super().__init__(vit, options, len(vit.blocks) - options.start)

    def enter(self, i: int, entered: Tensor, left: Tensor) -> Tensor:
        """Block i's own."""
        return left if i < self.start else self.fresh(self.prompts[i - self.start], left)


class Gated(Shallow):
    """Prompts mixed, between any two blocks, of what entered the first and what left it."""

    def __init__(self, vit: Encoder, options: VPTGated):
        super().__init__(vit, options)
        blocks = list(vit.blocks)[options.start :]
        self.gates = nn.Parameter(torch.full((len(blocks) - 1,), -options.gate_init).to(self.prompts))
        self.temperatures = nn.ModuleList(Temperature(block) for block in blocks if options.temperature)
        self.temperatures.to(self.prompts)

    def enter(self, i: int, entered: Tensor, left: Tensor) -> Tensor:
        """sigma(g) left + (1 - sigma(g)) entered."""
        if i <= self.start:
            return super().enter(i, entered, left)
        gate = self.gates[i - self.start - 1].sigmoid()
        return gate * left + (1 - gate) * entered


class Temperature(nn.Module):
    """Divides the queries of a block's attention, and with them its logits, by a learnt number in [0.01, 10]."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))
        found = [module for name, module in block.named_modules() if name.endswith("q_norm")]
        assert found, f"{type(block).__name__} without q_norm"  # timm's attentions all have one, be it an Identity
        for module in found:
            module.register_forward_hook(self.divide)

    def divide(self, _: nn.Module, inputs: tuple[Any, ...], queries: Tensor) -> Tensor:
        """A softmax of q k / t is one of (q / t) k; beyond the bounds t keeps its gradient, to come back."""
        value = self.value + (self.value.clamp(0.01, 10) - self.value).detach()
        return queries / value.to(queries.dtype)


# ---------------------------------------------------------------------------------------------- the methods


class VPT(Method):
    """Options that the kinds of visual prompt tuning share."""

    rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)
    additive: ClassVar[bool] = False

    num_prompts: Size = 10
    """Prompts in the sequence of a block."""
    start: NonNegativeInt = 0
    """The first block with prompts. Later ones serve self-supervised encoders better."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the new prompts' numbers, in training."""

    def check_start(self, vit: Encoder, blocks: int = 1) -> None:
        """At least so many blocks have prompts.

        Raises:
            UserError: fewer.
        """
        if self.start > len(vit.blocks) - blocks:
            raise UserError(
                f"start is {self.start}, but the encoder has {len(vit.blocks)} blocks and prompts must enter at least "
                f"{blocks}: set a smaller start"
            )


class VPTShallow(VPT):
    """p prompts enter the first block and are carried through all (Jia et al., ECCV 2022, arXiv 2203.12119).

    From block `start` on the sequence is [prefix | p prompts | patches]. Every patch attends to the prompts from the
    first step on, so step 0 is not the encoder. Init U(-v, v), v = sqrt(6 / (C p^2 + D)), p the patch's side.

        p D          numbers learn, p the prompts

    Public code pools MAE's tokens with the prompts among them; here they are taken out first.
    """

    def attach(self, vit: Encoder) -> nn.Module:
        """One set of prompts, put in once."""
        self.check_start(vit)
        return Shallow(vit, self)

    def expected(self, shape: Shape) -> int:
        return self.num_prompts * shape.D


class VPTDeep(VPT):
    """p new prompts at every block; what a block makes of its own is dropped (Jia et al., ECCV 2022, arXiv 2203.12119).

    Step 0 is not the encoder, and the init is as with vpt_shallow.

        (L - start) p D          numbers learn
    """

    def attach(self, vit: Encoder) -> nn.Module:
        """A set of prompts for every block."""
        self.check_start(vit)
        return Deep(vit, self)

    def expected(self, shape: Shape) -> int:
        return (shape.L - self.start) * self.num_prompts * shape.D


class VPTGated(VPT):
    """Shallow prompts with a gate after every block but the last (Yoo et al., ICML 2023, arXiv 2306.05067).

    prompt <- s out + (1 - s) in, s = sigmoid(g), g a number for each block. With g = -gate_init at first the prompts
    reach every block nearly as they were put in, and the gates learn which blocks may rework them: made for
    self-supervised encoders, whose later blocks want them. Step 0 is not the encoder.

        p D + (L - start) - 1          numbers learn; and L - start with temperature
    """

    gate_init: float = 5.0
    """Gates start at sigmoid(-gate_init): 0.0067; the released default is 10, its example 5."""
    temperature: bool = False
    """Also learn, for each block with prompts, a temperature of its attention, 1 at first, within [0.01, 10]."""

    def attach(self, vit: Encoder) -> nn.Module:
        """One set of prompts, and the gates."""
        self.check_start(vit, blocks=2)
        return Gated(vit, self)

    def expected(self, shape: Shape) -> int:
        blocks = shape.L - self.start
        return self.num_prompts * shape.D + blocks - 1 + self.temperature * blocks
