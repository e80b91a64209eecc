"""Configuration of distillation: a pretraining with a teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ...data.augment import PairSection
from ...engine.config import Section
from ...pretrain.config import MocoSection, PretrainConfig

OF_KIND = {"student_depth": "dmae", "relation_heads": "relations"}


class DistillSection(Section):
    """Who teaches, and what of it is learnt."""

    teacher: str
    """encoder to learn from: a run, an encoder.safetensors, or timm:NAME"""
    kind: Literal["dmae", "relations"] = "dmae"
    """its tokens beside reconstruction (DMAE), or how its tokens attend to each other (TinyMIM)"""
    depth: float = Field(default=0.75, gt=0, le=1)
    """share of the teacher's blocks after which it is read"""
    student_depth: float | None = Field(default=None, gt=0, le=1)
    """the same of the student, for dmae; null: like depth"""
    relation_heads: PositiveInt | None = None
    """heads that the teacher's channels are split into, for relations; null: its own"""
    weight: PositiveFloat = 1.0
    """of the teacher's losses in the total"""

    @model_validator(mode="after")
    def _of_its_kind(self) -> DistillSection:
        for key, kind in OF_KIND.items():
            if kind != self.kind and getattr(self, key) is not None:
                raise ValueError(f"{key} is of kind {kind}; leave it out")
        return self


class DistillConfig(PretrainConfig):
    """`miram distill` of encoders."""

    out: str = "runs/distill"
    """run folder"""
    objective: Literal["miram"] = "miram"
    """of dmae beside the teacher's tokens; relations has none"""
    distill: DistillSection

    @model_validator(mode="after")
    def _one_view(self) -> DistillConfig:
        if self.pair != PairSection() or self.moco != MocoSection():
            raise ValueError("pair and moco belong to moco_v3, which no distillation is; leave them out")
        return self
