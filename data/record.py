"""What an archive's image is before it is a sample: who it belongs to now, its pixels on demand.

Marks (circles, boxes, polygons) are in pixels of the film, x from the left and y from the top, with the centres of
pixels at integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Label = str | int | float
MaskKind = Literal["instances", "classes"]


@dataclass(frozen=True, kw_only=True)
class Circle:
    """A marked finding: centre and radius."""

    x: float
    y: float
    radius: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A marked finding: the centres of its first and last pixels."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Polygon:
    """A marked finding: the corners (x, y) of its outline."""

    points: tuple[tuple[float, float], ...]
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of a film, rows top … bottom-1 and columns left … right-1. It may reach beyond the frame."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Film:
    """An image as it leaves its archive.

    A mask of `instances` holds k in the k-th finding, one of `classes` the class's number; both 0 for nothing.
    """

    pixels: Pixels  # (H, W), or (H, W, 3) where colour is asked for
    max_value: int  # the largest value the format allows, not the largest seen
    spacing_mm: float | None = None  # millimetres a pixel, None where nobody knows
    circles: tuple[Circle, ...] = ()
    boxes: tuple[Box, ...] = ()
    polygons: tuple[Polygon, ...] = ()
    mask: NDArray[np.uint8] | None = None  # (H, W)
    mask_kind: MaskKind = "instances"
    region: Region | None = None  # keep just this, instead of looking for the breast
    facts: Mapping[str, str] = field(
        default_factory=dict
    )  # of closed lists only, such as {"photometric": "MONOCHROME1"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image of an archive. The ids are the archive's own: they are hashed before anything is written."""

    read: Callable[[], Film]  # can be pickled; raises UnreadableImage where the image cannot be used
    name: str  # what messages on the user's own screen call it
    image_id: str
    patient_id: str
    exam_id: str = ""
    laterality: str = ""  # "L", "R" or unknown
    view: str = ""  # "CC", "MLO", … or unknown
    split: str = ""  # the archive's official split, or none
    spacing_mm: float | None = None  # where the archive's table, not its image, tells it
    stamp: str = ""  # changes when the image's file does
    labels: Mapping[str, Label] = field(default_factory=dict)
