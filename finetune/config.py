"""Configuration of what consumes an encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from ..data.config import DataSection
from ..engine.config import Section


class ProbeSection(Section):
    """A linear probe on frozen features."""

    encoder: str
    """finished pretraining run, encoder.safetensors, or timm:NAME"""
    controls: NonNegativeInt = 3
    """encoders of the same shape with random weights, probed the same way"""
    pool: Literal["mean", "cls"] = "mean"
    """feature of a window: mean of its patch tokens, or its class token"""
    folds: int = Field(default=5, ge=2)
    """of patients, where the data has no train and test split"""
    inner_folds: int = Field(default=3, ge=2)
    """of patients, for the choice of C"""
    c_grid: tuple[PositiveFloat, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """inverse regularisation strengths to choose from"""
    replicates: PositiveInt = 1000
    """bootstrap samples of patients behind an interval"""
    batch_size: PositiveInt = 64
    """windows encoded at once"""


class ProbeConfig(Section):
    """`miram probe`."""

    out: str = "runs/probe"
    """run folder"""
    seed: int = 0
    """of folds, bootstrap and random encoders"""
    data: DataSection
    probe: ProbeSection
