"""What an exporter hands back, and whether what it wrote computes what the source computes.

Legend: B images of (C, H, W), already normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.shards import ShardDataset
from ...data.views import Normalisation, windows
from ...engine.errors import RunFailed, UserError

Runner = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> what Source.module gives of them
TOLERANCE = 1e-4  # of outputs up to 1; in proportion where they are larger: float32 has seven digits
BATCHES = (1, 2, 5)
IMAGES = 4  # real ones


@dataclass(frozen=True)
class Written:
    """What one exporter put into the folder.

    Attributes:
        files: their names inside the folder.
        runner: runs what was written, read back from the disk; None where there is nothing that could.
        notes: sentences for the card.
        facts: more keys for export.json.
        tolerance: largest difference from the reference that is a matter of rounding; None where a change is meant
            (int8, merged tokens): it is measured and told, and what it does to the task is the guard's to judge.
        reference: what the runner has to give, where that is more than the source's module gives.
        twin: of merged tokens, the network in torch that merges likewise.
        usage: Python that loads the folder, for the card.
    """

    files: list[str]
    runner: Runner | None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = TOLERANCE
    reference: Runner | None = None
    twin: Runner | None = None
    usage: str = ""


@dataclass(frozen=True)
class Parity:
    """How far what was written is from the source.

    Attributes:
        largest_difference: of any output, absolute.
        largest_output: of the source, absolute.
        tolerance: what the difference may be; None: any.
        inputs: by name, how many images.
    """

    largest_difference: float
    largest_output: float
    tolerance: float | None
    inputs: dict[str, int]

    @property
    def holds(self) -> bool:
        """Whether it is within tolerance; a difference that is not finite never is."""
        allowed = math.inf if self.tolerance is None else self.tolerance
        return math.isfinite(self.largest_difference) and self.largest_difference <= allowed


@dataclass(frozen=True)
class Agreement:
    """How often a file with merged tokens says what torch says that merges likewise.

    Which patches are merged is a choice. Between candidates that are alike to the last digits of float32, as patches of
    air are, two runtimes that round differently choose differently, and what follows is not a matter of rounding any
    more: no tolerance is right for such an image. Noise has hardly any such candidates. So images are counted.

    Attributes:
        images: that both were shown.
        apart: those on which they differ by more than rounding.
        largest_difference: of any output of those that are not apart.
        largest_apart: of those that are.
        tolerance: what is rounding.
    """

    images: int
    apart: int
    largest_difference: float
    largest_apart: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree on most images and nothing is infinite; a wrong file agrees on none."""
        return 2 * self.apart < self.images and math.isfinite(self.largest_apart)

    @property
    def sentence(self) -> str:
        """For the card and the screen."""
        alike = f"The same merging in torch gives the same on {self.images - self.apart} of {self.images} images, to "
        chose = (
            f"; on the others one of the two merged other patches that are nearly alike, which moves outputs by up to "
            f"{self.largest_apart:.3g}"
        )
        return alike + f"{self.largest_difference:.3g}" + (chose if self.apart else "") + "."


def difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or a value is not finite."""
    if one.shape != other.shape or not bool(one.isfinite().all() and other.isfinite().all()):
        return float("inf")
    return float((one.double() - other.double()).abs().max())


def noise(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    """(count, channels, *size) normal numbers, always the same, whatever else was drawn."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, channels, *size, generator=generator)


def inputs_for(
    channels: int, size: tuple[int, int], normalise: Normalisation, shards: ShardDataset | None
) -> dict[str, Tensor]:
    """Noise in batches of several sizes, and a few real images where there are some, by what to call them."""
    found = {f"noise, {count} at once": noise(count, channels, size) for count in BATCHES}
    real = [] if shards is None or shards.channels != channels else pictures(shards, size, normalise)
    return found | ({"images": torch.stack(real)} if real else {})


def pictures(shards: ShardDataset, size: tuple[int, int], normalise: Normalisation) -> list[Tensor]:
    """(C, H, W) of a few images evenly spread over a data set; none where one cannot be read."""
    rows = np.unique(np.linspace(0, len(shards) - 1, IMAGES).round().astype(int)).tolist()
    try:
        return [windows(shards[row], size, normalise)[0] for row in rows]
    except (UserError, OSError):
        return []


@torch.inference_mode()
def parity(reference: Runner, runner: Runner, inputs: Mapping[str, Tensor], tolerance: float | None) -> Parity:
    """Run both on all inputs.

    Args:
        reference: the source.
        runner: what was written.
        inputs: (B, C, H, W) by name.
        tolerance: of outputs up to 1; in proportion to the largest of them where it is larger.
    """
    largest, scale = 0.0, 0.0
    for images in inputs.values():
        wanted = reference(images).float()
        largest = max(largest, difference(wanted, runner(images).detach().cpu().float()))
        scale = max(scale, float(wanted.abs().max()))
    return within(largest, scale, tolerance, {name: len(images) for name, images in inputs.items()})


@torch.inference_mode()
def agreement(twin: Runner, runner: Runner, inputs: Mapping[str, Tensor]) -> Agreement:
    """Run both on all inputs, and count the images on which they differ.

    Raises:
        RunFailed: they differ on most of them.
    """
    found, scale = [], 1.0
    for images in inputs.values():
        wanted, got = twin(images).float(), runner(images).float()
        found += [difference(one, other) for one, other in zip(wanted, got, strict=True)]
        scale = max(scale, float(wanted.abs().max()))
    alike, apart = ([off for off in found if (off <= TOLERANCE * scale) == same] for same in (True, False))
    said = Agreement(len(found), len(apart), max(alike, default=0.0), max(apart, default=0.0), TOLERANCE * scale)
    if not said.holds:
        raise RunFailed(
            f"the exported file differs from the same merging in torch on {said.apart} of {said.images} images, by up "
            f"to {said.largest_apart:.3g}; nothing was written"
        )
    return said


def within(largest: float, scale: float, tolerance: float | None, inputs: dict[str, int]) -> Parity:
    """A parity whose tolerance is in proportion to outputs that are larger than 1."""
    return Parity(largest, scale, None if tolerance is None else tolerance * max(1.0, scale), inputs)


def refuse_other(found: Parity, what: str) -> None:
    """Refuse what computes something else.

    Raises:
        RunFailed: it does; names the figure and the tolerance.
    """
    if not found.holds:
        raise RunFailed(
            f"the exported {what} differs from its source by {found.largest_difference:.3g}, more than the "
            f"{found.tolerance:.3g} that rounding allows; nothing was written"
        )
