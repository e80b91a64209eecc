"""Crops that a segmentation model is trained on: an image at a stated resolution, and its mask, changed alike.

stored image      its raster: resampled as a whole      crops of `size` on the raster; beyond the image is air
+--------+        +------+                              +---+
|##   o  |  --->  |## o  |  (h, w) = raster(...)  --->  |# o|  image (C, *size), mask (*size) class numbers
|####    |        |###   |                              |## |
+--------+        +------+                              +---+

Each crop is made from the stored pixels under it, by the kernel that `to_raster` uses on the whole: a crop to which
nothing is done is cut from that raster, to the bits of rounding.

Legend: C channels, H and W of the stored image, h and w of its raster, n classes that are in sight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.seeding import generator
from .findings import IGNORED, Findings, Mask
from .frames import AugmentSection, Draw, flipped, moved, toned
from .packed import Raster
from .resample import Array, Box, Size, resize
from .shards import Sample
from .tiles import scale_of
from .views import Normalisation, tissue_fraction
from .window import Pair, Point, Window

TRIES = 10  # places for a crop until one has the tissue, and lacks the findings, that are asked for
NEAR_MIDDLE = 0.25  # of a crop: how far from its middle the pixel lies that it was placed around
INSIDE = 1 / 16  # of a crop: no nearer to its edge than this does an augmentation bring that pixel
AIR = 4  # pixels of a crop around findings that are looked at with them, so that no kernel ends at their edge


@dataclass(frozen=True)
class Resolution:
    """How large a model sees an image: millimetres a pixel, or pixels along the longer side; neither: as stored.

    Raises:
        ValueError: both are given, or one is not positive.
    """

    mm_per_pixel: float | None = None
    long_side: int | None = None

    def __post_init__(self) -> None:
        if self.mm_per_pixel is not None and self.long_side is not None:
            raise ValueError("mm_per_pixel and long_side both say how large an image is seen; give one of them")
        if any(given is not None and given <= 0 for given in (self.mm_per_pixel, self.long_side)):
            raise ValueError(f"an image has a size above zero (got {self.mm_per_pixel or self.long_side})")

    def raster(self, shape: tuple[int, ...], spacing_mm: float | None) -> Size:
        """(h, w) of a stored image of this shape at the resolution. Nothing is enlarged.

        Raises:
            ValueError: millimetres are asked for, and the spacing is unknown, or coarser than that.
        """
        if self.mm_per_pixel is not None:
            if spacing_mm is None:
                raise ValueError("its spacing is unknown, so it has no mm_per_pixel; give long_side instead")
            factor = 1 / scale_of(self.mm_per_pixel, spacing_mm)
        else:
            factor = min(1.0, self.long_side / max(shape[:2])) if self.long_side else 1.0
        return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))

    def raster_of(self, sample: Sample) -> Size:
        """(h, w) of a sample, with the spacing that its JSON has.

        Raises:
            ValueError: as `raster`.
        """
        return self.raster(sample.pixels.shape, sample.meta.get("spacing_mm") or None)


def to_raster(sample: Sample, resolution: Resolution) -> Array:
    """(C, h, w) of 0 to 1: the whole image as it is seen.

    Raises:
        ValueError: as `Resolution.raster`.
    """
    height, width = sample.pixels.shape[:2]
    image = resize(sample.pixels, (0, 0, height, width), resolution.raster_of(sample))
    image /= np.float32(sample.max_value)
    return image


@dataclass(frozen=True)
class TrainCrops:
    """Calling it with a sample and an epoch gives a crop and its mask, a function of (seed, epoch, key).

    Each step draws from a generator of its own, so that switching one off leaves the others as they were. A sample
    without a mask is background. Of `augment`, `area` has no meaning here: the resolution says how large tissue is.

    Raises:
        ValueError: as `Resolution.raster`.
    """

    size: Size  # H, W of a crop
    resolution: Resolution
    augment: AugmentSection
    normalise: Normalisation
    lookup: Mask  # (256,) stored mask value -> class number, 0 background, IGNORED where it counts for nothing
    centred: float
    """Chance that the crop of an image with findings is placed around one: near a random pixel of a random piece, or,
    with several classes, of a random class."""
    avoid: bool
    """The other crops hold no finding, where that can be had."""
    seed: int

    def __call__(self, sample: Sample, epoch: int) -> dict[str, Tensor | str]:
        """`key`; `image` (C, *size) float32, normalised; `mask` (*size) int64 class numbers, IGNORED kept."""

        def draw(step: str) -> np.random.Generator:
            return generator(self.seed, epoch, f"crop/{step}", sample.key)

        angle = math.radians(draw("rotation").uniform(-1, 1) * self.augment.rotation)
        place = _Place(self.size, (sample.pixels.shape[0], sample.pixels.shape[1]), self.resolution.raster_of(sample))
        found = Findings.of(sample.mask, self.lookup, math.ceil(AIR * place.step.max() / min(self.augment.zoom)))
        window = self._window(sample.pixels, place, found, angle, draw)
        image = window.show(sample.pixels) / np.float32(sample.max_value)
        image = self.normalise(toned(self.augment, flipped(self.augment, image, draw), draw))
        mask = flipped(self.augment, found.shown(window)[None], draw)[0]
        return {"key": sample.key, "image": torch.from_numpy(image), "mask": torch.from_numpy(mask.copy())}

    def _window(self, pixels: Raster, place: _Place, found: Findings, angle: float, draw: Draw) -> Window:
        """What the crop shows."""
        if draw("centred").random() >= self.centred or not found.present:
            return self._elsewhere(pixels, place, found, angle, draw)
        point = found.pixel(draw("finding"), pieces=np.setdiff1d(self.lookup, (0, IGNORED)).size == 1)
        base = place.around(draw("place"), point)
        window = Window(moved(self.augment, base, place.shape, angle, draw), self.size, angle)
        before, after, margin = Window(base, self.size, 0).seen(point), window.seen(point), INSIDE * np.array(self.size)
        # Moves are about the middle: a point at the edge, where the base has no room to go on, would leave.
        kept = np.clip(after, np.minimum(before, margin), np.maximum(before, self.size - margin))
        return window.shifted(after - kept)

    def _elsewhere(self, pixels: Raster, place: _Place, found: Findings, angle: float, draw: Draw) -> Window:
        """A place with tissue and, if so wished, without findings: the first that has both, or the best of some.

        Air teaches nothing, so a place with tissue and a finding is better than one with neither.
        """
        rng, best = draw("place"), (False, False, -1.0)
        for _ in range(TRIES):
            base = place.anywhere(rng)
            window = Window(moved(self.augment, base, place.shape, angle, draw), self.size, angle)
            tissue, clear = tissue_fraction(pixels, place.inside(base)), not found.within(*window.reach())
            rank = tissue >= self.augment.tissue, clear or not self.avoid, tissue
            if rank > best:
                best, chosen = rank, window
            if best >= (True, True):
                break
        return chosen


@dataclass(frozen=True)
class _Place:
    """Where on an image's raster a crop may lie: at whole pixels, and where there is room within the image."""

    size: Size
    shape: Size  # of the stored image
    raster: Size

    def anywhere(self, rng: np.random.Generator) -> Box:
        return self._at(rng.integers(0, self._room + 1))

    def around(self, rng: np.random.Generator, point: Point) -> Box:
        """A crop about whose middle, nearly, a point lies, as far as the image has room."""
        middle = point * self.raster / self.shape
        off = rng.uniform(-NEAR_MIDDLE, NEAR_MIDDLE, 2) - 0.5
        return self._at(np.clip(np.round(middle + off * self.size), 0, self._room))

    @property
    def step(self) -> Point:
        """(2,) stored pixels a pixel of the raster, down and across."""
        return np.divide(self.shape, self.raster)

    @property
    def _room(self) -> Pair:
        return np.maximum(np.subtract(self.raster, self.size), 0)

    def _at(self, start: NDArray[Any]) -> Box:
        return (*(start * self.step).tolist(), *(self.step * self.size).tolist())

    def inside(self, box: Box) -> Box:
        """The part of a box that lies in the image."""
        low, high = np.maximum(box[:2], 0), np.minimum(np.add(box[:2], box[2:]), self.shape)
        return (*low.tolist(), *(high - low).tolist())
