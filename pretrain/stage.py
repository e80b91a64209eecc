"""The pretraining stage: configuration in, run folder with an encoder out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from ..data.opening import open_shards
from ..data.shards import ShardDataset
from ..data.stream import FAULT, EpochStream, ViewDataset, collate
from ..data.views import MultiScaleViews
from ..engine.config import load
from ..engine.errors import UserError
from ..engine.launch import make_accelerator
from ..engine.loop import Trainer, to_device
from ..engine.run import Run, open_run
from .build import build_miram, build_views, encoder_card, seeded_encoder
from .config import PretrainConfig
from .encoder import EncoderCard, save_encoder
from .miram import Miram
from .monitors import caption, draw_reconstructions

PICTURED = 4  # images in the reconstruction figure


def pretrain(config: str, arguments: Sequence[str] = ()) -> Run:
    """`miram pretrain CONFIG --a.b=value …`, as the only rank or as one of many.

    Raises:
        UserError: configuration, data or run folder are not usable.
        Preempted: stopped on a signal with a checkpoint on disk.
        RunFailed: the loss became infinite or not a number.
    """
    settings = load(PretrainConfig, config, arguments)
    accelerator = make_accelerator(settings.train.precision)
    shards = open_shards(settings.data)
    card = encoder_card(settings, shards)
    model = build_miram(settings.model, seeded_encoder(settings, card))
    views = build_views(settings, card, model)
    skip = settings.data.on_damage == "skip"
    stream = EpochStream(shards, views, settings.train.batch_size, settings.seed, settings.data.workers, skip=skip)
    run = Run(Path(settings.out), "pretrain")
    trainer = Trainer(run, model, stream, settings.train, settings.seed, accelerator)
    if accelerator.is_main_process:
        # The first thing written: all that can be refused has been.
        open_run(settings, settings.out, "pretrain", shards.inputs)
        warn_of_enlarged(views, shards, accelerator)
    accelerator.wait_for_everyone()
    if run.finished:
        accelerator.print(f"{run.folder} is finished; nothing to do")
        return run
    with run.recorded(writes=accelerator.is_main_process):
        trainer.fit()
        if accelerator.is_main_process:
            finish(run, model, card, stream.dataset, trainer.step)
    accelerator.wait_for_everyone()
    accelerator.print(f"encoder: {run.folder / 'encoder.safetensors'}")
    accelerator.end_training()
    return run


def warn_of_enlarged(views: MultiScaleViews, shards: ShardDataset, accelerator: Accelerator) -> None:
    """Say how many training crops hold fewer pixels than the finest view asks for: their detail is not real."""
    sizes = [(int(row["height"]), int(row["width"])) for row in shards.rows[:500]]
    share = float(np.mean([views.enlarges(size, number) for number, size in enumerate(sizes)]))
    if share > 0.1:
        accelerator.print(
            f"miram: about {share:.0%} of the crops are coarser than scale {max(views.scales)} and get enlarged; "
            "for real detail raise crop.area, lower model.image_size, or ingest finer images"
        )


def finish(run: Run, model: Miram, card: EncoderCard, data: ViewDataset, step: int) -> None:
    """Write the encoder and the pictures."""
    trained = replace(card, provenance={**card.provenance, "steps": step})
    save_encoder(run.folder, model.encoder, trained)
    figures = run.caption({"reconstructions.png": caption(model)})
    chosen = [i * len(data) // PICTURED for i in range(min(PICTURED, len(data)))]
    batch = collate([data[i, 0] for i in chosen])
    if FAULT in batch:
        raise UserError(batch[FAULT])
    device = next(model.parameters()).device
    draw_reconstructions(model.eval(), to_device(batch, device), figures / "reconstructions.png")
