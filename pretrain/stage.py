"""The pretraining stage: configuration in, run folder with an encoder out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..data.opening import open_shards
from ..data.shards import ShardDataset
from ..data.stream import FAULT, EpochStream, ViewDataset, collate
from ..data.views import MultiScaleViews, Normalisation
from ..engine.config import dump_yaml, load
from ..engine.errors import UserError
from ..engine.launch import make_accelerator
from ..engine.loop import Trainer, to_device
from ..engine.run import Run, open_run
from ..engine.seeding import stable_seed
from ..version import __version__
from .config import ModelSection, PretrainConfig, ScaleSection
from .encoder import EncoderCard, build_encoder, card_for, save_encoder
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
    model = build_model(settings.model, card, settings.seed)
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


def encoder_card(settings: PretrainConfig, shards: ShardDataset) -> EncoderCard:
    """What the encoder will say of itself: shape, normalisation, and what it was trained on and how."""
    options = {"in_chans": shards.channels} | settings.model.encoder_options
    card = card_for(settings.model.encoder, settings.model.size, options)
    if card.kwargs["in_chans"] != shards.channels:
        raise UserError(
            f"model.encoder_options.in_chans is not the {shards.channels} channels of data.shards; leave it out"
        )
    mean, std = shards.pixel_statistics
    provenance = {
        "miram": __version__,
        "objective": settings.objective,
        "data": [{k: m[k] for k in ("dataset", "licence", "records")} for m in shards.manifests],
        "split": settings.data.split,
        "split_digest": shards.split_digest,
        "fold": settings.data.fold,
        "images": len(shards),
        "config_sha256": hashlib.sha256(dump_yaml(settings).encode()).hexdigest(),
    }
    return replace(card, mean=(mean,) * shards.channels, std=(std,) * shards.channels, provenance=provenance)


def build_model(section: ModelSection, card: EncoderCard, seed: int) -> Miram:
    """The model with the weights that this seed gives it.

    Raises:
        UserError: the image does not divide into patches, or too few patches would stay visible.
    """
    torch.manual_seed(stable_seed(seed, "weights") % 2**63)
    encoder = build_encoder(card)
    patch = encoder.patch_embed.patch_size[0]
    if any(side % patch for side in section.size):
        raise UserError(
            f"model.image_size {list(section.size)} must be multiples of the encoder's patches of {patch} pixels"
        )
    if int(encoder.patch_embed.num_patches * (1 - section.mask_ratio)) < 1:
        raise UserError(
            f"model.mask_ratio {section.mask_ratio} leaves none of {encoder.patch_embed.num_patches} patches visible"
        )
    scales = [with_backend(scale, section.attention_backend) for scale in section.scales]
    return Miram(encoder, scales, section.mask_ratio, section.norm_pix, section.variance_floor)


def with_backend(scale: ScaleSection, backend: str) -> ScaleSection:
    """Softmax decoders take the model's backend where they name none of their own."""
    if scale.attention != "softmax":
        return scale
    return scale.model_copy(update={"options": {"backend": backend, **scale.options}})


def build_views(settings: PretrainConfig, card: EncoderCard, model: Miram) -> MultiScaleViews:
    """Crops at every scale a decoder wants, and at scale 1 for the encoder."""
    return MultiScaleViews(
        size=settings.model.size,
        scales=sorted({1, *(section.scale for section in model.scales)}),
        patches=model.grid[0] * model.grid[1],
        crop=settings.crop,
        normalise=Normalisation(card.mean[0], card.std[0]),
        seed=settings.seed,
    )


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
