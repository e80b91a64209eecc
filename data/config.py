"""The `data` section that every stage shares."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt

from ..engine.config import Section


class DataSection(Section):
    """Which samples, and how they are fetched."""

    shards: str | list[str]
    """folder of a data set, or a list of them"""
    split: str | None = "train"
    """samples of this split and those without one; null: all"""
    task: str | None = None
    """label that an evaluation predicts"""
    workers: NonNegativeInt = 2
    """processes that read and crop; 0: none but the main one"""
    cache_mb: NonNegativeInt = 0
    """decoded images each worker keeps, in megabytes"""


class CropSection(Section):
    """How a training view is cut out of an image."""

    area: tuple[float, float] = (0.2, 1.0)
    """smallest and largest part of the image a crop covers"""
    aspect: tuple[float, float] = (0.75, 1.3333)
    """narrowest and widest crop, relative to the view's own shape"""
    flip: bool = True
    """mirror half of the crops"""
    tissue: float = Field(default=0.25, ge=0, le=1)
    """part of a crop that must be breast, where that can be had"""
