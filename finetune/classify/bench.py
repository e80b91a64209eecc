"""What all trainings of a run have in common, and what an approach to classification is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ...data.shards import ShardDataset
from ...engine.errors import RunFailed
from ...engine.metrics import Floats, Ints
from ...engine.signals import StopSignals
from ...pretrain.encoder import Encoder, normalisation
from .config import FinetuneConfig, FinetuneSection
from .labels import Labelled
from .reading import frame_logits
from .teacher import Teacher

Model = TypeVar("Model")


@dataclass(frozen=True)
class Bench:
    """Data, labels, the encoder as it was loaded, and the group of ranks."""

    settings: FinetuneConfig
    shards: ShardDataset
    labelled: Labelled
    encoder: Encoder
    accelerator: Accelerator
    signals: StopSignals
    cache: Path  # folder of features that are computed once
    teacher: Teacher | None = None

    @property
    def section(self) -> FinetuneSection:
        """The finetune section."""
        return self.settings.finetune

    @property
    def main(self) -> bool:
        """Whether this rank writes."""
        return self.accelerator.is_main_process

    def rows(self, images: Ints) -> Ints:
        """Rows of the data set."""
        return np.asarray(self.labelled.rows[images], np.int64)

    def gathered(self, images: Ints, judge: Callable[[Ints], Floats], *, alone: bool = False) -> Floats:
        """(j, w) logits of images, of which each rank judges its share, or with `alone` the main one all."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if world == 1:
            return judge(images)
        places = np.arange(len(images))
        places = places[rank::world] if not alone else places[: 0 if rank else None]
        found = np.zeros((len(images), self.labelled.target.width))
        if len(places):
            found[places] = judge(images[places])
        total = self.accelerator.reduce(torch.from_numpy(found).float().to(self.accelerator.device), "sum")
        return np.asarray(total.cpu().numpy(), np.float64)


class Approach(Protocol, Generic[Model]):
    """A way to a classifier: tuning an encoder, a probe of frozen features, attention over tiles."""

    @property
    def knob(self) -> str:
        """What is searched, for people."""
        ...

    @property
    def values(self) -> tuple[float, ...]:
        """The candidates, the mildest first."""
        ...

    def make(self, images: Ints, value: float, place: Path, seed: int, held: Ints | None = None) -> Model:
        """A classifier trained on some images; `held` ones may say which step was best."""
        ...

    def logits(self, model: Model, images: Ints) -> Floats:
        """(j, w) of any images."""
        ...

    def cost(self, model: Model) -> Mapping[str, Any]:
        """`trainable`, `head` and `adapter_bytes`."""
        ...


def refuse_not_finite(logits: Floats, place: Path) -> Floats:
    """Logits as they are.

    Raises:
        RunFailed: a model gives some that are no numbers.
    """
    if not np.isfinite(logits).all():
        raise RunFailed(f"{place}: the model gives logits that are not finite; lower finetune.search.lrs")
    return logits


def judge(bench: Bench, model: nn.Module, images: Ints) -> Floats:
    """(j, w) logits of images on this rank."""
    section, vit = bench.section, bench.encoder
    size, batch = vit.patch_embed.img_size, section.batch_size
    assert size is not None
    assert section.input != "tiles"
    return frame_logits(model, bench.shards, bench.rows(images), section.input, size, normalisation(vit), batch)
