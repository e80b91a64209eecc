"""Two views of one image for contrastive pretraining (MoCo v3, Chen 2021, section 4), with what mammograms allow.

Kept from its recipe: independent random crops, mirroring, tone jitter, blur that is heavy in one view and rare in the
other. Added: crops with tissue, small turns, noise. Left out: colour, of which there is none, and solarising, which
turns the brightest pixels dark: calcifications and masses are the brightest pixels, and no detector does that.
What is zero is no breast, and stays zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat
from scipy import ndimage
from torch import Tensor

from ..engine.config import Section
from ..engine.seeding import generator
from .config import CropSection
from .packed import Raster
from .resample import Array, Box, Size, resize
from .shards import Sample
from .views import Normalisation, draw_box

Chance = Annotated[float, Field(ge=0, le=1)]


class PairSection(Section):
    """How the two views of an image are made to differ, beside their crops."""

    upside_down: bool = True
    """turn half of the views upside down"""
    rotation: float = Field(default=15, ge=0, le=45)
    """largest turn either way, in degrees"""
    gamma: NonNegativeFloat = 0.3
    """grey levels are raised to a power between 1 / (1 + gamma) and 1 + gamma"""
    contrast: NonNegativeFloat = 0.3
    """distance to the tissue's mean, likewise multiplied"""
    brightness: NonNegativeFloat = 0.2
    """tissue, likewise multiplied"""
    blur: tuple[Chance, Chance] = (1.0, 0.1)
    """part of the first and of the second views that are blurred"""
    blur_sigma: tuple[NonNegativeFloat, NonNegativeFloat] = (0.1, 2.0)
    """least and most, in pixels of the view"""
    noise: NonNegativeFloat = 0.01
    """largest standard deviation, as a fraction of the largest grey level"""


@dataclass(frozen=True)
class TwoViews:
    """Calling it with a sample and an epoch gives `view/a` and `view/b`: (C, H, W), a function of (seed, epoch, key).

    Each step draws from a generator of its own, so that switching one off leaves the others as they were.
    """

    size: Size  # H, W
    crop: CropSection
    pair: PairSection
    normalise: Normalisation
    seed: int

    def __call__(self, sample: Sample, epoch: int) -> dict[str, Tensor | str]:
        """The two views of a sample in an epoch."""
        shares = dict(zip("ab", self.pair.blur, strict=True))
        return {"key": sample.key, **{f"view/{name}": self._view(sample, epoch, name, shares[name]) for name in "ab"}}

    def _view(self, sample: Sample, epoch: int, name: str, blurred: float) -> Tensor:
        def draw(step: str) -> np.random.Generator:
            return generator(self.seed, epoch, f"pair/{name}/{step}", sample.key)

        box = draw_box(draw("crop"), sample.pixels, self.size, self.crop)
        angle = draw("rotation").uniform(-1, 1) * self.pair.rotation
        image = turned(sample.pixels, box, self.size, math.radians(angle)) / np.float32(sample.max_value)
        across, down = draw("flip").random(2) < 0.5
        image = image[:, :: -1 if down and self.pair.upside_down else 1, :: -1 if across and self.crop.flip else 1]
        tissue: NDArray[np.bool_] = np.asarray(image.any(axis=0))
        image = jitter(draw("tone"), image, tissue, self.pair)
        image = blur(draw("blur"), image, blurred, self.pair.blur_sigma)
        image = image + noise(draw("noise"), image.shape, self.pair.noise)
        return torch.from_numpy(self.normalise(np.where(tissue, image.clip(0, 1), np.float32(0))))


def turned(pixels: Raster, box: Box, size: Size, angle: float) -> Array:
    """(C, *size): a crop turned by `angle` radians about its centre, antialiased; zero beyond the image's edge."""
    top, left, height, width = box
    if not angle:
        return resize(pixels, box, size)
    steps = np.array([height / size[0], width / size[1]])  # stored pixels a view pixel
    centre = np.array([top + height / 2, left + width / 2])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    half = (np.abs(turn) @ size / 2 + 1) * steps  # of an upright box around the turned one, and a pixel more
    start, end = np.maximum(centre - half, 0), np.minimum(centre + half, pixels.shape[:2])
    if (end <= start).any():  # beside the image
        return np.zeros((*pixels.shape[2:], 1)[:1] + size, np.float32)
    around = np.maximum(np.round((end - start) / steps), 1).astype(int)
    upright = resize(pixels, (*start, *(end - start)), (int(around[0]), int(around[1])))
    scale = around / (end - start)
    matrix = (scale * steps)[:, None] * turn
    offset = (centre - start) * scale - 0.5 - matrix @ ((np.array(size) - 1) / 2)
    place = partial(ndimage.affine_transform, matrix=matrix, offset=offset, output_shape=size, order=1)
    return np.stack([place(plane, mode="grid-constant") for plane in upright])


def jitter(rng: np.random.Generator, image: Array, tissue: NDArray[np.bool_], pair: PairSection) -> Array:
    """Gamma, contrast about the tissue's mean, brightness: one draw for all channels."""
    largest = np.log1p([pair.gamma, pair.contrast, pair.brightness])
    gamma, contrast, brightness = np.exp(rng.uniform(-1, 1, 3) * largest).astype(np.float32)
    image = image**gamma
    mean = image[:, tissue].mean() if tissue.any() else np.float32(0)
    return ((image - mean) * contrast + mean) * brightness


def blur(rng: np.random.Generator, image: Array, share: float, sigma: tuple[float, float]) -> Array:
    """A share of the images, blurred by a Gaussian; air outside the frame is taken to go on."""
    drawn, width = rng.random(), rng.uniform(*sigma)
    return ndimage.gaussian_filter(image, (0, width, width), truncate=3) if drawn < share else image


def noise(rng: np.random.Generator, shape: tuple[int, ...], largest: float) -> Array:
    """White noise of a standard deviation up to `largest`: drawn in float32, it is finer than a 16-bit code."""
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(0, largest))
