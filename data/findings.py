"""What a mask marks, as training crops need it: where findings lie, a place near one, and how a window shows them.

Legend: H and W of the stored image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .window import Pair, Point, Window

IGNORED = 255  # a class number: pixels that count for nothing
CELLS = 2**20  # pixels in which pieces are told apart: of more, blocks
TOUCHING = np.ones((3, 3), np.bool_)  # pixels that share a corner are of one piece

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class Findings:
    """The class numbers of the part of a stored mask that is not background, and where that part begins."""

    start: Pair
    classes: Mask
    present: tuple[int, ...]  # classes but for background and IGNORED

    @classmethod
    def of(cls, mask: Mask | None, lookup: Mask, margin: int) -> Findings:
        """With a margin of background, as far as the image goes. It is small, as a rule, and quickly looked at."""
        if mask is None:
            return cls(np.zeros(2, np.int64), np.zeros((0, 0), np.uint8), ())
        rows, columns = slice(None), slice(None)
        if lookup[0] == 0:
            rows = _span(mask.any(axis=1), margin)
            columns = _span(mask[rows].any(axis=0), margin)
        classes = np.asarray(lookup[mask[rows, columns]])
        values = np.setdiff1d(lookup, (0, IGNORED)).tolist()
        present = tuple(value for value in values if (classes == value).any())
        return cls(np.array([rows.start or 0, columns.start or 0]), classes, present)

    def within(self, start: Pair, end: Pair) -> bool:
        """Whether there is a finding in a part of the stored image."""
        part = self._part(start, end)
        return bool(self.present and ((part != 0) & (part != IGNORED)).any())

    def pixel(self, rng: np.random.Generator, pieces: bool) -> Point:
        """The middle of a random pixel of a random class, or of a random piece of it."""
        found = self.classes == rng.choice(self.present)
        place = _in_a_piece(rng, found) if pieces else _any_pixel(rng, found)
        return np.asarray(self.start + place + 0.5, np.float64)

    def shown(self, window: Window) -> NDArray[np.int64]:
        """(*size) class numbers: at each pixel the one with the largest share, each resampled as an image is."""
        made = np.zeros(window.size, np.int64)
        low, high = window.reach()
        low, part = np.maximum(low, self.start), self._part(low, high)
        planes = {value: plane for value in (*self.present, IGNORED) if (plane := part == value).any()}
        if planes:
            down, across = window.sight(low, low + part.shape)
            stack = np.moveaxis(np.stack(list(planes.values())).view(np.uint8), 0, -1)
            shares = window.part(down, across, low).show(stack)
            largest = np.argmax(np.concatenate([1 - shares.sum(0, keepdims=True), shares]), axis=0)
            made[down, across] = np.array([0, *planes])[largest]
        return made

    def _part(self, start: Pair, end: Pair) -> Mask:
        (top, left), (bottom, right) = np.maximum(start - self.start, 0), np.maximum(end - self.start, 0)
        return self.classes[top:bottom, left:right]


def _span(found: Any, margin: int) -> slice:
    """From the first to the last that is found, and so many more."""
    numbers = np.flatnonzero(found)
    return slice(max(int(numbers[0]) - margin, 0), int(numbers[-1]) + 1 + margin) if len(numbers) else slice(0, 0)


def _any_pixel(rng: np.random.Generator, found: NDArray[np.bool_]) -> Pair:
    """(2,) row and column of one of them, all alike likely."""
    ends = np.cumsum(np.count_nonzero(found, axis=1))
    number = rng.integers(ends[-1])
    row = int(np.searchsorted(ends, number, side="right"))
    return np.array([row, np.flatnonzero(found[row])[number - ends[row]]])


def _in_a_piece(rng: np.random.Generator, found: NDArray[np.bool_]) -> Pair:
    """(2,) row and column of a pixel in one of the pieces, which are alike likely. Large ones are told by blocks."""
    block = math.ceil(math.sqrt(found.size / CELLS)) or 1
    height, width = (-(-side // block) for side in found.shape)
    even = np.pad(found, [(0, height * block - found.shape[0]), (0, width * block - found.shape[1])])
    blocks = even.reshape(height, block, -1).any(axis=1).reshape(height, width, block).any(axis=2)
    numbers, count = ndimage.label(blocks, TOUCHING)
    start = block * _any_pixel(rng, numbers == 1 + rng.integers(count))
    return start + _any_pixel(rng, found[start[0] : start[0] + block, start[1] : start[1] + block])
