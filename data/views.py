"""From a stored image to what a model sees: training crops at several resolutions, and windows that cover an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..engine.seeding import generator
from .config import CropSection
from .record import Pixels
from .shards import Sample

Size = tuple[int, int]  # height, width
Box = tuple[float, float, float, float]  # top, left, height, width in pixels of the stored image
TRIES = 10  # draws of a crop until one holds enough tissue


@dataclass(frozen=True)
class Normalisation:
    """Pixels as fractions of their largest value, then shifted and scaled by the data set's own statistics."""

    mean: float
    std: float

    def __call__(self, fraction: NDArray[np.float32]) -> Tensor:
        """(H, W) fractions -> (1, H, W) normalised."""
        return torch.from_numpy((fraction - self.mean) / self.std)[None]


@dataclass(frozen=True)
class MultiScaleViews:
    """Training views: one crop at the highest resolution, area-averaged down, so that the fine target is real detail.

    Calling it with a sample and an epoch gives `view/<s>`: (1, s*H, s*W) for every scale s, and `noise`: (N,) uniform
    numbers that rank the N patches for masking. All of it is a function of (seed, epoch, key).
    """

    size: Size  # H, W at scale 1
    scales: Sequence[int]
    patches: int  # N
    crop: CropSection
    normalise: Normalisation
    seed: int

    def __call__(self, sample: Sample, epoch: int) -> dict[str, Tensor | str]:
        """The views of a sample in an epoch."""
        rng = generator(self.seed, epoch, "crop", sample.key)
        finest = max(self.scales)
        box = draw_box(rng, sample.pixels, self.size, self.crop)
        fine = resize(sample.pixels, box, (finest * self.size[0], finest * self.size[1])) / np.float32(sample.max_value)
        if self.crop.flip and rng.random() < 0.5:
            fine = fine[:, ::-1]
        views = {s: area_down(fine, (s * self.size[0], s * self.size[1])) for s in self.scales}
        noise = generator(self.seed, epoch, "mask", sample.key).random(self.patches, dtype=np.float32)
        return {
            "key": sample.key,
            "noise": torch.from_numpy(noise),
            **{f"view/{s}": self.normalise(view) for s, view in views.items()},
        }

    def enlarges(self, image: Size, draw: int) -> bool:
        """Whether a random crop of an image of this size holds fewer rows or columns than the finest view."""
        _, _, height, width = _random_box(generator(self.seed, "enlarges", draw), image, self.size, self.crop)
        finest = max(self.scales)
        return height < 0.99 * finest * self.size[0] or width < 0.99 * finest * self.size[1]


def draw_box(rng: np.random.Generator, pixels: Pixels, size: Size, crop: CropSection) -> Box:
    """A random crop, redrawn while it holds too little tissue; if all do, the one with most."""
    drawn = []
    for _ in range(TRIES):
        box = _random_box(rng, (pixels.shape[0], pixels.shape[1]), size, crop)
        drawn.append((tissue_fraction(pixels, box), box))
        if drawn[-1][0] >= crop.tissue:
            break
    return max(drawn)[1]


def _random_box(rng: np.random.Generator, image: Size, size: Size, crop: CropSection) -> Box:
    """A crop of the view's shape, give or take `aspect`; `area` is measured against the largest that fits."""
    largest = min(image[0] / size[0], image[1] / size[1])
    side = largest * math.sqrt(rng.uniform(*crop.area))
    stretch = math.exp(0.5 * rng.uniform(*np.log(crop.aspect)))
    height, width = min(side * size[0] / stretch, image[0]), min(side * size[1] * stretch, image[1])
    return rng.uniform(0, image[0] - height), rng.uniform(0, image[1] - width), height, width


def tissue_fraction(pixels: Pixels, box: Box) -> float:
    """Part of the crop that is not zero (ingest zeroes what is no breast), on a coarse raster."""
    top, left, height, width = box
    rows = np.linspace(top, top + height - 1, 16).astype(int).clip(0)
    columns = np.linspace(left, left + width - 1, 16).astype(int).clip(0)
    return float(np.count_nonzero(pixels[np.ix_(rows, columns)])) / (16 * 16)


def resize(pixels: Pixels, box: Box, size: Size) -> NDArray[np.float32]:
    """The crop at another size, antialiased, in the pixels' own units as float32."""
    top, left, height, width = box
    y0, x0 = int(top), int(left)
    y1, x1 = min(math.ceil(top + height), pixels.shape[0]), min(math.ceil(left + width), pixels.shape[1])
    part = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1], dtype=np.float32))
    inner = (left - x0, top - y0, min(left - x0 + width, x1 - x0), min(top - y0 + height, y1 - y0))
    return np.asarray(part.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=inner))


def area_down(image: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
    """(H, W) image averaged over areas down to `size`; the image itself where that is its size."""
    if image.shape == size:
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size[1], size[0]), Image.Resampling.BOX))


def windows(sample: Sample, size: Size, normalise: Normalisation) -> Tensor:
    """(K, 1, H, W): the whole image at the scale where its shorter fit equals the view, cut into K even windows."""
    height, width = sample.pixels.shape
    scale = max(size[0] / height, size[1] / width)
    full = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    image = resize(sample.pixels, (0, 0, height, width), full) / np.float32(sample.max_value)
    tops, lefts = _starts(full[0], size[0]), _starts(full[1], size[1])
    return torch.stack([normalise(image[y : y + size[0], x : x + size[1]]) for y in tops for x in lefts])


def _starts(length: int, window: int) -> list[int]:
    count = math.ceil(length / window)
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]
