"""Means of what sites learnt, and what a mean of low-rank changes leaves out.

With weights w_k that sum to 1, what site k learnt of a projection is s B_k A_k, and the mean that is wanted is
s sum w_k B_k A_k. The mean of B times the mean of A is another matrix (FedIT leaves it at that). Two ways are exact:

    freeze_a   A is random, the same at every site, and does not learn: mean(B) A = sum w_k B_k A
               (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313)
    residual   mean(B) mean(A) + R, where R = sum w_k (B_k - mean B) (A_k - mean A) goes into the frozen weight
               (FedEx-LoRA, Singhal et al. 2024, arXiv 2410.09432). R has rank (K - 1) r at most, for K sites; over
               rounds it is summed, so that its rank, and with it the order, grows
    plain      mean(B) mean(A), which is not the mean

Of DoRA it is B A that is averaged exactly; the lengths of its rows are a mean of their own. Whatever else learns
(heads, norms, prompts, bottlenecks) is averaged number by number.

Names are those of a model's own tensors, or peft's in its files:
    PATH.lora_A.weight, PATH.lora_A.default.weight, and B likewise      lora, dora; the pair is called PATH
    PATH.lora.A.q, PATH.lora.B.q, and k, v                              lora_qkv; the pairs are PATH.lora.q, …
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...engine.errors import UserError
from ..peft.base import Method
from ..peft.lora_qkv import LoraQkv, Slices
from ..peft.low_rank import Lora
from .config import Mode
from .exchange import Tensors

Factors = tuple[Tensor, Tensor]  # A (r, in) and B (out, r) of B A
Residual = dict[str, Factors]

KINDS = (
    (re.compile(r"(.+)\.lora_A((?:\.default)?\.weight)"), r"\1", r"\1.lora_B\2"),
    (re.compile(r"(.+\.lora)\.A\.([qkv])"), r"\1.\2", r"\1.B.\2"),
)  # an A's name, its pair's, its B's
RESIDUAL = re.compile(r"residual\.(.+)\.A")
PATTERNS = {"rank_pattern", "alpha_pattern"}  # of peft: ranks that differ from projection to projection


def pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The names of A and B of each low-rank change of which both are there."""
    names = set(names)
    found = {}
    for name in sorted(names):
        for kind, path, other in KINDS:
            if (match := kind.fullmatch(name)) and match.expand(other) in names:
                found[match.expand(path)] = (name, match.expand(other))
    return found


def refuse_mode(method: Method, mode: Mode) -> None:
    """Raises: UserError: the method has nothing that is to be averaged in this way, or its ranks are not one."""
    if mode == "residual" and not isinstance(method, Lora | LoraQkv):
        raise UserError(
            f"federate.average=residual is for lora, dora and lora_qkv, and {type(method).__name__} has no low rank; "
            "without one the plain mean is exact: leave federate.average out"
        )
    if mode == "residual" and (odd := PATTERNS & set(getattr(method, "peft", {}))):
        raise UserError(
            f"federate.average=residual takes one rank everywhere, but peft has {', '.join(sorted(odd))}; leave it out"
        )


# ---------------------------------------------------------------------------------------------- means


def average(updates: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """The weighted mean of every tensor, summed in float64 in the order given, in the first one's types.

    Args:
        updates: the same names and shapes.
        weights: of the updates; they sum to 1.
    """
    return {name: _mean([update[name] for update in updates], weights).to(of.dtype) for name, of in updates[0].items()}


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return total


def residual_of(updates: Sequence[Tensors], weights: Sequence[float]) -> Residual:
    """By pair, what the mean of the B A has over the product of the means that `average` gives, of least rank.

    Args:
        updates: the same names and shapes, A and B among them.
        weights: of the updates; they sum to 1.

    Returns:
        Factors of their rank in the type of A; none for a pair on which all agree.
    """
    residual = {}
    for path, (a, b) in pairs(updates[0]).items():
        A, B = ([update[name].double() for update in updates] for name in (a, b))
        size = max(float(one.norm() * other.norm()) for one, other in zip(A, B, strict=True))
        apart = [(one - _mean(A, weights), other - _mean(B, weights)) for one, other in zip(A, B, strict=True)]
        right = torch.cat([weight * one for weight, (one, _) in zip(weights, apart, strict=True)])
        factors = compressed((right, torch.cat([other for _, other in apart], 1)), updates[0][a].dtype, size)
        if len(factors[0]):
            residual[path] = factors
    return residual


def combine(total: Residual, new: Residual) -> Residual:
    """The residual that is both."""
    return {
        path: compressed(together(total[path], new[path]), total[path][0].dtype)
        if path in total and path in new
        else total.get(path) or new[path]
        for path in sorted(total.keys() | new.keys())
    }


def together(one: Factors, other: Factors) -> Factors:
    """Factors of the sum, in float64: A upon A, B beside B."""
    (A, B), (C, D) = one, other
    return torch.cat([A.double(), C.double()]), torch.cat([B.double(), D.double()], 1)


def compressed(factors: Factors, dtype: torch.dtype, size: float = 0.0) -> Factors:
    """The same product from as few columns as its rank; A and B share its scale.

    Q R of both sides leaves a small matrix, whose singular values are those of the product. Those are dropped that are
    less than what rounding to `dtype` does to the largest of them, or to a matrix of the norm `size`.
    """
    A, B = (factor.double() for factor in factors)
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    least = 2 * torch.finfo(dtype).eps * max(float(S[0]), size)
    rank = int(torch.count_nonzero(S.gt(least)))
    root = S[:rank].sqrt()
    return (root[:, None] * (Vh[:rank] @ right.mT)).to(dtype), (left @ U[:, :rank] * root).to(dtype)


# ---------------------------------------------------------------------------------------------- the residual in a model


def as_fixed(residual: Residual) -> Tensors:
    """The residual as an order's fixed tensors."""
    return {
        f"residual.{path}.{letter}": factor
        for path, factors in residual.items()
        for letter, factor in zip("AB", factors, strict=True)
    }


def from_fixed(fixed: Mapping[str, Tensor]) -> Residual:
    """The residual among an order's fixed tensors."""
    paths = [match[1] for name in sorted(fixed) if (match := RESIDUAL.fullmatch(name))]
    return {path: (fixed[f"residual.{path}.A"], fixed[f"residual.{path}.B"]) for path in paths}


@torch.no_grad()
def apply_residual(model: nn.Module, residual: Residual) -> None:
    """Add s B A to the frozen weights, in place; every order has the whole of it, so add it to the encoder's own.

    Args:
        model: the module that the pairs' names are of.
        residual: of an order.
    """
    for path, (A, B) in residual.items():
        weight, scale = _place(model, path)
        change = scale * (B.double() @ A.double()).to(weight.device)
        weight.copy_(weight.double() + change)


def _place(model: nn.Module, path: str) -> tuple[Tensor, float]:
    """The rows of the frozen weight that a pair changes, and s."""
    parent, _, last = path.rpartition(".")
    change = model.get_submodule(parent) if parent else None
    if isinstance(change, Slices):
        weight = cast(Tensor, model.get_submodule(parent.rpartition(".")[0]).weight)
        return weight.split(change.width)[change.slices.index(last)], change.scale
    layer = cast(Any, model.get_submodule(path))
    return layer.get_base_layer().weight, layer.scaling["default"]


def as_one_adapter(method: Method, tensors: Tensors, residual: Residual) -> tuple[Method, Tensors]:
    """Residual and change as one change of larger rank, on the encoder as it was.

    Args:
        method: lora, dora or lora_qkv.
        tensors: what learnt, by name.
        residual: by path.

    Returns:
        The method with the largest rank that a pair needs, s as it was, and its tensors; a pair of a lesser rank has
        zeros behind it.
    """
    if not residual:
        return method, tensors
    assert isinstance(method, Lora | LoraQkv)
    tensors = dict(tensors)
    found = pairs(tensors)
    for path, factors in residual.items():
        a, b = found[path]
        tensors[a], tensors[b] = compressed(together((tensors[a], tensors[b]), factors), tensors[a].dtype)
    rank = max(len(tensors[a]) for a, _ in found.values())
    for a, b in found.values():
        lacking = rank - len(tensors[a])
        tensors[a] = nn.functional.pad(tensors[a], (0, 0, 0, lacking))
        tensors[b] = nn.functional.pad(tensors[b], (0, lacking))
    power = 0.5 if getattr(method, "rslora", False) else 1.0
    alpha = (method.alpha or method.rank) * (rank / method.rank) ** power
    return method.model_copy(update={"rank": rank, "alpha": alpha}), tensors
