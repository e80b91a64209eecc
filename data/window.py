"""A turned box on a stored image: what it shows, and which pixels of either lie where.

stored image           size (H, W)
+-----------+          +------+
|   /\\      |          |      |     middle of the box <-> middle of the window, `steps` stored pixels a pixel of it,
|  /  \\     |   --->   |      |     the turn about that middle; beyond the image is zero
|  \\  /     |          +------+
+-----------+

Points are (row, column) in parts of pixels, the top left corner of a pixel at integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .augment import turned
from .frames import framed
from .packed import Raster
from .resample import Array, Box, Size

Pair = NDArray[np.int64]  # row, column
Point = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Where a picture of `size` is taken from: a box in stored pixels, turned by an angle in radians."""

    box: Box
    size: Size
    angle: float

    def show(self, pixels: Raster) -> Array:
        """(C, *size) of an image (H, W) or (H, W, C), in its own units.

        An upright one is made a pixel wider all around, and cut: its own edge is then none that the kernel stops at.
        """
        if 0 in self.size or (self.reach()[1] <= 0).any() or (self.reach()[0] >= pixels.shape[:2]).any():
            return np.zeros((*pixels.shape[2:], 1)[:1] + self.size, np.float32)
        if self.angle:
            return turned(pixels, self.box, self.size, self.angle)
        (top, left, height, width), (down, across) = self.box, self.steps.tolist()
        wider = (top - down, left - across, height + 2 * down, width + 2 * across)
        return framed(pixels, wider, (self.size[0] + 2, self.size[1] + 2))[:, 1:-1, 1:-1]

    @property
    def steps(self) -> Point:
        """(2,) stored pixels a pixel of the window, along its own sides."""
        return np.divide(self.box[2:], self.size)

    @property
    def middle(self) -> Point:
        """Of the box."""
        return np.asarray(np.add(self.box[:2], np.divide(self.box[2:], 2)))

    @property
    def turn(self) -> NDArray[np.float64]:
        """(2, 2) from an arm in the window to the same in the image."""
        return np.array([[math.cos(self.angle), -math.sin(self.angle)], [math.sin(self.angle), math.cos(self.angle)]])

    def seen(self, point: Point) -> Point:
        """Where the window shows a point of the stored image."""
        return np.asarray(self.turn.T @ ((point - self.middle) / self.steps) + np.divide(self.size, 2))

    def reach(self) -> tuple[Pair, Pair]:
        """First and last row and column, exclusive, of the stored pixels that it takes anything of."""
        half = (np.abs(self.turn) @ np.divide(self.size, 2) + 2) * self.steps + 1  # the kernel's width, and rounding
        return np.floor(self.middle - half).astype(np.int64), np.ceil(self.middle + half).astype(np.int64)

    def sight(self, low: Pair, high: Pair) -> tuple[slice, slice]:
        """The window's rows and columns that show anything of a part of the stored image."""
        corners = [self.seen(np.array([y, x], float)) for y in (low[0], high[0]) for x in (low[1], high[1])]
        start = np.clip(np.floor(np.min(corners, axis=0)) - 1, 0, self.size).astype(int)
        end = np.clip(np.ceil(np.max(corners, axis=0)) + 1, start, self.size).astype(int)
        return slice(start[0], end[0]), slice(start[1], end[1])

    def part(self, down: slice, across: slice, origin: Pair) -> Window:
        """The window of some rows and columns alone, on what is left of an image from `origin` on."""
        count = np.array([down.stop - down.start, across.stop - across.start])
        off = np.array([down.start, across.start]) + count / 2 - np.divide(self.size, 2)
        start = self.middle + self.steps * (self.turn @ off - count / 2) - origin
        box = (*start.tolist(), *(count * self.steps).tolist())
        return Window(box, (int(count[0]), int(count[1])), self.angle)

    def shifted(self, by: Point) -> Window:
        """What it showed `by` pixels (down, across) further on is now at its place."""
        start = np.array(self.box[:2]) + self.steps * (self.turn @ by)
        return Window((*start.tolist(), *self.box[2:]), self.size, self.angle)
