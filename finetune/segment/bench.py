"""What all trainings of a run have in common, and how a model is made and trained."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from ...data.crops import Resolution, TrainCrops
from ...data.shards import ShardDataset
from ...data.stream import BalancedStream, EpochStream
from ...data.views import Normalisation
from ...engine.errors import UserError
from ...engine.loop import Trainer
from ...engine.metrics import Ints
from ...engine.parallel import Twin, needs_twin
from ...engine.recipe import TrainSection
from ...engine.run import Run
from ...engine.signals import StopSignals
from ...pretrain.encoder import Encoder, normalisation
from ..classify.objective import set_drop_path
from ..peft import apply
from .config import SegmentConfig, SegmentSection
from .inference import Reading
from .models import build
from .objective import Segment
from .taps import trimmed
from .target import Asked

FROZEN = "frozen"  # what `method: linear` is called where no linear head follows
SIDE = 256  # of a tile, for networks without an encoder


@dataclass(frozen=True)
class Bench:
    """Data, what is asked of it, the encoder as it was loaded, and the group of ranks."""

    settings: SegmentConfig
    shards: ShardDataset
    asked: Asked
    encoder: Encoder | None
    accelerator: Accelerator
    signals: StopSignals

    @property
    def section(self) -> SegmentSection:
        """The segment section."""
        return self.settings.segment

    @property
    def main(self) -> bool:
        """Whether this rank writes."""
        return self.accelerator.is_main_process

    @property
    def only_main(self) -> bool:
        """Whether the main process alone has a trained model, so that it judges all."""
        return needs_twin(self.settings.train, self.accelerator)

    def total(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts of all ranks; those of an image are exact in float64."""
        summed = self.accelerator.reduce(torch.from_numpy(counts).double().to(self.accelerator.device), "sum")
        return np.asarray(summed.cpu().numpy(), np.int64)

    def rows(self, images: Ints) -> Ints:
        """Rows of the data set."""
        return np.asarray(self.asked.task.chosen[images], np.int64)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a tile."""
        if self.encoder is not None:
            size: tuple[int, int] = self.encoder.patch_embed.img_size
            return size
        asked = self.section.image_size or SIDE
        return (asked, asked) if isinstance(asked, int) else asked

    @property
    def resolution(self) -> Resolution:
        """What tiles are cut at."""
        return Resolution(self.section.mm_per_pixel, self.section.long_side)

    @cached_property
    def normalise(self) -> Normalisation:
        """Of pixels: the encoder's, or the data set's own."""
        return normalisation(self.encoder) if self.encoder is not None else Normalisation(*self.shards.pixel_statistics)

    @property
    def reading(self) -> Reading:
        """How a model of this run reads an image."""
        section = self.section
        flips = allowed_flips(self.shards, section)
        return Reading(self.size, self.resolution, self.normalise, section.overlap, flips, section.batch_size)

    def check_resolution(self) -> None:
        """Refuse images that cannot be seen at the resolution.

        Raises:
            UserError: how many, and why the first.
        """
        faults, every = [], np.arange(len(self.asked.keys))
        for shape, spacing in self.measures(every):
            try:
                self.resolution.raster(shape, spacing)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise UserError(
                f"segment.mm_per_pixel={self.section.mm_per_pixel}: {len(faults)} of {len(every)} images cannot be "
                f"seen so; of the first, {faults[0]}"
            )

    def longer_sides(self, images: Ints) -> list[int]:
        """Of the rasters of images."""
        return [max(self.resolution.raster(shape, spacing)) for shape, spacing in self.measures(images)]

    def measures(self, images: Ints) -> Iterator[tuple[tuple[int, int], float | None]]:
        """Height and width of stored images, and their spacing."""
        rows = self.shards.rows.take(self.rows(images))
        columns = (rows.column(name) for name in ("height", "width", "spacing_mm"))
        for height, width, spacing in zip(*columns, strict=True):
            yield (int(height), int(width)), float(spacing) if spacing else None

    def fresh(self, seed: int) -> nn.Module:
        """A model that has learnt nothing but what its encoder knows.

        Raises:
            UserError: there is no such model, or method, or options that it takes.
        """
        section = self.section
        torch.manual_seed(seed)
        tuned = None
        if self.encoder is not None:
            vit = trimmed(deepcopy(self.encoder), section.model_options.get("layers"))
            if section.drop_path:
                set_drop_path(vit, section.drop_path)
            tuned = apply(vit, "linear" if section.method == FROZEN else section.method, **section.options)
        target, zeroed = self.asked.target, section.control == "zeroed"
        of = self.shards.channels, len(target.classes)
        return build(section.model, section.model_options, tuned, *of, zeroed, rare=target.lesions).train()

    def make(self, images: Ints, place: Path, seed: int) -> nn.Module:
        """A model trained on some images; one that was stopped goes on, and its checkpoints are left."""
        images = np.sort(images)
        train = self.recipe(len(images))
        objective = Segment(self.fresh(seed), self.section.loss, self.section.dice)
        twin = Twin(objective, self.accelerator, needed=self.only_main)
        run, stream = Run(place, "segment"), self.stream(images, train.batch_size, seed)
        Trainer(
            run, objective, stream, train, seed, self.accelerator, twin=twin, signals=self.signals, quiet=True
        ).fit()
        self.accelerator.free_memory()
        if not self.only_main:
            share_buffers(objective, self.accelerator)
        return cast(Segment, twin.model).model.eval()

    def recipe(self, images: int) -> TrainSection:
        """The train section; few images make small batches.

        Raises:
            UserError: there are fewer images than ranks.
        """
        train, world = self.settings.train, self.accelerator.num_processes
        unit = world * (train.micro_batch or 1)
        batch = min(train.batch_size, images // unit * unit)
        if not batch:
            raise UserError(f"{images} training images do not fill a batch of {unit}; use fewer ranks or more patients")
        return train.model_copy(update={"batch_size": batch, "blr": train.blr * train.batch_size / batch})

    def stream(self, images: Ints, batch_size: int, seed: int) -> EpochStream:
        """Crops of images, in ascending order of their rows. Images with a finding come as often as those without."""
        section, data, target = self.section, self.settings.data, self.asked.target
        positive = self.asked.task.truth[images]
        mixed = target.lesions and len(np.unique(positive)) > 1
        centred = min(1.0, section.foreground / (0.5 if mixed else 1.0))
        crops = TrainCrops(
            self.size,
            self.resolution,
            section.augment,
            self.normalise,
            target.lookup,
            centred=centred,
            avoid=target.lesions,
            seed=seed,
        )
        shards, skip = self.shards.subset(self.rows(images)), data.on_damage == "skip"
        if mixed:
            return BalancedStream(shards, crops, batch_size, seed, data.workers, classes=positive, skip=skip)
        return EpochStream(shards, crops, batch_size, seed, data.workers, skip=skip)


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every rank the main one's running statistics: DDP does so before a step only, and all are to judge alike."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def allowed_flips(shards: ShardDataset, section: SegmentSection) -> tuple[tuple[int, ...], ...]:
    """Dimensions to flip in further looks: upside down, and mirrored where ingest did not put the chest wall left.

    Only what training views did, too.
    """
    if not section.flip_average:
        return ()
    sided = all(manifest.get("preprocessing", {}).get("breast") for manifest in shards.manifests)
    down = ((-2,),) if section.augment.upside_down else ()
    across = ((-1,),) if section.augment.flip and not sided else ()
    return down + across


def parameters(model: nn.Module) -> dict[str, int]:
    """How many numbers of a model learn, of how many."""
    learn = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    return {"trainable": learn, "parameters": sum(tensor.numel() for tensor in model.parameters())}
