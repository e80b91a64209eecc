"""What is looked at while a pretraining runs, beside its losses: figures for the log, pictures for the report.

RUN/metrics.jsonl             rankme, probe/<task>, knn/<task> in the line of the step
RUN/figures/reconstructions.png, attention.png     of the newest look; of moco_v3 views.png and attention.png
RUN/figures/steps/NAME-00000120.png                of looks number 1, 2, 4, 8, …: few, however long the run
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import cast

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...data.config import DataSection
from ...data.opening import open_shards
from ...data.shards import ShardDataset
from ...data.stream import DAMAGED, FAULT, ViewDataset, collate
from ...engine.errors import UserError
from ...engine.files import write_atomic
from ...engine.objective import Batch, Objective
from ...engine.run import Run
from ...engine.step import OnDevice
from ..config import PretrainConfig
from ..miram import Miram
from .album import Album, spread
from .attention_maps import has_maps, picture_of_attention
from .drawing import Picture
from .pictures import picture_of_pairs, picture_of_reconstructions
from .probes import Labelled
from .rankme import rankme


class Monitors:
    """Looks at a pretraining every so many steps and at its end, on one process, and changes nothing of it.

    What it needs is read at the first look and kept: a look is forward passes, in fp32 and in eval mode.

    Args:
        settings: its `monitor` section says what to look at.
        model: the objective; its `encoder` is looked at.
        data: training images as views.
        run: where pictures go.

    Raises:
        UserError: the labelled data set is not usable, or has no such task or too few patients for it.
    """

    def __init__(self, settings: PretrainConfig, model: Objective, data: ViewDataset, run: Run):
        section = settings.monitor
        self.every, self.model, self.data, self.run = section.every, model, data, run
        self.encoder = cast(VisionTransformer, model.encoder)
        self.pictured = spread(len(data), section.pictures)
        shards = looked_at(settings, data.shards)
        self.labelled = None if section.task is None else Labelled.of(shards, section.task, section.images)
        rows = self.labelled.rows if self.labelled else spread(len(shards), section.images)
        self.album = Album(self.encoder, shards, rows)
        if not has_maps(self.encoder):
            kind = type(getattr(self.encoder.blocks[-1], "attn", self.encoder.blocks[-1])).__name__
            print(f"miram: no attention maps are drawn of an encoder with {kind}", file=sys.stderr, flush=True)

    def __call__(self, step: int) -> dict[str, float]:
        """`rankme`, and where a task is set `probe/<task>` and `knn/<task>`; the pictures of the step are drawn.

        Nothing of weights that are no numbers any more, at which the trainer stops by itself, or where no image can be
        read.
        """
        with undisturbed(self.model):
            features = self.album.features()
            if not features.size or not np.isfinite(features).all():
                return {}
            self.write(self.pictures(), step)
        figures = {"rankme": rankme(features)}
        return figures | (self.labelled(features, self.album.read) if self.labelled else {})

    def pictures(self) -> list[Picture]:
        """Those of the present weights."""
        batch = OnDevice(self.batch, next(self.encoder.parameters()).device).take()
        shown = (
            picture_of_reconstructions(self.model, batch) if isinstance(self.model, Miram) else picture_of_pairs(batch)
        )
        if not has_maps(self.encoder):
            return [shown]
        view = next(images for name, images in sorted(batch.items()) if name.startswith("view/"))
        return [shown, picture_of_attention(self.encoder, view)]

    def write(self, pictures: list[Picture], step: int) -> None:
        """Into RUN/figures; of looks 1, 2, 4, 8, … a copy stays."""
        figures = self.run.caption({f"{picture.name}.png": picture.caption for picture in pictures})
        look = step // self.every if self.every and step % self.every == 0 else 0
        for picture in pictures:
            png = picture.png()
            write_atomic(figures / f"{picture.name}.png", png)
            if look.bit_count() == 1:
                write_atomic(figures / "steps" / f"{picture.name}-{step:08d}.png", png)

    @cached_property
    def batch(self) -> Batch:
        """Views of the pictured images, as drawn in the first epoch."""
        batch = collate([self.data[i, 0] for i in self.pictured])
        if FAULT in batch:
            raise UserError(batch[FAULT])
        return {name: value for name, value in batch.items() if name != DAMAGED}


def looked_at(settings: PretrainConfig, training: ShardDataset) -> ShardDataset:
    """The data set that figures are of: `monitor.shards`, or training's own, maybe in another split.

    Raises:
        UserError: it is not usable.
    """
    section, data = settings.monitor, settings.data
    if section.shards is None and section.split in (None, data.split):
        return training
    wanted = {"split": section.split}
    own = section.shards is None
    try:
        return open_shards(data.model_copy(update=wanted) if own else DataSection(shards=section.shards, **wanted))
    except UserError as error:
        hint = "" if own else " (monitor.split=null takes all)"  # of training's own, null is what training uses
        said = str(error).replace(" (data.split=null takes all)", hint)
        raise UserError(f"monitor.{'split' if own else 'shards'}: {said}") from error


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, fp32 and no gradients inside; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
