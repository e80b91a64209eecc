"""Configuration of pretraining."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from ..data.augment import PairSection
from ..data.config import CropSection, DataSection, Share
from ..engine.config import Section, check_options
from ..engine.recipe import TrainSection
from .attention import ATTENTIONS


class ScaleSection(Section):
    """One decoder: which multiple of the image it reconstructs, and how it is built."""

    scale: PositiveInt
    """reconstruct the image this many times as fine as the encoder sees it"""
    tokens: Literal["upsampled", "shared"] = "upsampled"
    """decode a grid of tokens of this scale, or predict larger patches from the decoded tokens of scale 1"""
    attention: Literal["softmax", "nystrom", "performer", "linformer", "agent", "window"] = "softmax"
    """softmax is exact; the others are linear in the number of tokens"""
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
    upsample: Literal["nearest", "bilinear", "learned"] = "nearest"
    """how coarse tokens become fine ones"""
    decode_fraction: Share = 1.0
    """part of the grid that is decoded in a step, in tiles drawn anew for every image"""
    checkpointing: bool = False
    """recompute the blocks in the backward pass: less memory, a third more time"""
    options: dict[str, Any] = {}
    """of the attention, e.g. {num_landmarks: 64}"""

    @model_validator(mode="after")
    def _fits(self) -> ScaleSection:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.heads}) and of 4")
        decoder = {"attention", "depth", "width", "heads", "upsample", "decode_fraction", "checkpointing", "options"}
        if self.tokens == "shared" and (idle := sorted(decoder & self.model_fields_set)):
            raise ValueError(
                f"tokens: shared has no decoder of its own; leave out {', '.join(idle)}, or replace the whole scale "
                f"by {{scale: {self.scale}, tokens: shared}}"
            )
        check_options(ATTENTIONS[self.attention], self.options, f"attention {self.attention}; options={{}} clears them")
        return self


class ModelSection(Section):
    """Encoder, masking and decoders."""

    encoder: str = "vit_small_patch16_224"
    """timm name of a ViT"""
    encoder_options: dict[str, Any] = {}
    """handed to timm, e.g. {depth: 4, embed_dim: 128, num_heads: 4}"""
    checkpointing: bool = False
    """recompute the encoder's blocks in the backward pass"""
    attention_backend: Literal["auto", "sdpa", "eager", "xformers"] = "auto"
    """of softmax attention in the decoders; auto is torch's fused kernel"""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """what the encoder sees: side, or [height, width]"""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """part of the patches that is hidden"""
    mask_unit: PositiveInt = 1
    """side of the squares of patches that are hidden together; 2 suits grids of 28 x 28 and more"""
    norm_pix: bool = True
    """predict pixels normalised patch by patch"""
    variance_floor: PositiveFloat = 0.01
    """added to a patch's variance, in units of the data set's"""
    tissue_loss: float = Field(default=0.0, ge=0, le=1)
    """0: all patches count alike; 1: each by its part that is breast"""
    target: Literal["source", "upsampled"] = "source"
    """finer scales show the source's own detail, or the encoder's input enlarged (the paper's code)"""
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
        own = [section.scale for section in scales if section.tokens == "upsampled"]
        if len(own) < len(scales) and 1 not in own:
            raise ValueError("tokens: shared needs a decoder of scale 1 to share")
        if not any(section.weight for section in scales):
            raise ValueError("every weight is 0, so nothing would be learnt")
        return scales

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the encoder's input."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


class MocoSection(Section):
    """MoCo v3 (Chen et al. 2021), with its defaults."""

    dim: PositiveInt = 256
    """of the space in which views are compared"""
    hidden: PositiveInt = 4096
    """width of the projector's and the predictor's hidden layers"""
    temperature: PositiveFloat = 0.2
    """of the contrast"""
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """of the slow copy at the first step; rises to 1 along a cosine"""
    freeze_patch_projection: bool = True
    """leave the patch projection as it starts, at random or from `init`, which steadies training"""


class MonitorSection(Section):
    """What is looked at while a pretraining runs, beside its losses."""

    every: PositiveInt | None = None
    """steps between looks; null: only at the end"""
    images: PositiveInt = 256
    """most images a look reads"""
    pictures: PositiveInt = 4
    """images in the figures"""
    shards: str | list[str] | None = None
    """labelled data set of the probes; null: that of training"""
    split: str | None = None
    """of that data set; null: all of `shards`, or what training uses"""
    task: str | None = None
    """label that a linear probe and nearest neighbours predict, by folds of patients; null: none"""


class PretrainConfig(Section):
    """`miram pretrain`."""

    out: str = "runs/pretrain"
    """run folder"""
    seed: int = 0
    """of everything random"""
    data: DataSection
    crop: CropSection = CropSection()
    pair: PairSection = PairSection()
    """the two views of moco_v3"""
    objective: Literal["miram", "moco_v3"] = "miram"
    """what is learnt"""
    init: str | None = None
    """weights the encoder starts from: a run, an encoder.safetensors, or timm:NAME; null: random"""
    model: ModelSection = ModelSection()
    moco: MocoSection = MocoSection()
    monitor: MonitorSection = MonitorSection()
    train: TrainSection
