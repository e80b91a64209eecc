"""Configuration of what consumes an encoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NegativeInt, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ..data.config import DataSection
from ..engine.config import Section

Method = Literal["linear", "sweep", "knn", "attentive", "mae_linear"]
Pool = Literal["mean", "cls", "cls+mean"]  # of a window's patch tokens the mean, its class token, or both joined
LRS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # ten times DINOv2's: fewer steps


class ProbeSection(Section):
    """What is asked of frozen features, and of whose."""

    encoder: str
    """pretraining run, encoder.safetensors, timm:NAME, another encoder's file, random (a ViT-S) or random:NAME"""
    beside: tuple[str, ...] = ()
    """other encoders, named alike, judged on the same images and compared with the first"""
    controls: NonNegativeInt = 3
    """encoders of the first one's shape with random weights, probed the same way"""
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("linear", "knn")
    """probes, the headline first: linear (logistic regression), sweep (SGD heads), knn, attentive (all patches),
    mae_linear (as masked autoencoders are published)"""
    pool: Pool = "mean"
    """feature of a window for linear, knn and mae_linear: mean of its patch tokens, its class token, or both"""
    layers: Annotated[tuple[NegativeInt, ...], Field(min_length=1)] = (-1,)
    """blocks whose features the sweep's heads read, counted from the end"""
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)] = ("mean",)
    """how the sweep's heads pool each of them"""
    lrs: Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=1)] = LRS
    """learning rates of the sweep's heads"""
    crops: NonNegativeInt = 0
    """random crops of each image that sweep and mae_linear train on; 0: on the windows that cover the image"""
    neighbours: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5, 10, 20, 50, 100, 200)
    """numbers of neighbours to choose from"""
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.07, 0.1, 0.2)
    """of their votes, to choose from"""
    c_grid: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """inverse regularisation strengths of the linear probe to choose from"""
    folds: int = Field(default=5, ge=2)
    """of patients, where the data has no train and test split"""
    inner_folds: int = Field(default=3, ge=2)
    """of training patients, for every choice"""
    replicates: PositiveInt = 1000
    """bootstrap samples of patients behind an interval"""
    batch_size: PositiveInt = 64
    """windows encoded at once"""

    @field_validator("methods", "layers", "pools", "beside")
    @classmethod
    def _once(cls, values: tuple[str | int, ...]) -> tuple[str | int, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"each is named once (got {list(values)})")
        return values


class ProbeConfig(Section):
    """`miram probe`."""

    out: str = "runs/probe"
    """run folder"""
    seed: int = 0
    """of folds, bootstrap, heads and controls"""
    data: DataSection
    probe: ProbeSection
