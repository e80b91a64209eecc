"""What all sites of a real federation do alike, and what each of them alone knows.

    the plan      {base, start, width, target: {…}, task, seed, finetune: {…}, train: {…}, federate: {…}}
                  `miram federate CONFIG --flower` writes it into the app that Flower sends to everybody
    SITE.yaml     {name, encoder, data: {shards, split, …}, out}
                  stays at the site

Legend: D features, k classes.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from ...data.config import DataSection
from ...engine.config import Section, check, dump_yaml, parse_yaml, read_tree
from ...engine.errors import UserError
from ...engine.metrics import Kind
from ...pretrain.encoder import Encoder
from ..classify.cards import TargetCard
from ..classify.config import FinetuneSection
from ..classify.targets import Target
from ..peft.registry import describe
from .config import FederateConfig, Name
from .server import Terms
from .start import start_digest, started

DIGEST = r"^[0-9a-f]{64}$"
OWN = {"finetune": ("encoder",), "federate": ("sites", "by", "name", "base"), "train": ()}  # no part of a plan


class Plan(Section):
    """What everybody does."""

    base: str = Field(pattern=DIGEST)
    """digest of the encoder"""
    start: str = Field(pattern=DIGEST)
    """digest of what learns, as it starts"""
    width: PositiveInt
    """D, of the encoder's features"""
    target: TargetCard
    task: str
    """label that it is read from"""
    seed: int
    finetune: dict[str, Any]
    train: dict[str, Any]
    federate: dict[str, Any]

    @property
    def terms(self) -> Terms:
        """The same for the server."""
        federate = {key: self.federate[key] for key in ("mu", "weighting")}
        return Terms(self.base, self.start, len(self.target.classes), self.width, self.federate["average"], **federate)


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
        """Plan and site together."""
        tree = {
            "out": self.out,
            "seed": plan.seed,
            "data": self.data.model_dump() | {"task": plan.task},
            "finetune": plan.finetune | {"encoder": self.encoder},
            "train": plan.train,
            "federate": plan.federate | {"name": self.name},
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
        width=start.shape.D,
        target=TargetCard(**vars(target), labels=labels, separator=section.separator),
        task=str(settings.data.task),
        seed=settings.seed,
        **{name: getattr(settings, name).model_dump(exclude=set(own)) for name, own in OWN.items()},
    )
    return dump_yaml(plan)


def target_of(section: FinetuneSection, task: str | None) -> Target:
    """The task, from the configuration alone: a site may lack a class, so labels cannot say which there are.

    Raises:
        UserError: the configuration does not say it.
    """
    if task is None or section.classes is None:
        missing = "data.task" if task is None else "finetune.classes"
        raise UserError(f"{missing} is not set; sites have to agree on the task and its classes before they begin")
    classes = tuple(section.classes)
    usual: Kind = "multilabel" if "," in task else "binary" if len(classes) == 2 else "multiclass"
    return Target(task, usual if section.kind == "auto" else section.kind, classes)


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
