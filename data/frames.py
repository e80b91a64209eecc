"""An image as a classifier sees it: whole, fitted into one frame, or as windows; and the views it is trained on.

stored image, chest wall left      frame of another shape: the same scale down and across, the rest air
+------+                           +----------+   +------+
|##    |                           |##    ....|   |......|
|####  |                           |####  ....|   |##    |
|####  |                           |####  ....|   |####  |
|##    |                           |##    ....|   |......|
+------+                           +----------+   +------+
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator
from torch import Tensor

from ..engine.config import Section
from ..engine.seeding import generator
from .augment import Chance, PairSection, blur, jitter, noise, turned
from .config import CropSection, Share
from .packed import Raster
from .record import Pixels
from .resample import Array, Box, Size, resize
from .shards import Sample
from .views import Normalisation, draw_box, windows

Input = Literal["whole", "windows"]
Draw = Callable[[str], np.random.Generator]  # a step's own random numbers
NEAR = 1e-6  # of a pixel: rounding, not a part of the image


class AugmentSection(Section):
    """How a training view differs from the image as it is judged. Mild: what makes an image positive stays in it."""

    flip: bool = True
    """mirror half of the views"""
    upside_down: bool = True
    """turn half of the views upside down"""
    rotation: float = Field(default=8, ge=0, le=45)
    """largest turn either way about the image's middle, in degrees"""
    zoom: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.1)
    """smallest and largest enlargement about the image's middle"""
    shift: float = Field(default=0.03, ge=0, le=0.4)
    """largest move either way, down and across, as a share of the image"""
    gamma: NonNegativeFloat = 0.2
    """grey levels are raised to a power between 1 / (1 + gamma) and 1 + gamma"""
    contrast: NonNegativeFloat = 0.2
    """distance to the tissue's mean, likewise multiplied"""
    brightness: NonNegativeFloat = 0.1
    """tissue, likewise multiplied"""
    offset: NonNegativeFloat = 0.0
    """largest move of the tissue's grey levels up or down, as a fraction of the largest grey level"""
    blur: Chance = 0.1
    """part of the views that are blurred"""
    blur_sigma: tuple[NonNegativeFloat, NonNegativeFloat] = (0.1, 0.8)
    """least and most, in pixels of the view"""
    noise: NonNegativeFloat = 0.01
    """largest standard deviation, as a fraction of the largest grey level"""
    area: tuple[Share, Share] = (1.0, 1.0)
    """of windows: smallest and largest part of a window that a view covers"""
    tissue: Annotated[float, Field(ge=0, le=1)] = 0.25
    """of windows: part of a view that must be breast, where that can be had"""

    @field_validator("zoom", "blur_sigma", "area")
    @classmethod
    def _smallest_first(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"the smaller bound comes first (got {list(bounds)})")
        return bounds


def frames(sample: Sample, size: Size, normalise: Normalisation, input: Input) -> Tensor:
    """(K, C, *size) of an image as it is judged: the whole in one frame (K = 1), or K windows that cover it.

    The whole keeps its aspect. What it leaves of the frame is zero before normalisation, as air is: above and below it
    alike, and beside it on the right, away from the chest wall.
    """
    if input == "windows":
        return windows(sample, size, normalise)
    image = framed(sample.pixels, whole_box(sample.pixels.shape[:2], size), size)
    return torch.from_numpy(normalise(image / np.float32(sample.max_value))[None])


@dataclass(frozen=True)
class TrainFrames:
    """Calling it with a sample and an epoch gives `image`: (C, *size), a function of (seed, epoch, key).

    Each step draws from a generator of its own, so that switching one off leaves the others as they were. With all of
    them off a whole image is what `frames` gives.
    """

    size: Size  # H, W
    input: Input
    augment: AugmentSection
    normalise: Normalisation
    seed: int

    def __call__(self, sample: Sample, epoch: int) -> dict[str, Tensor | str]:
        """The view of a sample in an epoch."""

        def draw(step: str) -> np.random.Generator:
            return generator(self.seed, epoch, f"augment/{step}", sample.key)

        shape = (sample.pixels.shape[0], sample.pixels.shape[1])
        base = whole_box(shape, self.size) if self.input == "whole" else self._window(draw("crop"), sample.pixels)
        angle = math.radians(draw("rotation").uniform(-1, 1) * self.augment.rotation)
        box = moved(self.augment, base, shape, angle, draw)
        image = turned(sample.pixels, box, self.size, angle) if angle else framed(sample.pixels, box, self.size)
        image = toned(self.augment, flipped(self.augment, image / np.float32(sample.max_value), draw), draw)
        return {"key": sample.key, "image": torch.from_numpy(self.normalise(image))}

    def _window(self, rng: np.random.Generator, pixels: Raster) -> Box:
        """A place for a window, of the scale that `windows` has, or a part of it."""
        crop = CropSection(area=self.augment.area, aspect=(1.0, 1.0), tissue=self.augment.tissue)
        return draw_box(rng, pixels, self.size, crop)


def moved(mild: AugmentSection, base: Box, shape: Size, angle: float, draw: Draw) -> Box:
    """A box zoomed, turned and shifted about the middle of what it shows; that turns about the box's own centre."""
    start, extent = np.array(base[:2]), np.array(base[2:])
    low, high = np.maximum(start, 0), np.minimum(start + extent, shape)  # what the box shows
    zoom = math.exp(draw("zoom").uniform(*np.log(mild.zoom)))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    arm = (low + high) / 2 - (start + extent / 2)
    shift = draw("shift").uniform(-1, 1, 2) * mild.shift * (high - low)
    # Written as differences, each of them zero where nothing is to be done: the box is then the same to the bit.
    start = start + (extent - extent / zoom) / 2 + (np.eye(2) - turn / zoom) @ arm - shift
    return (*start.tolist(), *(extent / zoom).tolist())


def flipped(mild: AugmentSection, image: NDArray[Any], draw: Draw) -> NDArray[Any]:
    """(C, H, W) mirrored and turned upside down, or not: whatever is given is flipped alike."""
    across, down = draw("flip").random(2) < 0.5
    steps = (-1 if down and mild.upside_down else 1, -1 if across and mild.flip else 1)
    return image[:, :: steps[0], :: steps[1]]


def toned(mild: AugmentSection, image: Array, draw: Draw) -> Array:
    """(C, H, W) grey levels from 0 to 1, changed where there is tissue."""
    tissue = np.asarray(image.any(axis=0), np.bool_)
    if mild.gamma or mild.contrast or mild.brightness:
        tone = PairSection(gamma=mild.gamma, contrast=mild.contrast, brightness=mild.brightness)
        image = jitter(draw("tone"), image, tissue, tone)
    image = image + np.float32(draw("offset").uniform(-1, 1) * mild.offset)
    image = blur(draw("blur"), image, mild.blur, mild.blur_sigma)
    image = image + noise(draw("noise"), image.shape, mild.noise)
    return np.where(tissue, image.clip(0, 1), np.float32(0))


def whole_box(shape: tuple[int, ...], size: Size) -> Box:
    """The box of a frame's shape that holds the whole image: at its left, and half-way up."""
    step = max(shape[0] / size[0], shape[1] / size[1])  # stored pixels a pixel of the frame
    return (shape[0] - size[0] * step) / 2, 0.0, size[0] * step, size[1] * step


def framed(pixels: Raster, box: Box, size: Size) -> Array:
    """(C, *size): `resize` of a box that may reach beyond the image, where it is zero."""
    made: Array = np.zeros((*pixels.shape[2:], 1)[:1] + size, np.float32)
    down, top, height = _shown(box[0], box[2], pixels.shape[0], size[0])
    across, left, width = _shown(box[1], box[3], pixels.shape[1], size[1])
    shown = made[:, down, across]
    if shown.size:
        part, y, x = _padded(pixels, (top, left, height, width))
        shown[:] = resize(part, (top - y, left - x, height, width), (shown.shape[1], shown.shape[2]))
    return made


def _shown(start: float, extent: float, length: int, count: int) -> tuple[slice, float, float]:
    """Of `count` pixels that divide an extent: those that hold some of the image, where they start, their extent."""
    step = extent / count
    first = max(math.floor(-start / step + NEAR), 0)
    end = max(min(math.ceil((length - start) / step - NEAR), count), first)
    return slice(first, end), start + first * step, (end - first) * step


def _padded(pixels: Raster, box: Box) -> tuple[Pixels, int, int]:
    """The stored pixels of a box, zero beyond the image, and the number of the first row and column."""
    (top, left), (bottom, right) = np.floor(np.add(box[:2], NEAR)), np.ceil(np.add(box[:2], box[2:]) - NEAR)
    y, x, (height, width) = int(top), int(left), pixels.shape[:2]
    part = pixels[max(y, 0) : int(bottom), max(x, 0) : int(right)]
    beyond = [(max(-y, 0), max(int(bottom) - height, 0)), (max(-x, 0), max(int(right) - width, 0))]
    return np.pad(part, beyond + [(0, 0)] * (part.ndim - 2)), y, x
