"""Modular prompt learning: at every block prompts are added, removed and carried."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder
from .base import Method, Size
from .prompts import Prompted, new_prompts
from .shape import Shape


class Modular(Prompted):
    """A ViT whose prompts grow in number from block to block."""

    def __init__(self, vit: Encoder, options: MPL):
        L = len(vit.blocks)
        super().__init__(vit, [options.prompts_at(i) for i in range(L)])
        self.remove = options.remove
        self.prompts = nn.ParameterList(new_prompts(vit, options.new_at(i)) for i in range(min(options.depth, L)))

    def enter(self, i: int, entered: Tensor, left: Tensor) -> Tensor:
        """All but the last few of those that left the block before, and the new ones."""
        if i >= len(self.prompts):
            return left
        carried = left[:, : max(left.shape[1] - self.remove, 0)]
        return torch.cat([carried, self.prompts[i].expand(left.shape[0], -1, -1)], dim=1)


class MPL(Method):
    """Add, remove and carry prompts at every block (Huang et al., ICASSP 2025, arXiv 2502.14125), the vision half.

    n_ctx prompts enter the first block. At each later one, up to `depth` of them, the last `remove` of what left the
    block before are dropped, add * n_ctx new ones appended, and all others carried; behind that, all are carried. Step
    0 is not the encoder, and the init is vpt_shallow's. With l = min(depth, L)

        D n_ctx (1 + add (l - 1))                                          numbers learn

    and block i > 0 sees, at j = min(i, l - 1) > 0,

        max(n_ctx - remove, 0) + add n_ctx + (j - 1) (add n_ctx - remove)  prompts: 1, 2, …, 9 by default.

    The paper projects its prompts from those of a text encoder, 6.7 M numbers; without one they are free. Its code
    counts from the sequence's end, where removing more than there are would cut off patches; here the prompts go only.
    """

    rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)
    additive: ClassVar[bool] = False

    n_ctx: Size = 1
    """Prompts that enter the first block, and in each group added."""
    add: Size = 2
    """Groups of n_ctx added at each later block."""
    remove: NonNegativeInt = 1
    """Prompts dropped before that, the newest first; at most as many as are added."""
    depth: PositiveInt = 9
    """Blocks at which prompts enter; all of an encoder that has fewer."""

    def attach(self, vit: Encoder) -> nn.Module:
        """Prompts for every block at which some enter.

        Raises:
            UserError: more are removed than added.
        """
        if self.remove > self.add * self.n_ctx:
            raise UserError(
                f"remove is {self.remove}, more than the {self.add * self.n_ctx} prompts (add * n_ctx) that a block "
                "adds, so that they would run out; remove fewer"
            )
        return Modular(vit, self)

    def new_at(self, i: int) -> int:
        """How many prompts are new at block i < depth."""
        return self.n_ctx * (self.add if i else 1)

    def prompts_at(self, i: int) -> int:
        """How many prompts block i sees."""
        j, added = min(i, self.depth - 1), self.add * self.n_ctx
        return max(self.n_ctx - self.remove, 0) + added + (j - 1) * (added - self.remove) if j else self.n_ctx

    def expected(self, shape: Shape) -> int:
        return shape.D * self.n_ctx * (1 + self.add * (min(self.depth, shape.L) - 1))
