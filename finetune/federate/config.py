"""Configuration of federated tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from ...data.config import DataSection
from ...engine.config import Section
from ...engine.recipe import TrainSection
from ..classify.config import FinetuneConfig, FinetuneSection, Rate, SearchSection
from .exchange import WORDS

Name = Annotated[str, Field(pattern=f"^{WORDS['site'].pattern}$")]
Mode = Literal["freeze_a", "residual", "plain"]
Comparison = Literal["local", "centralised"]


IDLE: tuple[tuple[str, Any, str], ...] = (  # keys of the finetune section that a federation has no use for
    ("teacher", None, "sites do not distil"),
    ("keep", "last", "nothing is held out in a round to tell which step was best"),
    ("fraction", 1.0, "a site trains on all of its training images"),
    ("subgroups", (), "a federation tells by sites"),
    ("search", SearchSection(), "nothing is searched"),
)
IDLE_TRAIN = {
    "ema": "the average of the sites' weights is what a round ends with",
    "trackers": "a plan must not make sites send figures elsewhere",
    "profile_steps": "a round is many trainings",
}


class FederateSection(Section):
    """Who takes part, and how what they learn becomes one model."""

    sites: PositiveInt | None = None
    """how many: in a simulation they are dealt from `data` by patient; null: what `by` says, or one"""
    by: str | None = None
    """column or label of `data` whose values are the sites of a simulation; `shards`: every data set is one"""
    name: Name = "site"
    """what this site is called, where sites are real"""
    base: Annotated[str, Field(pattern=f"^{WORDS['base'].pattern}$")] | None = None
    """sha256 of the encoder that all must have; null: that of finetune.encoder"""
    rounds: PositiveInt = 10
    """times that every site trains (train.steps or train.epochs, with an optimizer of its own) and all are averaged"""
    lr: Rate | None = None
    """peak learning rate; null: the middle of the method's range"""
    average: Mode = "freeze_a"
    """of low rank, exact: A is frozen and the same everywhere, or what the mean product lacks is added to the encoder;
    plain: A and B are averaged apart, which is not the average of what was learnt"""
    mu: NonNegativeFloat = 0.0
    """FedProx: half of this times the squared distance from the round's start is added to a site's loss"""
    weighting: Literal["examples", "equal"] = "examples"
    """sites count by their training images, or alike"""
    holdout: float = Field(default=0.3, gt=0, le=0.5)
    """share of a site's patients that judges, about, where its data has no train and test split"""
    compare: tuple[Comparison, ...] = ("local", "centralised")
    """what the federation is compared with: a model of each site's own, and (in a simulation) one of all images"""


class FederateConfig(Section):
    """`miram federate`."""

    out: str = "runs/federate"
    """run folder"""
    seed: int = 0
    """of the division into sites and tests, of what a method starts from, and of batches"""
    data: DataSection
    finetune: FinetuneSection
    """encoder, method and task, as `miram finetune` has them; nothing is searched"""
    train: TrainSection
    """of one round at one site; the rate falls from round to round as the schedule says, without a warm-up"""
    federate: FederateSection = FederateSection()

    @model_validator(mode="after")
    def _fits(self) -> FederateConfig:
        if self.finetune.method in ("full", "probe", "attention_mil"):
            raise ValueError(
                f"finetune.method: {self.finetune.method} is not federated, only adapters, prompts and heads are; "
                "take lora, a prompt or linear"
            )
        if self.finetune.input == "tiles":
            raise ValueError("finetune.input: tiles are read by attention_mil, which is not federated; take windows")
        for key, usual, why in IDLE:
            if getattr(self.finetune, key) != usual:
                raise ValueError(f"finetune.{key}: {why}; leave it out")
        for key, why in IDLE_TRAIN.items():
            if getattr(self.train, key):
                raise ValueError(f"train.{key}: {why}; leave it out")
        if self.train.blr != TrainSection.model_fields["blr"].default:
            raise ValueError("train.blr: set federate.lr, the learning rate itself")
        if self.federate.by is not None and self.federate.sites is not None:
            raise ValueError("federate.by: federate.sites says what the sites are, too; set federate.sites=null")
        return self

    @property
    def tuning(self) -> FinetuneConfig:
        """The same as `miram finetune` has it."""
        return FinetuneConfig(out=self.out, seed=self.seed, data=self.data, finetune=self.finetune, train=self.train)
