"""Where a timm block can be changed without writing its forward again: its residual halves, and its projections.

    x = x + drop_path1(ls1(attn(norm1(x))))       the attention half: first norm1, core attn, last drop_path1
    x = x + drop_path2(ls2(mlp(norm2(x))))        the FFN half:       first norm2, core mlp,  last drop_path2

Post-norm blocks begin with the core and end with the norm; parallel ones have several halves of a kind. Changes are
hooks, bound to modules, so that names of frozen tensors stay, and a deep copy is a copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder

ROLES = {
    **{"qkv": "qkv", "q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "proj"},
    **{"fc1": "fc1", "fc1_g": "fc1", "fc1_x": "fc1", "fc2": "fc2"},
}


@dataclass(frozen=True)
class Half:
    """One residual half of a block: x + last(… core(…)), where `first` reads the residual stream x."""

    block: nn.Module
    first: nn.Module
    core: nn.Module
    last: nn.Module

    def branch(self, module: nn.Module, name: str, own: bool = True) -> None:
        """Add module(x) to what the half adds to the stream, outside LayerScale and drop-path.

        Args:
            module: (B, N, D) stream as the half reads it -> (B, N, D).
            name: of the new child of the block.
            own: the block holds the module; one that stands in several blocks must be held by what holds them all.
        """
        branch = Branch(module, own)
        self.block.add_module(name, branch)
        self.first.register_forward_pre_hook(branch.see)
        self.last.register_forward_hook(branch.add)

    def after(self, module: nn.Module, name: str) -> None:
        """Send the core's output through `module`, (B, N, D) -> (B, N, D), before LayerScale and drop-path."""
        after = After(module)
        self.block.add_module(name, after)
        self.core.register_forward_hook(after.go_through)


class Branch(nn.Module):
    """A module beside a half: keeps the stream that the half reads until the half adds to it, in one forward at a time.

    What it keeps is no part of a copy: after a forward that was broken off it would be a tensor amid a graph.
    """

    def __init__(self, module: nn.Module, own: bool):
        super().__init__()
        if own:
            self.module = module
        self.held = (module,)  # a tuple hides it from parameters() and state_dict()
        self.stream: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": None}

    def see(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the half's first module."""
        self.stream = inputs[0]

    def add(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the half's last module."""
        stream, self.stream = self.stream, None
        added: Tensor = output + self.held[0](stream)
        return added


class After(nn.Module):
    """A module behind another one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def go_through(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the core."""
        changed: Tensor = self.module(output)
        return changed


def attention_halves(block: nn.Module) -> list[Half]:
    """The attention halves of a block.

    Raises:
        UserError: it has none, as where attention and FFN are one.
    """
    return _halves(block, "norm1", "attn", "drop_path1", "attns")


def ffn_halves(block: nn.Module) -> list[Half]:
    """The FFN halves of a block.

    Raises:
        UserError: it has none, as where attention and FFN are one.
    """
    return _halves(block, "norm2", "mlp", "drop_path2", "ffns")


def _halves(block: nn.Module, norm: str, core: str, last: str, several: str) -> list[Half]:
    part = block.get_submodule
    if isinstance(block, Block | EvaBlock):
        return [Half(block, part(norm), part(core), part(last))]
    if isinstance(block, ResPostBlock | EvaBlockPostNorm):
        return [Half(block, part(core), part(core), part(last))]
    if isinstance(block, ParallelThingsBlock):
        parts = [dict(one.named_children()) for one in part(several).children()]
        return [Half(block, p["norm"], p[core], p["drop_path"]) for p in parts]
    raise UserError(
        f"the encoder's blocks are {type(block).__name__}s, which make attention and FFN in one step: this method has "
        "no place in them; use bitfit, ln, vpt_deep or full, or an encoder with plain blocks"
    )


def linears(vit: Encoder) -> dict[str, str]:
    """Path and role (q, k, v, qkv, proj, fc1, fc2) of every projection in the blocks, each called as a module.

    EvaAttention reads the weight of a fused qkv and passes the module by, unless it adds the bias apart: so it is told
    to, or whatever takes the projection's place would silently not be there.
    """
    for module in vit.modules():
        if hasattr(module, "qkv_bias_separate"):
            cast(Any, module).qkv_bias_separate = True
    found = {}
    for path, module in vit.blocks.named_modules(prefix="blocks"):
        match = re.search(r"\.(?:attn|mlp)\.(\w+)$", path)
        if match and isinstance(module, nn.Linear) and match[1] in ROLES:
            found[path] = ROLES[match[1]]
    return found
