"""Dropout and drop-path whose masks belong to the sample, not to the batch it happens to be in.

torch draws them from one generator in the order of the batch, so another number of ranks or micro-batches, or a
restart, would mean other masks. Here a mask is a hash of (seed, place of the sample in the global batch, name of the
module, element): no generator, nothing to save, the same on CPU and GPU, and the same again when activation
checkpointing runs a forward twice. Two forwards of a module in one step, as of MoCo's two views, share their masks.

Legend: B samples of a micro-batch, M modules that drop, k rows a sample has (its tiles or windows), k*B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from .errors import UserError
from .seeding import stable_seed

# Leading dimensions that draw apart (None: all), and the attribute that holds the rate.
SEEDED: dict[type[nn.Module], tuple[int | None, str]] = {
    nn.Dropout: (None, "p"),
    nn.Dropout1d: (2, "p"),
    nn.Dropout2d: (2, "p"),
    nn.Dropout3d: (2, "p"),
    DropPath: (1, "drop_prob"),
}
REFUSED: dict[type[nn.Module], str] = {
    PatchDropout: "prob",
    PatchDropoutWithIndices: "prob",
    DropBlock2d: "drop_prob",
    nn.AlphaDropout: "p",
    nn.FeatureAlphaDropout: "p",
    nn.MultiheadAttention: "dropout",
}
# Multipliers of Wellons' lowbias32, as int32. Products wrap around, on every device alike.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32


class Source:
    """What one module's masks are drawn from.

    A copy of the module draws from the same one: its masks move on with `Noise.set`, not stay as they were when it was
    copied. The numbers are 0-D CPU tensors because a compiler takes those as inputs, and needs no program of its own
    for every block with another rate.
    """

    def __init__(self, p: float, scaled: bool):
        self.keys: Tensor | None = None  # (2, B) int32: what tells its samples apart
        self.limit = torch.tensor(threshold(p), dtype=torch.int32)
        self.scale = torch.tensor(1 / (1 - p) if scaled and p < 1 else 1.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self


class SeededDropout(nn.Module):
    """In training, sets a part p to zero and scales the rest by 1 / (1 - p); otherwise does nothing.

    Args:
        p: the rate, in (0, 1].
        apart: leading dimensions of the input that draw apart: 1 drops whole rows (drop-path), 2 channels, None
            elements.
        scaled: whether to scale.
    """

    def __init__(self, p: float, apart: int | None = None, scaled: bool = True):
        super().__init__()
        self.p, self.apart, self.scaled = p, apart, scaled
        self.source = Source(p, scaled)

    def forward(self, x: Tensor) -> Tensor:
        """(k*B, …) -> the same shape; row r belongs to sample r // k."""
        if not self.training:
            return x
        keys = self.source.keys
        assert keys is not None, "Noise.set comes before a forward in training"
        assert len(x) % keys.shape[1] == 0, f"{len(x)} rows are no multiple of {keys.shape[1]} samples"
        shape = x.shape if self.apart is None else (*x.shape[: self.apart], *(1,) * (x.dim() - self.apart))
        keep = draw(keys, prod(shape) // keys.shape[1]) > self.source.limit
        return torch.where(keep.view(shape), x * self.source.scale, 0.0)

    def extra_repr(self) -> str:
        """As torch and timm print theirs."""
        return f"p={self.p:.3g}, apart={self.apart}"


class Noise:
    """Gives all modules of an objective that drop their masks; `per_sample` makes it."""

    def __init__(self, modules: Mapping[str, SeededDropout]):
        self.sources = [module.source for module in modules.values()]
        self.words = torch.tensor([words(stable_seed(name)) for name in modules], dtype=torch.int32)  # (M, 2)
        self.keys: Tensor | None = None  # (M, 2, B)

    def set(self, seed: int, positions: Tensor) -> None:
        """Before each micro-batch's forward: whose masks come next. Waits for nothing on a GPU.

        torch's own generators start anew too, so that what draws once for a whole batch, as timm's augmentation of
        rotary positions does, gives every micro-batch of every rank the same.

        Args:
            seed: of this step.
            positions: (B,) int64 places of the samples in the global batch, on the device of the model.
        """
        torch.manual_seed(seed % 2**63)
        if not self.sources:
            return
        samples = mix(positions.int())
        states = torch.stack([mix(samples ^ word) for word in words(stable_seed(seed))])
        self.words = self.words.to(positions.device)
        keys = mix(states ^ self.words[..., None])
        if self.keys is not None and (self.keys.shape, self.keys.device) == (keys.shape, keys.device):
            self.keys.copy_(keys)  # compiled programs go on reading the same memory
            return
        self.keys = keys
        for source, own in zip(self.sources, keys, strict=True):
            source.keys = own


def per_sample(objective: nn.Module) -> Noise:
    """Replace, in place, whatever drops at random by modules that draw sample by sample. Names do not change.

    Call it on the bare objective, before anything wraps it. Attention of timm that drops parts of its map gives up the
    fused kernel, which draws for itself. Modules of rate 0 stay as they are.

    Raises:
        UserError: a module drops in a way that has no form for a single sample.
    """
    seeded: dict[nn.Module, SeededDropout] = {}
    names: dict[str, SeededDropout] = {}
    for name, module in objective.named_modules():
        if rate_of(module, name) > 0:
            names[name] = seeded[module] = seeded_like(module)
    for parent in list(objective.modules()):
        for name, child in parent._modules.items():  # `named_children` leaves out a second name of the same module
            if child in seeded:
                setattr(parent, name, seeded[child])
        if isinstance(getattr(parent, "attn_drop", None), SeededDropout) and hasattr(parent, "fused_attn"):
            cast(Any, parent).fused_attn = False
    return Noise(names)


def rate_of(module: nn.Module, name: str) -> float:
    """The part that a module drops in training; 0 for what drops nothing.

    Raises:
        UserError: it drops in a way that has no form for a single sample.
    """
    for kind, attribute in REFUSED.items():
        if isinstance(module, kind) and getattr(module, attribute):
            raise UserError(
                f"{name} ({kind.__name__}) drops at random in a way that would change with the number of ranks; "
                "set its rate to 0"
            )
    if isinstance(module, SeededDropout):
        return module.p
    return next((getattr(module, attribute) for kind, (_, attribute) in SEEDED.items() if isinstance(module, kind)), 0)


def seeded_like(module: nn.Module) -> SeededDropout:
    """Ours in the place of torch's or timm's, or of one of ours that drew from elsewhere."""
    if isinstance(module, SeededDropout):
        return SeededDropout(module.p, module.apart, module.scaled).train(module.training)
    apart, attribute = next(how for kind, how in SEEDED.items() if isinstance(module, kind))
    scaled = getattr(module, "scale_by_keep", True)
    return SeededDropout(getattr(module, attribute), apart, scaled).train(module.training)


# ---------------------------------------------------------------------------------------------- hash


def draw(keys: Tensor, n: int) -> Tensor:
    """(2, B) keys -> (B, n) uniform int32: element i of sample b is a hash of (keys[:, b], i).

    The index is hashed alone and the sample's two words enter before and between the two multiplications, so that no
    sample's row is a shift or a permutation of another's. The last rounds of `mix`, which only better the low bits,
    are left out, and the large tensor is changed in place: half the time of a dropout is spent here.
    """
    bits = mix(torch.arange(n, dtype=torch.int32, device=keys.device)) ^ keys[0, :, None]
    bits *= FIRST
    bits ^= keys[1, :, None]
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= SECOND
    return bits


def mix(x: Tensor) -> Tensor:
    """int32 -> int32, one to one, every bit of the result a fair coin in every bit of x (Wellons' lowbias32).

    The masks make shifts logical, which torch has for signed integers only as arithmetic ones.
    """
    x = (x ^ (x >> 16 & 0xFFFF)) * FIRST
    x = (x ^ (x >> 15 & 0x1FFFF)) * SECOND
    return x ^ (x >> 16 & 0xFFFF)


def threshold(p: float) -> int:
    """The int32 up to which a part p of all int32 lies."""
    return max(round(p * 2**32) - 1, 0) - 2**31


def words(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two int32."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
