"""Configuration of the paper's experiment."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from ..data.config import DataSection
from ..engine.config import Section

Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]


class PretrainingEntry(Section):
    """A row of the table: a pretraining, or an encoder that is there."""

    preset: str | None = None
    """of `miram pretrain`, or a YAML file"""
    encoder: str | None = None
    """instead of a pretraining: whatever finetune.encoder takes, e.g. random:vit_base_patch16_224"""
    set: dict[str, Any] = {}
    """keys of the pretraining to set, e.g. {model.scales.1.attention: performer}"""

    @model_validator(mode="after")
    def _one(self) -> PretrainingEntry:
        if (self.preset is None) == (self.encoder is None) or (self.encoder is not None and self.set):
            raise ValueError("give a preset, with keys to set, or an encoder")
        return self


class RecipeEntry(Section):
    """A way to fine-tune."""

    preset: str
    """of `miram finetune`, or a YAML file"""
    set: dict[str, Any] = {}
    """keys of the fine-tuning to set, e.g. {train.epochs: 20}"""


class EverySection(Section):
    """Keys for all runs of a stage; an entry's own come after them."""

    pretrain: dict[str, Any] = {}
    """e.g. {train.micro_batch: 64}"""
    finetune: dict[str, Any] = {}
    """e.g. {finetune.replicates: 2000}"""


class PublishedEntry(Section):
    """What others report of a row."""

    accuracy: float = Field(ge=0, le=1)
    """one figure, of the same task"""
    source: str
    """where it stands"""


class PhantomSection(Section):
    """Phantom lesions, made and ingested where `data.shards` names nothing yet."""

    patients: PositiveInt = 48
    """a third of them for the test"""
    size: PositiveInt = 960
    """height of a film in pixels"""
    seed: int = 0
    """another seed, other patients"""


class PaperConfig(Section):
    """`miram paper`."""

    out: str = "runs/paper"
    """folder for all of it"""
    seed: int = 0
    """of the pretrainings, and of the bootstrap"""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """of the fine-tunings"""
    data: DataSection
    """lesions with an official train and test split that share no patient, and the task"""
    phantoms: PhantomSection | None = None
    """data to make where there is none"""
    against: str = "mae"
    """the row that others are compared with"""
    replicates: PositiveInt = 2000
    """bootstrap samples of patients and seeds"""
    pretrain: Annotated[dict[Name, PretrainingEntry], Field(min_length=1)]
    """rows of the table; the first one leads"""
    finetune: Annotated[dict[Name, RecipeEntry], Field(min_length=1)]
    """a table each; the first one leads"""
    every: EverySection = EverySection()
    published: dict[str, PublishedEntry] = {}
    """figures of others, by row"""

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"each once (got {list(seeds)})")
        return seeds

    @model_validator(mode="after")
    def _rows(self) -> PaperConfig:
        for key, name in (("against", self.against), *(("published", name) for name in self.published)):
            if name not in self.pretrain:
                raise ValueError(f"{key}: {name!r} is no row of pretrain; known: {', '.join(self.pretrain)}")
        return self
