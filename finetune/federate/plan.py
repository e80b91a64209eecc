"""What all sites of a real federation do alike, and what each of them alone knows.

    the plan      {base, start, values, width, target: {…}, task, seed, finetune: {…}, train: {…}, federate: {…}}
                  `miram federate CONFIG --flower` writes it into the app that Flower sends to everybody
    SITE.yaml     {name, encoder, data: {shards, split, …}, out}
                  stays at the site

Legend: D features, k classes.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt, field_serializer

from ...data.config import DataSection
from ...engine.config import Section, check, dump_yaml, parse_yaml, read_tree
from ...engine.errors import UserError
from ...pretrain.encoder import Encoder
from ..classify.cards import TargetCard
from ..classify.config import FinetuneSection
from ..classify.labels import kind_of, refuse_columns, table_of
from ..classify.targets import Target
from ..peft.registry import describe
from .config import FederateConfig, FederateSection, Name
from .exchange import digest_of
from .server import Terms
from .start import start_digest, started, values

DIGEST = r"^[0-9a-f]{64}$"
OWN = {"finetune": ("encoder",), "federate": ("sites", "by", "name", "base")}  # no part of a plan


class Plan(Section):
    """What everybody does."""

    base: str = Field(pattern=DIGEST)
    """digest of the encoder"""
    start: str = Field(pattern=DIGEST)
    """digest of what the method and the head added or may change, as it starts"""
    values: str = Field(pattern=DIGEST)
    """digest of what learns, as it starts: the server has it from a site"""
    width: PositiveInt
    """D, of the encoder's features"""
    target: TargetCard
    task: str
    """label that it is read from"""
    seed: int
    finetune: dict[str, Any]
    train: dict[str, Any]
    federate: FederateSection

    @field_serializer("federate")
    def _agreed(self, section: FederateSection) -> dict[str, Any]:
        return section.model_dump(mode="json", exclude=set(OWN["federate"]))

    @property
    def terms(self) -> Terms:
        """The same for the server."""
        how, classes = self.federate, len(self.target.classes)
        return Terms(self.base, self.start, classes, self.width, how.average, how.mu, how.weighting)


class SiteConfig(Section):
    """SITE.yaml."""

    name: Name
    """what others call it"""
    encoder: str
    """where the encoder lies here"""
    data: DataSection
    out: str = "runs/federation"
    """run folder"""

    def settings(self, plan: Plan) -> FederateConfig:
        """Plan and site together.

        Raises:
            UserError: they do not fit each other.
        """
        if self.data.task not in (None, plan.task):
            raise UserError(f"data.task is {self.data.task} here, and {plan.task} in the plan; leave it out")
        agreed = plan.federate.model_dump(mode="json", exclude=set(OWN["federate"]))
        tree = {
            "out": self.out,
            "seed": plan.seed,
            "data": self.data.model_dump() | {"task": plan.task},
            "finetune": plan.finetune | {"encoder": self.encoder},
            "train": plan.train,
            "federate": agreed | {"name": self.name},
        }
        return check(FederateConfig, tree, "the plan")


def make_plan(settings: FederateConfig, encoder: Encoder) -> str:
    """The plan of a federation, as YAML. No image is read.

    Raises:
        UserError: the configuration leaves open what a site cannot know, or another encoder was expected.
    """
    section, federate = settings.finetune, settings.federate
    target = target_of(section, settings.data.task)
    base = str(describe(encoder)["digest"])
    if federate.base not in (None, base):
        raise UserError(f"federate.base is {federate.base}, and {section.encoder} has {base}; name that encoder")
    start = started(encoder, section, target, federate.average, settings.seed)
    labels = section.classes if isinstance(section.classes, dict) else None
    plan = Plan(
        base=base,
        start=start_digest(start),
        values=digest_of(values(start)),
        width=start.shape.D,
        target=TargetCard(**vars(target), labels=labels, separator=section.separator),
        task=str(settings.data.task),
        seed=settings.seed,
        finetune=section.model_dump(exclude=set(OWN["finetune"])),
        train=settings.train.model_dump(),
        federate=federate,
    )
    return dump_yaml(plan)


def target_of(section: FinetuneSection, task: str | None) -> Target:
    """The task, from the configuration alone: a site may lack a class, so labels cannot say which there are.

    Raises:
        UserError: the configuration does not say it, or says what no labels could make.
    """
    if task is None or section.classes is None:
        missing = "data.task" if task is None else "finetune.classes"
        raise UserError(f"{missing} is not set; sites have to agree on the task and its classes before they begin")
    several, classes = "," in task, [*table_of(task, [], section.classes, complete=False)]
    if several:
        refuse_columns(task, section.kind)
    least = 1 if several or section.kind == "multilabel" else 2
    if len(classes) < least:
        raise UserError(f"finetune.classes names {len(classes)}; there is nothing to tell apart, name {least} or more")
    return Target(task, kind_of(task, section.kind, several, classes), tuple(classes))


def read_plan(text: str) -> Plan:
    """The plan.

    Raises:
        UserError: it is none of this version.
    """
    return check(Plan, parse_yaml(text, "the plan"), "the plan")


def read_site_config(path: str) -> SiteConfig:
    """SITE.yaml.

    Raises:
        UserError: it is not there, or a key is wrong.
    """
    return check(SiteConfig, read_tree(path), path)
