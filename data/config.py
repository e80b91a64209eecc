"""The `data` section that every stage shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from ..engine.config import Section

Share = Annotated[float, Field(gt=0, le=1)]


class DataSection(Section):
    """Which samples, and how they are fetched."""

    shards: str | list[str]
    """folder or URL (http, https, s3, gs) of a data set, or a list of them"""
    split: str | None = "train"
    """samples of this split (of a data set that has none, all); null: all"""
    split_file: str | None = None
    """file of `miram data split` that says what the splits are; null: the data's own"""
    fold: NonNegativeInt | None = None
    """of the split file: train is all but this fold, val is this fold"""
    task: str | None = None
    """label that an evaluation predicts"""
    workers: NonNegativeInt = 2
    """processes that read and crop while training; 0: none but the main one"""
    cache_mb: NonNegativeInt = 0
    """decoded images each worker keeps, in megabytes"""
    on_damage: Literal["raise", "skip"] = "raise"
    """a sample that cannot be read stops training, or another one stands in for it; evaluations always stop"""


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
