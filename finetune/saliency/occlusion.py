"""What changes when a part of the image is hidden (Zeiler and Fergus 2014).

A square of tissue is replaced by the tissue's mean around it, with soft edges so that nothing new is drawn. Its worth
is what that takes off the log-odds of a class. Temperature does not enter: it would shrink every change alike.

Legend: K frames of an image, C channels, H and W of a frame, r and c rows and columns of a map, n images, w outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, special
from torch import Tensor

from ...data.frames import frames
from ...data.shards import Sample
from ...data.views import Normalisation
from ...engine.metrics import Floats
from ..classify.locked import Locked
from ..classify.reading import mean_logits
from ..classify.targets import Target
from ..said import said_of
from .worth import Map

STRIDE, SIDE = 2, 3  # of the squares, in patches: neighbours overlap a little
FEWEST = 0.02  # a square with less tissue is not worth hiding
FAINTEST = 0.05  # a change of the log-odds below which colours stay pale: at most 1.25 % of a probability
AS_STORED = Normalisation(0.0, 1.0)

Array = NDArray[np.float32]
Place = tuple[int, ...]  # row and column of a map


def occlusion(locked: Locked, sample: Sample, batch_size: int = 64, stride: int = STRIDE, side: int = SIDE) -> Map:
    """How much the log-odds of a class (`Said.number`) drop where a square of tissue is hidden.

    Args:
        locked: a model of frames.
        sample: the image.
        batch_size: frames at once.
        stride: patches from one square to the next.
        side: patches along a square.
    """
    hiding = Hiding.of(locked, sample, stride, side)
    hidden = hiding.places()
    pictures = (normalised(raw, locked.card.normalise) for raw in hiding.pictures(hidden))
    told = mean_logits(cast(torch.nn.Module, locked.model), pictures, 1 + len(hidden), batch_size)
    said = said_of(locked, told[:1])
    before, *after = log_odds(locked.target, told, said.number)
    values = np.zeros(hiding.shape)
    for place, now in zip(hidden, after, strict=True):
        values[place] = before - now
    how = (
        f"Orange: hiding this place lowers the log-odds of {said.answer} (before temperature), so it speaks for it; "
        f"blue: it speaks against. Squares of {side} patches, {stride} apart, each replaced by the mean of the tissue "
        "around it."
    )
    return Map(values, said, "what hiding it takes off the log-odds", FAINTEST, how)


def log_odds(target: Target, logits: Floats, number: int) -> Floats:
    """(n,) log-odds of a class, of (n, w) logits at temperature 1; finite however sure the model is."""
    if target.kind == "multilabel":
        return logits[:, number]
    if target.kind == "ordinal":
        return np.asarray(special.logit(target.probabilities(logits)[:, number].clip(1e-12, 1 - 1e-12)))
    return np.asarray(logits[:, number] - special.logsumexp(np.delete(logits, number, axis=1), axis=1))


# ---------------------------------------------------------------------------------------------- squares


@dataclass(frozen=True)
class Hiding:
    """Squares of an image, and its frames without them.

    Attributes:
        raw: (K, C, H, W) grey levels from 0 to 1.
        filling: (K, C, H, W) what is put in a hidden place.
        tissue: (K, H, W) what can be hidden.
        y: (K, H, W) row of the stored image that a pixel shows.
        x: (K, H, W) column.
        stored: rows and columns of the stored image.
        step: stored pixels along a patch.
        stride: patches from one square to the next.
        side: patches along a square.
        least: pixels of tissue that a square must have.
    """

    raw: Array
    filling: Array
    tissue: Array
    y: Array
    x: Array
    stored: tuple[int, int]
    step: float
    stride: int
    side: int
    least: float

    @classmethod
    def of(cls, locked: Locked, sample: Sample, stride: int, side: int) -> Hiding:
        """Those of an image, for a model of frames."""
        card, patch = locked.card, patch_of(locked)
        assert card.input != "tiles", "of tiles the attention is shown"
        raw = frames(sample, card.image_size, AS_STORED, card.input).numpy()
        y, x, inside = places(sample, card.image_size, card.input)
        filling, tissue = surroundings(raw, patch * side)
        height, width = sample.pixels.shape[:2]
        step, least = patch * stored_per_frame(y, inside), FEWEST * (side * patch) ** 2
        return cls(raw, filling, tissue * inside, y, x, (height, width), step, stride, side, least)

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c) squares down and across."""
        down, across = (max(1, round(length / (self.stride * self.step))) for length in self.stored)
        return down, across

    def mask(self, place: Place) -> Array:
        """(K, H, W) how much of a pixel is hidden, from 0 to 1."""
        of = zip(place, self.stored, self.shape, strict=True)
        row, column = ((i + 0.5) * length / count - 0.5 for i, length, count in of)
        return self.tissue * square(self.y, self.x, (row, column), self.side * self.step, self.step / 2)

    def places(self) -> list[Place]:
        """Squares with tissue in them."""
        return [place for place in np.ndindex(self.shape) if self.mask(place).sum() >= self.least]

    def pictures(self, hidden: Sequence[Place]) -> Iterator[Array]:
        """(K, C, H, W) the frames as they are, then without each of these squares."""
        yield self.raw
        for place in hidden:
            yield self.raw + self.mask(place)[:, None] * (self.filling - self.raw)


def places(sample: Sample, size: tuple[int, int], input: str) -> tuple[Array, Array, Array]:
    """(K, H, W) row and column of the stored image that each pixel of its frames shows, and whether it shows one.

    The frames of pictures whose pixels are their own places: true of whatever `frames` does.
    """
    shape = sample.pixels.shape[:2]
    assert max(shape) < 2**16
    rows, columns = np.indices(shape, np.uint16)
    ramps = (rows, columns, np.full(shape, 2**16 - 1, np.uint16))
    of = (replace(sample, pixels=ramp, max_value=2**16 - 1, mask=None) for ramp in ramps)
    y, x, inside = (frames(ramp, size, AS_STORED, cast(Any, input)).numpy()[:, 0] for ramp in of)
    return y * (2**16 - 1), x * (2**16 - 1), (inside > 0.5).astype(np.float32)


def stored_per_frame(y: Array, inside: Array) -> float:
    """Stored pixels a pixel of the frame, down."""
    steps = np.diff(y, axis=1)[(inside[:, 1:] * inside[:, :-1]) > 0]
    return float(np.median(steps)) if steps.size else 1.0


def surroundings(raw: Array, reach: float) -> tuple[Array, Array]:
    """(K, C, H, W) mean of the tissue around each pixel, within about `reach` pixels; and (K, H, W) tissue."""
    tissue = (raw != 0).any(1).astype(np.float32)
    sigma = (0, 0, reach / 2, reach / 2)
    weight = ndimage.gaussian_filter(tissue[:, None], sigma, mode="constant")
    mean = ndimage.gaussian_filter(raw * tissue[:, None], sigma, mode="constant") / np.maximum(weight, 1e-6)
    return mean.astype(np.float32), tissue


def square(y: Array, x: Array, middle: tuple[float, float], side: float, soft: float) -> Array:
    """1 in a square of the stored image, 0 outside, over an edge of `soft` stored pixels in between."""
    along: Iterable[Array] = (
        np.clip((side / 2 - np.abs(at - centre)) / soft + 0.5, 0, 1) for at, centre in zip((y, x), middle, strict=True)
    )
    return np.prod(list(along), axis=0)


def normalised(raw: Array, normalise: Normalisation) -> Tensor:
    """Frames of grey levels from 0 to 1 as the model wants them."""
    return torch.from_numpy(np.stack([normalise(frame.copy()) for frame in raw.astype(np.float32)]))


def patch_of(locked: Locked) -> int:
    """Pixels along a patch of the encoder."""
    embeds = (m for m in cast(torch.nn.Module, locked.model).modules() if hasattr(m, "grid_size"))
    return int(cast(Any, next(embeds)).patch_size[0])
