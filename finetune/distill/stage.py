"""The distillation stage: a teacher and shards in, run folder with a smaller encoder out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from accelerate import Accelerator

from ...data.augment import TwoViews
from ...data.shards import ShardDataset
from ...data.stream import ViewDataset
from ...data.views import MultiScaleViews, Normalisation
from ...engine.config import load
from ...engine.loop import Trainer
from ...engine.objective import Objective
from ...engine.run import Run
from ...engine.seeding import stable_seed
from ...engine.signals import StopSignals
from ...pretrain.build import build_objective, check_patches
from ...pretrain.encoder import Encoder, EncoderCard, build_encoder
from ...pretrain.miram import Miram
from ...pretrain.monitors import Monitors
from ...pretrain.monitors.drawing import Picture
from ...pretrain.rehearsal import figures
from ...pretrain.stage import Course, follow
from ...pretrain.weights.loading import encoder_digest, read_provenance
from ...pretrain.weights.start import initialise_encoder
from .config import DistillConfig
from .dmae import Dmae
from .relations import Relations
from .teacher import Teacher, naming


def distill(
    config: str, arguments: Sequence[str] = (), *, dry_run: bool = False, signals: StopSignals | None = None
) -> Run:
    """`miram distill CONFIG --a.b=value …` of an encoder, as the only rank or as one of many.

    Args:
        dry_run: build everything, take one step, print what it cost, and leave nothing.
        signals: those that came before this was called.

    Raises:
        UserError: configuration, teacher, data or run folder are not usable.
        Preempted: stopped on a signal with a checkpoint on disk.
        RunFailed: the loss became infinite or not a number, memory ran out, or the disk is full.
    """
    return follow(Distillation(load(DistillConfig, config, arguments)), dry_run=dry_run, signals=signals)


class Distillation(Course):
    """A pretraining with a teacher."""

    stage = "distill"

    def __init__(self, settings: DistillConfig):
        super().__init__(settings)
        self.section = settings.distill

    @cached_property
    def digest(self) -> str:
        """Of the teacher's weights."""
        return encoder_digest(self.section.teacher)

    def inputs(self, shards: ShardDataset) -> Mapping[str, str]:
        """As of a pretraining, and the teacher."""
        return {**super().inputs(shards), "teacher": self.digest}

    def card(self, shards: ShardDataset) -> EncoderCard:
        """What the student will say of itself: whose it is, too."""
        card, name = super().card(shards), self.section.teacher
        with naming():
            teacher = {**read_provenance(name), "from": name, "digest": self.digest}
        return replace(card, provenance={**card.provenance, "objective": self.section.kind, "teacher": teacher})

    def build(self, card: EncoderCard) -> tuple[Objective, list[str]]:
        """The student before its teacher."""
        section = self.section
        if section.kind == "relations":
            encoder, said = self.student(card)
            teacher = Teacher(section.teacher, encoder, section.depth)
            return Relations(encoder, teacher, section.relation_heads, section.weight), [*said, told(teacher, encoder)]
        student, said = build_objective(self.settings, card)
        assert isinstance(student, Miram)
        encoder = student.encoder
        teacher = Teacher(section.teacher, encoder, section.depth)
        depth = section.student_depth or section.depth
        return Dmae(student, teacher, depth, section.weight), [*said, told(teacher, encoder)]

    def student(self, card: EncoderCard) -> tuple[Encoder, list[str]]:
        """An encoder without decoders, with the weights that the seed or `init` gives it."""
        settings = self.settings
        torch.manual_seed(stable_seed(settings.seed, "weights") % 2**63)
        encoder = build_encoder(card)
        check_patches(settings.model, encoder)
        encoder.set_grad_checkpointing(settings.model.checkpointing)
        return encoder, initialise_encoder(encoder, settings.init) if settings.init else []

    def views(self, card: EncoderCard, objective: Objective) -> MultiScaleViews | TwoViews:
        """As a pretraining's; of relations the view alone, with nothing hidden."""
        if isinstance(objective, Dmae):
            return super().views(card, objective.student)
        settings, normalise = self.settings, Normalisation(card.mean, card.std)
        return MultiScaleViews(settings.model.size, [1], 0, settings.crop, normalise, settings.seed)

    def monitors(self, objective: Objective, data: ViewDataset, run: Run) -> Monitors:
        """Reconstructions of dmae; of relations attention only."""
        if isinstance(objective, Dmae):
            return Monitors(self.settings, objective.student, data, run)
        return Unreconstructed(self.settings, objective, data, run)

    def rehearse(self, trainer: Trainer) -> None:
        """A step that leaves nothing, and its figures."""
        line = trainer.rehearse()
        trainer.accelerator.print(
            f"miram: rehearsed step {line['step']:.0f} of {trainer.steps}: {figures(line)}\n"
            f"miram: a dry run; nothing was written to {self.settings.out}"
        )

    def advice(self, accelerator: Accelerator) -> str:
        """What saves memory."""
        return (
            "set train.micro_batch lower, or model.checkpointing=true (the run goes on as it was), or start another "
            "with a smaller teacher, whose weights lie on the device, too"
        )


class Unreconstructed(Monitors):
    """Looks at an encoder that nothing is reconstructed from."""

    def pictures(self) -> list[Picture]:
        """Where it looks."""
        return [picture for picture in super().pictures() if picture.name == "attention"]


def told(teacher: Teacher, student: Encoder) -> str:
    """Who teaches whom, in a line."""
    ours, theirs = (sum(p.numel() for p in vit.parameters()) / 1e6 for vit in (student, teacher.vit))
    return (
        f"teacher {teacher.name}: {theirs:.2f} M parameters, read after block {teacher.block} of "
        f"{len(teacher.vit.blocks)}; the student has {ours:.2f} M ({teacher.said[-1]})"
    )
