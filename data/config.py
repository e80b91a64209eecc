"""The `data` section that every stage shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from ..engine.config import Section

Share = Annotated[float, Field(gt=0, le=1)]


class DataSection(Section):
    """Which samples, and how they are fetched."""

    shards: str | list[str]
    """folder of a data set, or a list of them"""
    split: str | None = "train"
    """samples of this split and those without one; null: all"""
    task: str | None = None
    """label that an evaluation predicts"""
    workers: NonNegativeInt = 2
    """processes that read and crop while training; 0: none but the main one"""
    cache_mb: NonNegativeInt = 0
    """decoded images each worker keeps, in megabytes"""


class CropSection(Section):
    """How a training view is cut out of an image."""

    area: tuple[Share, Share] = (0.2, 1.0)
    """smallest and largest part of the image a crop covers"""
    aspect: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333)
    """narrowest and widest crop, relative to the view's own shape"""
    flip: bool = True
    """mirror half of the crops"""
    tissue: float = Field(default=0.25, ge=0, le=1)
    """part of a crop that must be breast, where that can be had"""

    @field_validator("area", "aspect")
    @classmethod
    def _smallest_first(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"the smaller bound comes first (got {list(bounds)})")
        return bounds
