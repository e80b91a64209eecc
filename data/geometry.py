"""How a stored image came out of its film, and the way back.

film (height, width) -> crop box, zero where it reaches beyond the film -> horizontal flip -> resize to (rows, columns)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..engine.errors import UserError
from .record import Box, Circle, Film, Pixels, Polygon, Region

Shape = tuple[int, int]  # rows, columns
Point = tuple[float, float]  # x, y with the centres of pixels at integers


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Crop box in film pixels, then a horizontal flip, then a new size. Everything in it can be undone."""

    height: int  # of the film, as is width
    width: int
    top: int
    left: int
    bottom: int  # exclusive, as is right
    right: int
    flipped: bool
    rows: int  # of the stored image, as is columns
    columns: int

    def __post_init__(self) -> None:
        if not (self.top < self.bottom and self.left < self.right and self.rows > 0 and self.columns > 0):
            raise ValueError(f"The crop box is empty: {self}.")

    @classmethod
    def crop(cls, film: Shape, box: Region, *, flipped: bool = False) -> Geometry:
        """A crop at the film's own resolution."""
        rows, columns = box.bottom - box.top, box.right - box.left
        return cls(height=film[0], width=film[1], **vars(box), flipped=flipped, rows=rows, columns=columns)

    @classmethod
    def whole(cls, height: int, width: int) -> Geometry:
        """The geometry that changes nothing."""
        return cls.crop((height, width), Region(top=0, left=0, bottom=height, right=width))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """What `as_dict` gave, read back."""
        return cls(**values)

    def as_dict(self) -> dict[str, int | bool]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    @property
    def box(self) -> Shape:
        """Rows and columns of the crop box in film pixels."""
        return self.bottom - self.top, self.right - self.left

    @property
    def shape(self) -> Shape:
        """Rows and columns of the stored image."""
        return self.rows, self.columns

    def resized(self, shape: Shape) -> Geometry:
        """The same crop and flip, stored at another size."""
        return replace(self, rows=shape[0], columns=shape[1])

    def apply(self, image: Pixels) -> Pixels:
        """Film (height, width, ...) -> stored image (*shape, ...), averaged over areas, rounded last."""
        return area_resize(self._cut(image), self.shape)

    def apply_mask(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Film's mask -> the stored image's, in which no value is lost while there are pixels for all of them."""
        return resize_mask(self._cut(mask), self.shape)

    def restore(self, image: NDArray[Any]) -> NDArray[Any]:
        """Stored image or mask (*shape, ...) -> film (height, width, ...), nearest pixel, zero outside the crop."""
        _expect(image, self.shape)
        box = nearest(image, self.box)
        return _paste(box[:, ::-1] if self.flipped else box, (-self.top, -self.left), (self.height, self.width))

    def apply_film(self, film: Film) -> Film:
        """The film as it is stored: pixels, mask and marks."""
        return replace(
            film,
            pixels=self.apply(film.pixels),
            mask=None if film.mask is None else self.apply_mask(film.mask),
            circles=tuple(self.apply_circle(circle) for circle in film.circles),
            boxes=tuple(self.apply_box(box) for box in film.boxes),
            polygons=tuple(replace(p, points=tuple(map(self.forward, p.points))) for p in film.polygons),
            region=None,
        )

    def forward(self, point: Point) -> Point:
        """A point on the film -> the same point on the stored image."""
        (x, y), (sy, sx) = point, self._scale()
        x = self.right - 1 - x if self.flipped else x - self.left
        return (x + 0.5) * sx - 0.5, (y - self.top + 0.5) * sy - 0.5

    def back(self, point: Point) -> Point:
        """A point on the stored image -> the same point on the film."""
        (x, y), (sy, sx) = point, self._scale()
        x, y = (x + 0.5) / sx - 0.5, (y + 0.5) / sy - 0.5
        return (self.right - 1 - x if self.flipped else x + self.left), y + self.top

    def apply_circle(self, circle: Circle) -> Circle:
        """A circle on the film -> the same circle on the stored image."""
        x, y = self.forward((circle.x, circle.y))
        return replace(circle, x=x, y=y, radius=circle.radius * math.sqrt(math.prod(self._scale())))

    def restore_circle(self, circle: Circle) -> Circle:
        """A circle on the stored image -> the same circle on the film."""
        x, y = self.back((circle.x, circle.y))
        return replace(circle, x=x, y=y, radius=circle.radius / math.sqrt(math.prod(self._scale())))

    def apply_box(self, box: Box) -> Box:
        """A box on the film -> the same box on the stored image."""
        return _box(box, self.forward((box.left, box.top)), self.forward((box.right, box.bottom)))

    def restore_box(self, box: Box) -> Box:
        """A box on the stored image -> the same box on the film."""
        return _box(box, self.back((box.left, box.top)), self.back((box.right, box.bottom)))

    def restore_polygon(self, polygon: Polygon) -> Polygon:
        """A polygon on the stored image -> the same polygon on the film."""
        return replace(polygon, points=tuple(map(self.back, polygon.points)))

    def _scale(self) -> tuple[float, float]:
        return self.rows / self.box[0], self.columns / self.box[1]

    def _cut(self, film: NDArray[Any]) -> NDArray[Any]:
        _expect(film, (self.height, self.width))
        box = _paste(film, (self.top, self.left), self.box)
        return box[:, ::-1].copy() if self.flipped else box


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large stored images are: millimetres a pixel, or pixels along the longest side; neither: as read."""

    spacing_mm: float | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and self.max_size is not None:
            raise UserError("--spacing and --max-size both say how large images are; give one of them")

    def shape(self, box: Shape, spacing_mm: float | None) -> Shape:
        """The size of an image that has this one and this spacing now. Nothing is enlarged.

        Raises:
            ValueError: a spacing is asked for and the image's own is unknown.
        """
        if self.spacing_mm is not None:
            if spacing_mm is None:
                raise ValueError("its spacing is unknown, so it cannot be brought to --spacing; use --max-size")
            return _shrunk(box, spacing_mm / self.spacing_mm)
        return box if self.max_size is None else _shrunk(box, self.max_size / max(box))


def _shrunk(box: Shape, factor: float) -> Shape:
    """Both sides times a factor, at least one pixel; unchanged from a factor of one up."""
    return box if factor >= 1 else (max(1, round(box[0] * factor)), max(1, round(box[1] * factor)))


def area_resize(image: Pixels, shape: Shape) -> Pixels:
    """(H, W) or (H, W, C) averaged over areas in float, rounded at the end; the image itself at its own size."""
    if image.shape[:2] == shape:
        return image
    if image.ndim == 3:
        return cast(Pixels, np.stack([area_resize(image[..., c], shape) for c in range(image.shape[2])], axis=2))
    small = Image.fromarray(image.astype(np.float32)).resize(shape[::-1], Image.Resampling.BOX)
    return cast(Pixels, np.rint(np.asarray(small)).astype(image.dtype))


def nearest(image: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """(H, W, ...) at another size, each pixel the one its centre falls into."""
    if image.shape[:2] == shape:
        return image
    rows, columns = (_centres(new, old) for new, old in zip(shape, image.shape[:2], strict=True))
    return image[rows[:, None], columns]


def resize_mask(mask: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """A mask at another size, by nearest pixel; a value that would vanish keeps one pixel near its middle."""
    if mask.shape == shape:
        return mask
    small = nearest(mask, shape)
    for value in np.setdiff1d(mask, small):
        middle = np.median(np.argwhere(mask == value), axis=0) * shape / mask.shape
        free = np.argwhere((small == 0) | (np.bincount(small.ravel(), minlength=256) > 1)[small])
        if len(free):  # no other value vanishes for it
            small[tuple(free[np.argmin(((free + 0.5 - middle) ** 2).sum(axis=1))])] = value
    return small


def _centres(new: int, old: int) -> NDArray[np.intp]:
    return ((np.arange(new) + 0.5) * old / new).astype(np.intp)


def _paste(source: NDArray[Any], start: Shape, shape: Shape) -> NDArray[Any]:
    """The window of `shape` that begins at `start` of the source, zero where it reaches beyond."""
    out = np.zeros((*shape, *source.shape[2:]), source.dtype)
    (y0, x0), (y1, x1) = np.maximum(start, 0), np.minimum(np.add(start, shape), source.shape[:2])
    if y0 < y1 and x0 < x1:
        out[y0 - start[0] : y1 - start[0], x0 - start[1] : x1 - start[1]] = source[y0:y1, x0:x1]
    return out


def _box(box: Box, one: Point, other: Point) -> Box:
    """The box between two opposite corners."""
    (left, right), (top, bottom) = sorted((one[0], other[0])), sorted((one[1], other[1]))
    return replace(box, left=left, top=top, right=right, bottom=bottom)


def _expect(image: NDArray[Any], shape: Shape) -> None:
    if image.shape[:2] != shape:
        raise ValueError(f"The image is {image.shape[:2]}, but this geometry is for {shape}.")
