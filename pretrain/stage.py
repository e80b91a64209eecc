"""The pretraining stage: configuration in, run folder with an encoder out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from accelerate import Accelerator

from ..data.augment import TwoViews
from ..data.opening import open_shards
from ..data.shards import ShardDataset
from ..data.stream import EpochStream, ViewDataset
from ..data.views import MultiScaleViews
from ..engine.config import load
from ..engine.errors import RunFailed
from ..engine.guard import OutOfMemory
from ..engine.launch import make_accelerator, together
from ..engine.loop import Trainer
from ..engine.objective import Objective
from ..engine.parallel import Twin, needs_twin
from ..engine.run import Run, open_run
from ..engine.signals import StopSignals
from ..engine.trackers import require_installed, shareable
from .build import PretrainObjective, build_objective, build_views, encoder_card
from .config import PretrainConfig
from .encoder import Encoder, EncoderCard, save_encoder
from .moco_v3 import refuse_accumulation
from .monitors import Monitors
from .rehearsal import advice, rehearse
from .weights.loading import encoder_digest


def pretrain(
    config: str, arguments: Sequence[str] = (), *, dry_run: bool = False, signals: StopSignals | None = None
) -> Run:
    """`miram pretrain CONFIG --a.b=value …`, as the only rank or as one of many.

    Args:
        dry_run: build everything, take one step, print what it cost, and leave nothing.
        signals: those that came before this was called.

    Raises:
        UserError: configuration, data or run folder are not usable.
        Preempted: stopped on a signal with a checkpoint on disk.
        RunFailed: the loss became infinite or not a number, memory ran out, or the disk is full.
    """
    return follow(Course(load(PretrainConfig, config, arguments)), dry_run=dry_run, signals=signals)


class Course:
    """What a pretraining is made of; another stage that trains an encoder overrides what differs."""

    stage = "pretrain"

    def __init__(self, settings: PretrainConfig):
        self.settings = settings

    def check(self, accelerator: Accelerator) -> None:
        """Refuse what this many ranks cannot do."""
        if self.settings.objective == "moco_v3":
            refuse_accumulation(self.settings.train, accelerator.num_processes)

    def card(self, shards: ShardDataset) -> EncoderCard:
        """What the encoder will say of itself."""
        return encoder_card(self.settings, shards)

    def build(self, card: EncoderCard) -> tuple[Objective, list[str]]:
        """What learns, with its `encoder`, and lines on where its weights come from."""
        return build_objective(self.settings, card)

    def views(self, card: EncoderCard, objective: Objective) -> MultiScaleViews | TwoViews:
        """What it is shown of an image."""
        return build_views(self.settings, card, cast(PretrainObjective, objective))

    def monitors(self, objective: Objective, data: ViewDataset, run: Run) -> Monitors:
        """What is looked at on the way."""
        return Monitors(self.settings, objective, data, run)

    def inputs(self, shards: ShardDataset) -> Mapping[str, str]:
        """Digests of what a run reads, which must be the same when it is taken up again."""
        return shards.inputs | ({"init": encoder_digest(self.settings.init)} if self.settings.init else {})

    def rehearse(self, trainer: Trainer) -> None:
        """A step that leaves nothing, and what it cost."""
        rehearse(self.settings, trainer)

    def advice(self, accelerator: Accelerator) -> str:
        """What would have fitted into memory."""
        return advice(self.settings, accelerator)


def follow(course: Course, *, dry_run: bool = False, signals: StopSignals | None = None) -> Run:
    """Train an encoder from its first step, or from where its run folder has got to; see `pretrain`."""
    settings = course.settings
    require_installed(settings.train.trackers)
    accelerator = make_accelerator(settings.train.deterministic)
    course.check(accelerator)
    shards = open_shards(settings.data)
    card = course.card(shards)
    objective, said = course.build(card)
    views = course.views(card, objective)
    skip = settings.data.on_damage == "skip"
    stream = EpochStream(shards, views, settings.train.batch_size, settings.seed, settings.data.workers, skip=skip)
    run = Run(Path(settings.out), course.stage)
    twin = Twin(objective, accelerator, needed=needs_twin(settings.train, accelerator))
    monitors = course.monitors(cast(Objective, twin.model), stream.dataset, run)
    told = shareable(settings.model_dump())
    trainer = Trainer(run, objective, stream, settings.train, settings.seed, accelerator, monitors, twin, told, signals)

    def begin() -> None:
        if accelerator.is_main_process:
            # The first thing written: all that can be refused has been.
            open_run(settings, settings.out, course.stage, course.inputs(shards), writes=not dry_run)
            tell(said, views, shards, accelerator)

    together(accelerator, begin)
    with advising(course, accelerator):
        if run.finished:
            accelerator.print(f"{run.folder} is finished; nothing to do")
        elif dry_run:
            course.rehearse(trainer)
        else:
            train(trainer, card)
    accelerator.end_training()
    return run


def train(trainer: Trainer, card: EncoderCard) -> None:
    """To the last step, and the encoder into the run folder."""
    run, accelerator = trainer.run, trainer.accelerator
    with run.recorded(writes=accelerator.is_main_process):
        trainer.fit()
        if accelerator.is_main_process:
            trained = replace(card, provenance={**card.provenance, "steps": trainer.step})
            save_encoder(run.folder, cast(Encoder, trainer.twin.model.encoder), trained)
    accelerator.wait_for_everyone()
    accelerator.print(f"encoder: {run.folder / 'encoder.safetensors'}")


@contextmanager
def advising(course: Course, accelerator: Accelerator) -> Iterator[None]:
    """Where memory runs out, say what would fit.

    Raises:
        RunFailed: it did.
    """
    try:
        yield
    except OutOfMemory as error:
        print(f"miram: {error}; counting what would fit …", file=sys.stderr, flush=True)
        raise RunFailed(f"{error}; {course.advice(accelerator)}") from error


def tell(
    said: Sequence[str], views: MultiScaleViews | TwoViews, shards: ShardDataset, accelerator: Accelerator
) -> None:
    """Say what `init` gave, and how many training crops hold fewer pixels than the finest view asks for."""
    for line in said:
        accelerator.print(f"miram: {line}")
    if not isinstance(views, MultiScaleViews):
        return
    sizes = [(int(row["height"]), int(row["width"])) for row in shards.rows[:500]]
    share = float(np.mean([views.enlarges(size, number) for number, size in enumerate(sizes)]))
    if share > 0.1:
        accelerator.print(
            f"miram: about {share:.0%} of the crops are coarser than scale {max(views.scales)} and get enlarged; "
            "for real detail raise crop.area, lower model.image_size, or ingest finer images"
        )
