"""Crops of an image at another size, antialiased, in float32: two products with banded matrices, rows then columns.

Output pixel i looks at the input around its centre c_i with a kernel as wide as an output pixel, so nothing of the
input is skipped. Each row of a band's weights sums to 1.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .packed import Raster

Array = NDArray[np.float32]
Size = tuple[int, int]  # height, width
Box = tuple[float, float, float, float]  # top, left, height, width in pixels of the stored image
Kernel = Callable[[NDArray[np.float64], float], NDArray[np.float64]]  # distance in pixels, input pixels an output pixel

ROWS, COLUMNS = 256, 16  # made at a time, so that scratch stays in cache
ONE_THREAD = 2**18  # multiplications that OpenBLAS does in one thread, whatever the number of cores
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB that were freed for what comes next; elsewhere, nothing.

    By default every large array is new memory, and a view then spends more time in page faults than in sums (measured:
    8 ms with 1,500 faults, 4 ms without).
    """
    with suppress(AttributeError, OSError, TypeError):
        allocator = ctypes.CDLL(None).mallopt
        allocator(M_MMAP_THRESHOLD, 2**25)
        allocator(M_TRIM_THRESHOLD, 2**28)


def triangle(distance: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Linear interpolation, widened by `scale` where that makes the image smaller."""
    return np.maximum(1 - np.abs(distance) / max(scale, 1), 0)


def area(distance: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """What an output pixel and an input pixel have in common."""
    return np.clip((scale + 1) / 2 - np.abs(distance), 0, min(scale, 1))


@dataclass(frozen=True)
class Bands:
    """A banded matrix by groups of its rows: what each group's outputs take of the inputs from its first one on."""

    first: NDArray[np.intp]  # (G,)
    weights: Array  # (G, K, group), each column sums to 1


def bands(
    kernel: Kernel, length: int, start: float, extent: float, count: int, group: int, mirrored: bool = False
) -> Bands:
    """Weights that make `count` pixels of the `extent` input pixels from `start` on, of `length` there are."""
    scale = extent / count
    numbers = np.minimum(np.arange(math.ceil(count / group) * group), count - 1)
    centres = start + ((count - 1 - numbers if mirrored else numbers) + 0.5) * scale - 0.5
    centres, radius = centres.reshape(-1, group), max(scale, 1)
    taps = min(math.ceil((group - 1) * scale + 2 * radius), length)
    first = np.clip(np.floor(centres.min(1) - radius).astype(int) + 1, 0, length - taps)
    weights = kernel((first[:, None] + np.arange(taps))[..., None] - centres[:, None], scale)
    return Bands(first, (weights / weights.sum(1, keepdims=True)).astype(np.float32))


def resize(pixels: Raster, box: Box, size: Size, mirrored: bool = False) -> Array:
    """(C, *size): the crop at another size, in the pixels' own units. Pixels outside the box do not bleed in."""
    top, left, height, width = box
    y, x = int(top), int(left)
    part = np.atleast_3d(pixels[y : math.ceil(top + height), x : math.ceil(left + width)])
    rows = bands(triangle, part.shape[0], top - y, height, size[0], 1)
    columns = bands(triangle, part.shape[1], left - x, width, size[1], COLUMNS, mirrored)
    return _resample(np.moveaxis(part, -1, 0), rows, columns, size)


def area_down(image: Array, size: Size) -> Array:
    """(C, H, W) image averaged over areas down to `size`; the image itself where that is its size."""
    (_, height, width), (y, x) = image.shape, (image.shape[1] // size[0], image.shape[2] // size[1])
    if (y * size[0], x * size[1]) != (height, width):
        rows = bands(area, height, 0, height, size[0], 1)
        return _resample(image, rows, bands(area, width, 0, width, size[1], COLUMNS), size)
    if y * x == 1:
        return image
    low = reduce(np.add, (image[:, i::y] for i in range(y)))  # whole numbers need no weights
    made: Array = reduce(np.add, (low[..., i::x] for i in range(x)))
    made *= np.float32(1 / (y * x))
    return made


def _resample(planes: NDArray[Any], rows: Bands, columns: Bands, size: Size) -> Array:
    made = np.empty((len(planes), *size), np.float32)
    step = min(ROWS, max(1, ONE_THREAD // columns.weights[0].size))
    for plane, out in zip(planes, made, strict=True):
        for top in range(0, size[0], step):
            strip = slice(top, top + step)
            _columns(_rows(plane, rows.first[strip], rows.weights[strip]), columns, out[strip])
    return made


def _rows(image: NDArray[Any], first: NDArray[np.intp], weights: Array) -> Array:
    """A strip of rows, by a sparse product: it adds whole rows."""
    top, taps = first.min(), weights.shape[1]
    part = image[top : first.max() + taps].astype(np.float32, order="C")
    places = (first - top)[:, None] + np.arange(taps)
    band = csr_array((weights.ravel(), places.ravel(), np.arange(len(first) + 1) * taps), (len(first), len(part)))
    made: Array = band @ part
    return made


def _columns(image: Array, columns: Bands, out: Array) -> None:
    """All columns of a strip, by dense products: a sparse one would stride through memory."""
    group = columns.weights.shape[2]
    for i, (x, weights) in enumerate(zip(columns.first.tolist(), columns.weights, strict=True)):
        made = out[:, i * group : (i + 1) * group]
        np.matmul(image[:, x : x + len(weights)], weights[:, : made.shape[1]], out=made)
