"""LoRA on q, k and v chosen one by one, also where they are one projection, of which peft can only change the whole.

The change is a hook on the projection, which stays timm's own. On disk it is `adapter.safetensors`; `as_peft` writes
the same change as a plain LoRA of peft's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import PositiveFloat
from timm.layers.attention import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.functional import linear

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder
from .base import Method, Size
from .blocks import linears
from .low_rank import PREFIX, Fraction, Lora, require, write_files
from .shape import Shape

IN_THIRDS = (Attention, AttentionRope, DiffAttention, EvaAttention)  # their fused qkv gives q, then k, then v
CHILD = "lora"


class Slices(nn.Module):
    """s B A x for some of the slices that a projection's output is made of.

    Attributes:
        A: by slice, (rank, in); Kaiming-uniform with a = sqrt 5.
        B: by slice, (out of the slice, rank); zero.
    """

    def __init__(self, projection: nn.Linear, slices: str, chosen: str, rank: int, scale: float, dropout: float):
        super().__init__()
        self.slices, self.width, self.scale = slices, projection.out_features // len(slices), scale
        self.dropout = nn.Dropout(dropout)
        new = projection.weight.new_empty
        self.A = nn.ParameterDict(
            {s: nn.init.kaiming_uniform_(new(rank, projection.in_features), a=5**0.5) for s in chosen}
        )
        self.B = nn.ParameterDict({s: nn.init.zeros_(new(self.width, rank)) for s in chosen})

    def factors(self) -> tuple[Tensor, Tensor]:
        """All A, one upon another: (n rank, in), and all B, each in the rows of its slice: (out, n rank)."""
        nothing = next(iter(self.B.values())).new_empty(self.width, 0)
        rows = [self.B.get(s, nothing) for s in self.slices]
        return torch.cat([self.A[s] for s in self.slices if s in self.A]), torch.block_diag(*rows)

    def add(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the projection: (…, in) and (…, out) -> (…, out)."""
        A, B = self.factors()
        changed: Tensor = output + self.scale * linear(linear(self.dropout(inputs[0]), A), B)
        return changed


class LoraQkv(Method):
    """Low-rank adaptation of q, k and v apart: W_t x + s B_t A_t x, s = alpha / rank, for each t that is chosen.

    Each has its own A and B, so a rank that q needs is not shared with k and v; in training all read the same dropped
    inputs. B starts at 0, so the first step is the encoder's. rank (D + A) numbers for each projection: L n 2 rank D
    where A = D, on ViT-B at rank 4 147,456 for two of them and 221,184 for three.

    q and v are what the LoRA paper changes (Hu et al. 2021, arXiv 2106.09685), q and k what adapter_plus and SAViT do.
    Public code: MeLo edits the output of qkv in place and scales by alpha // rank, 0 where alpha < rank.
    """

    merges: ClassVar[bool] = True

    rank: Size = 4
    """inner width of each change"""
    alpha: PositiveFloat | None = None
    """the changes are scaled by alpha / rank; null: as rank"""
    targets: Literal["q", "k", "v", "qk", "qv", "kv", "qkv"] = "qkv"
    """which of queries, keys and values change"""
    dropout: Fraction = 0.0
    """of what A reads, in training"""

    def attach(self, vit: Encoder) -> nn.Module:
        """Hang the changes on the projections.

        Raises:
            UserError: q, k and v are not to be told apart in its blocks, or are changed already.
        """
        if changes(vit):
            raise UserError("the encoder has lora_qkv on it already; merge that first, or take it as it was loaded")
        found = linears(vit)
        fused = "qkv" in found.values()
        require(vit, found, {"qkv"} if fused else {*self.targets})
        for path, role in found.items():
            if role == "qkv" and not isinstance(vit.get_submodule(path.removesuffix(".qkv")), IN_THIRDS):
                kind = type(vit.get_submodule(path.removesuffix(".qkv"))).__name__
                raise UserError(f"where q, k and v lie in the encoder's {kind} is not known; use lora, or plain blocks")
            if role == "qkv" or role in self.targets:
                self.hang(vit.get_submodule(path), role)
        return cast(nn.Module, vit)

    def hang(self, projection: nn.Module, slices: str) -> None:
        """Hang the change of a projection's slices, `qkv` or one of them, on it."""
        assert isinstance(projection, nn.Linear)
        chosen = self.targets if slices == "qkv" else slices
        change = Slices(projection, slices, chosen, self.rank, (self.alpha or self.rank) / self.rank, self.dropout)
        projection.add_module(CHILD, change)
        projection.register_forward_hook(change.add)

    def expected(self, shape: Shape) -> int | None:
        """L branches n rank (D + A); with fewer keys than queries, no closed form but of q."""
        if shape.grouped and self.targets != "q":
            return None
        return shape.L * shape.branches * sum(self.rank * sum(shape.linear(letter)) for letter in self.targets)

    @torch.no_grad()
    def merged(self, model: nn.Module) -> Encoder:
        """The encoder with W_t + s B_t A_t in plain projections; what is not chosen is bit by bit what it was."""
        for path, projection, change in changes(model):
            A, B = change.factors()
            plain = nn.utils.skip_init(
                nn.Linear,
                projection.in_features,
                projection.out_features,
                bias=projection.bias is not None,
                device=projection.weight.device,
                dtype=projection.weight.dtype,
            )
            wide = torch.promote_types(A.dtype, torch.float32)
            plain.weight.copy_(projection.weight.to(wide) + change.scale * (B.to(wide) @ A.to(wide)))
            if projection.bias is not None:
                plain.bias.copy_(projection.bias)
            model.set_submodule(path, plain.train(projection.training).requires_grad_(False))
        return cast(Encoder, model)

    def as_peft(self, model: nn.Module, folder: Path) -> None:
        """Write the same change as one LoRA of peft's on each projection, A upon A and B side by side.

        The rank is n rank on a fused qkv, for n of q, k and v, and the scale the same. How plain peft reads it, and
        what EVA needs then, `low_rank` says.

        Args:
            model: what `attach` returned.
            folder: where adapter_config.json and adapter_model.safetensors go; it exists.
        """
        tensors: dict[str, Tensor] = {}
        for path, _, change in changes(model):
            names = (f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight")
            tensors |= dict(zip(names, change.factors(), strict=True))
        fused = change.slices == "qkv"
        times = len(self.targets) if fused else 1
        lora = Lora(rank=times * self.rank, alpha=times * (self.alpha or self.rank), dropout=self.dropout)
        write_files(lora.config({"qkv"} if fused else {*self.targets}), tensors, model, folder)


def changes(model: Any) -> list[tuple[str, nn.Linear, Slices]]:
    """Path, projection and change, wherever there is one."""
    parts = [(path, part) for path, part in model.named_modules() if isinstance(getattr(part, CHILD, None), Slices)]
    return [(path, cast(nn.Linear, part), cast(Slices, part.get_submodule(CHILD))) for path, part in parts]
