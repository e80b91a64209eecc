"""From a stored image to what a model sees: training crops at several resolutions, and windows that cover an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..engine.seeding import generator
from .config import CropSection
from .packed import Raster
from .resample import Array, Box, Size, area_down, resize
from .shards import Sample

TRIES = 10  # draws of a crop until one holds enough tissue


@dataclass(frozen=True)
class Normalisation:
    """Pixels as fractions of their largest value, then shifted and scaled by the data set's own statistics."""

    mean: float | tuple[float, ...]  # of all channels, or of each
    std: float | tuple[float, ...]

    def __call__(self, values: Array, max_value: float = 1) -> Array:
        """(C, H, W) values up to `max_value`, normalised in place: memory just filled is fast, new memory is not."""
        mean, std = (np.reshape(max_value * np.asarray(x, np.float32), (-1, 1, 1)) for x in (self.mean, self.std))
        values -= mean
        values /= std
        return values


@dataclass(frozen=True)
class MultiScaleViews:
    """Training views: one crop at the highest resolution, area-averaged down, so that the fine target is real detail.

    Calling it with a sample and an epoch gives `view/<s>`: (C, s*H, s*W) for every scale s; `noise`: (N,) uniform
    numbers that rank the N units of masking; where asked for `tiles/<s>`: (T,) numbers that rank tiles, and
    `tissue/<s>`: (cells,) the part of each cell of a grid that is breast. All is a function of (seed, epoch, key).
    """

    size: Size  # H, W at scale 1
    scales: Sequence[int]
    units: int  # N
    crop: CropSection
    normalise: Normalisation
    seed: int
    tiles: Mapping[int, int] = field(default_factory=dict)  # scale: T
    tissue: Mapping[int, Size] = field(default_factory=dict)  # scale: grid

    def __call__(self, sample: Sample, epoch: int) -> dict[str, Tensor | str]:
        """The views of a sample in an epoch."""
        rng = generator(self.seed, epoch, "crop", sample.key)
        box = draw_box(rng, sample.pixels, self.size, self.crop)
        mirrored = self.crop.flip and rng.random() < 0.5
        sizes = {s: (s * self.size[0], s * self.size[1]) for s in self.scales}
        finest = resize(sample.pixels, box, sizes[max(self.scales)], mirrored)
        breast: Array = (finest != 0).any(0)[None].astype(np.float32) if self.tissue else finest
        tissue = {f"tissue/{s}": area_down(breast, grid).ravel() for s, grid in self.tissue.items()}
        finest = self.normalise(finest, sample.max_value)
        views = {f"view/{s}": area_down(finest, size) for s, size in sizes.items()}
        draws = {"noise": self._draw("mask", self.units, sample, epoch)}
        draws |= {f"tiles/{s}": self._draw(f"tiles/{s}", count, sample, epoch) for s, count in self.tiles.items()}
        return {"key": sample.key, **{k: torch.from_numpy(x) for k, x in (draws | views | tissue).items()}}

    def _draw(self, purpose: str, count: int, sample: Sample, epoch: int) -> Array:
        """(count,) uniform numbers for a purpose."""
        return generator(self.seed, epoch, purpose, sample.key).random(count, dtype=np.float32)

    def enlarges(self, image: Size, draw: int) -> bool:
        """Whether a random crop of an image of this size holds fewer rows or columns than the finest view."""
        _, _, height, width = _random_box(generator(self.seed, "enlarges", draw), image, self.size, self.crop)
        finest = max(self.scales)
        return height < 0.99 * finest * self.size[0] or width < 0.99 * finest * self.size[1]


def draw_box(rng: np.random.Generator, pixels: Raster, size: Size, crop: CropSection) -> Box:
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


def tissue_fraction(pixels: Raster, box: Box) -> float:
    """Part of the crop that is not zero (ingest zeroes what is no breast), on a coarse raster."""
    top, left, height, width = box
    rows = np.linspace(top, top + height - 1, 16).astype(int).clip(0)
    columns = np.linspace(left, left + width - 1, 16).astype(int).clip(0)
    found = pixels[rows][:, columns].reshape(16 * 16, -1).any(axis=1)
    return float(np.count_nonzero(found)) / (16 * 16)


def windows(sample: Sample, size: Size, normalise: Normalisation) -> Tensor:
    """(K, C, H, W): the whole image at the scale where its shorter fit equals the view, cut into K even windows."""
    height, width = sample.pixels.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    full = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    image = normalise(resize(sample.pixels, (0, 0, height, width), full), sample.max_value)
    tops, lefts = _starts(full[0], size[0]), _starts(full[1], size[1])
    cut = [image[:, y : y + size[0], x : x + size[1]] for y in tops for x in lefts]
    return torch.from_numpy(np.stack(cut))


def _starts(length: int, window: int) -> list[int]:
    count = math.ceil(length / window)
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]
