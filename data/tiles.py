"""Tiles of an image at a stated resolution: what one shows in millimetres does not depend on how it is stored.

The image is thought of as resampled by area to `mm_per_pixel`, from its top left corner on (there the chest wall is),
and cut into tiles that lie on that raster, evenly from edge to edge. Each is made from the stored pixels under it when
it is asked for. Where the image is smaller than a tile, what is left of it is air.

    top, left, height, width    the box of a tile in stored pixels; it may reach beyond the image

Legend: T tiles, C channels, H and W of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packed import Raster
from .resample import COLUMNS, Array, Size, _resample, area, bands
from .shards import Sample
from .views import Normalisation

Boxes = NDArray[np.float64]  # (T, 4): top, left, height, width in stored pixels

SAME = 0.01  # resolutions that differ by less are one: a film is not measured better, and its pixels stay as they are
ROOM = 1e-6  # of a pixel, for the rounding of a ratio


def scale_of(mm_per_pixel: float, spacing_mm: float) -> float:
    """Stored pixels along a tile's pixel.

    Raises:
        ValueError: it would be less than one: there is no detail finer than what is stored.
    """
    scale = mm_per_pixel / spacing_mm
    if scale < 1 - SAME:
        raise ValueError(f"{mm_per_pixel:g} mm is finer than the stored {spacing_mm:g} mm")
    return 1.0 if scale < 1 + SAME else scale


def tiles(
    sample: Sample,
    size: Size,
    mm_per_pixel: float,
    spacing_mm: float,
    overlap: float,
    tissue: float,
    normalise: Normalisation,
) -> tuple[Boxes, Iterator[Tensor]]:
    """Boxes (T, 4) of an image's tiles, row by row, and the tiles, (C, H, W) each, made as they are drawn.

    Args:
        sample: the image.
        size: height and width of a tile in pixels.
        mm_per_pixel: of the tiles.
        spacing_mm: of the stored image.
        overlap: least share of a tile that its neighbour repeats.
        tissue: tiles with a smaller part of breast are left out; the one with most stays in any case.
        normalise: of the encoder.

    Raises:
        ValueError: the tiles would be finer than the stored image.
    """
    scale = scale_of(mm_per_pixel, spacing_mm)
    boxes = grid(sample.pixels.shape[:2], size, scale, overlap)
    found = np.array([tissue_share(sample.pixels, box) for box in boxes])
    kept = boxes[(found >= tissue) | (np.arange(len(boxes)) == found.argmax())]
    return kept, (torch.from_numpy(normalise(cut(sample.pixels, box, size), sample.max_value)) for box in kept)


def grid(image: tuple[int, ...], size: Size, scale: float, overlap: float) -> Boxes:
    """(T, 4) boxes that cover an image of this height and width, row by row."""
    tops, lefts = (starts(math.ceil(n / scale - ROOM), side, overlap) for n, side in zip(image, size, strict=True))
    return np.array([(scale * y, scale * x, scale * size[0], scale * size[1]) for y in tops for x in lefts])


def starts(length: int, window: int, overlap: float) -> list[int]:
    """The fewest starts of windows that cover `length` and overlap by at least that share, evenly from end to end."""
    if length <= window:
        return [0]
    step = max(1, math.floor(window * (1 - overlap) + ROOM))
    count = 1 + math.ceil((length - window) / step)
    return [i * (length - window) // (count - 1) for i in range(count)]


def tissue_share(pixels: Raster, box: Boxes) -> float:
    """Part of a box that is not zero (ingest zeroes what is no breast); pixels that it halves count half."""
    part = under(pixels, box)
    inside = part.reshape(*part.shape[:2], -1).any(2)
    rows, columns = (covered(box[i], box[i + 2], inside.shape[i]) for i in (0, 1))
    return float(rows @ inside @ columns / (box[2] * box[3]))


def covered(start: float, extent: float, count: int) -> NDArray[np.float64]:
    """(count,) what the stretch covers of each pixel that it touches."""
    pixels = math.floor(start + ROOM) + np.arange(count)
    return np.clip(np.minimum(pixels + 1, start + extent) - np.maximum(pixels, start), 0, 1)


def cut(pixels: Raster, box: Boxes, size: Size) -> Array:
    """(C, *size): the mean of the stored pixels under each pixel of a tile; zero beyond the image."""
    part = np.moveaxis(np.atleast_3d(under(pixels, box)), -1, 0)
    scale, (top, left) = box[2] / size[0], box[:2] - np.floor(box[:2] + ROOM)
    height, width = (min(size[i], math.ceil((pixels.shape[i] - box[i]) / scale - ROOM)) for i in (0, 1))
    rows = bands(area, part.shape[1], top, height * scale, height, 1)
    columns = bands(area, part.shape[2], left, width * scale, width, COLUMNS)
    made = np.zeros((len(part), *size), np.float32)
    made[:, :height, :width] = _resample(part, rows, columns, (height, width))
    return made


def under(pixels: Raster, box: Boxes) -> NDArray[np.generic]:
    """The stored pixels that a box touches."""
    top, left = np.floor(box[:2] + ROOM).astype(int)
    bottom, right = np.ceil(box[:2] + box[2:] - ROOM).astype(int)
    part: NDArray[np.generic] = pixels[top:bottom, left:right]
    return part
