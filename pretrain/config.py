"""Configuration of pretraining."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from ..data.config import CropSection, DataSection
from ..engine.config import Section, check_options
from ..engine.loop import TrainSection
from .attention import ATTENTIONS


class ScaleSection(Section):
    """One decoder: which multiple of the image it reconstructs, and how it is built."""

    scale: PositiveInt
    """reconstruct the image this many times as fine as the encoder sees it"""
    attention: Literal["softmax", "nystrom"] = "softmax"
    """softmax is exact; nystrom is linear in the number of tokens"""
    depth: PositiveInt = 8
    """blocks"""
    width: PositiveInt = 512
    """channels, a multiple of heads and of 4"""
    heads: PositiveInt = 16
    """attention heads"""
    weight: NonNegativeFloat = 1.0
    """of this scale's loss in the total"""
    loss_on: Literal["masked", "all"] = "masked"
    """patches that count"""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """how coarse tokens become fine ones"""
    options: dict[str, Any] = {}
    """of the attention, e.g. {num_landmarks: 64}"""

    @model_validator(mode="after")
    def _fits(self) -> ScaleSection:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.heads}) and of 4")
        check_options(ATTENTIONS[self.attention], self.options, f"attention {self.attention}")
        return self


class ModelSection(Section):
    """Encoder, masking and decoders."""

    encoder: str = "vit_small_patch16_224"
    """timm name of a ViT"""
    encoder_options: dict[str, Any] = {}
    """handed to timm, e.g. {depth: 4, embed_dim: 128, num_heads: 4}"""
    attention_backend: Literal["auto", "sdpa", "eager"] = "auto"
    """of softmax attention in the decoders; auto is torch's fused kernel"""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """what the encoder sees: side, or [height, width]"""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """part of the patches that is hidden"""
    norm_pix: bool = True
    """predict pixels normalised patch by patch"""
    variance_floor: NonNegativeFloat = 0.01
    """added to a patch's variance, in units of the data set's"""
    scales: tuple[ScaleSection, ...] = (
        ScaleSection(scale=1),
        ScaleSection(scale=2, attention="nystrom", loss_on="all", options={"num_landmarks": 64}),
    )
    """decoders; one of scale 1 is a plain MAE"""

    @field_validator("scales")
    @classmethod
    def _one_of_each(cls, scales: tuple[ScaleSection, ...]) -> tuple[ScaleSection, ...]:
        found = [section.scale for section in scales]
        if not found or len(set(found)) < len(found):
            raise ValueError(f"one decoder a scale, at least one (got scales {found})")
        return scales

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the encoder's input."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


class PretrainConfig(Section):
    """`miram pretrain`."""

    out: str = "runs/pretrain"
    """run folder"""
    seed: int = 0
    """of everything random"""
    data: DataSection
    crop: CropSection = CropSection()
    objective: Literal["miram"] = "miram"
    """what is learnt"""
    model: ModelSection = ModelSection()
    train: TrainSection
