"""What an archive's image is before it is a sample: who it belongs to now, its pixels on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Label = str | int | float


@dataclass(frozen=True, kw_only=True)
class Circle:
    """A marked finding: centre and radius in pixels, x from the left, y from the top, pixel centres at integers."""

    x: float
    y: float
    radius: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Film:
    """An image as it leaves its archive. `mask` holds 0 for nothing and k for the k-th finding."""

    pixels: Pixels  # (H, W)
    max_value: int  # the largest value the format allows, not the largest seen
    spacing_mm: float | None = None  # millimetres a pixel, None where nobody knows
    circles: tuple[Circle, ...] = ()
    mask: NDArray[np.uint8] | None = None  # (H, W)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image of an archive. The ids are the archive's own: they are hashed before anything is written."""

    read: Callable[[], Film]
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
