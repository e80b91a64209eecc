"""Tuning an encoder, all of it or the little that a method adds, with the engine's trainer.

PLACE/metrics.jsonl     of this one training
PLACE/checkpoints/      while it lasts; a start that was stopped goes on from them
PLACE/best.safetensors  and best.json {"schema", "step", "score"}: with finetune.keep=best, the best look so far
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...data.frames import TrainFrames
from ...data.stream import BalancedStream, EpochStream
from ...engine.errors import UserError
from ...engine.files import read_json, write_json
from ...engine.loop import Trainer
from ...engine.metrics import Floats, Ints
from ...engine.parallel import Twin, needs_twin
from ...engine.recipe import TrainSection
from ...engine.run import Run
from ...engine.tensors import read_into
from ...pretrain.encoder import normalisation
from ..peft import METHODS, apply
from ..peft.base import Tuned, learnt, write_all
from .bench import Bench, judge
from .head import StandardisedLinear
from .objective import Classify, LabelledFrames, set_drop_path
from .probing import Probing
from .scores import headline_score

BEST = "miram.best/1"
LOOKS = 10  # of keep=best: how often the held-out part is looked at


@dataclass(frozen=True)
class Tuning:
    """A method of finetune/peft, trained on augmented frames."""

    bench: Bench
    probing: Probing
    knob = "learning rate"

    @property
    def values(self) -> tuple[float, ...]:
        """Those asked for, or so many of the method's own range."""
        return rates(self.bench, METHODS[self.bench.section.method].rates)

    def fresh(self, seed: int) -> Tuned:
        """The encoder as it was loaded, with the method on it.

        Raises:
            UserError: the method cannot stand on this encoder.
        """
        bench, section = self.bench, self.bench.section
        torch.manual_seed(seed)
        vit = deepcopy(bench.encoder)
        if section.drop_path:
            set_drop_path(vit, section.drop_path)
        return apply(vit, section.method, **section.options).train()

    def make(self, images: Ints, value: float, place: Path, seed: int, held: Ints | None = None) -> Tuned:
        """Train on augmented frames; a training that was stopped goes on."""
        bench, images = self.bench, np.sort(images)
        train = self.recipe(value, len(images))
        objective = self.objective(images, seed)
        twin = Twin(objective, bench.accelerator, needed=needs_twin(train, bench.accelerator) or self.choosy(held))
        looks = Looks(self, twin, held, place) if held is not None and self.choosy(held) else None
        stream = self.stream(images, train.batch_size, seed)
        run = Run(place, "finetune")
        trainer = Trainer(
            run, objective, stream, train, seed, bench.accelerator, looks, twin, signals=bench.signals, quiet=True
        )
        if looks:
            looks.every = max(1, trainer.steps // LOOKS)
        trainer.fit()
        model: Classify = twin.model  # type: ignore[assignment]
        if looks and bench.main:
            looks.take(model)
        bench.accelerator.free_memory()
        if bench.main:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        model.tuned.head = cast(StandardisedLinear, model.tuned.head).plain()
        return model.tuned.eval()

    def choosy(self, held: Ints | None) -> bool:
        """Whether the best look counts, so that the main process alone has the model."""
        return self.bench.section.keep == "best" and held is not None

    def recipe(self, rate: float, images: int) -> TrainSection:
        """The train section at a peak learning rate; few images make small batches.

        Raises:
            UserError: there are fewer images than ranks.
        """
        train, world = self.bench.settings.train, self.bench.accelerator.num_processes
        unit = world * (train.micro_batch or 1)
        batch = min(train.batch_size, images // unit * unit)
        if not batch:
            raise UserError(f"{images} training images do not fill a batch of {unit}; use fewer ranks or more patients")
        return train.model_copy(update={"batch_size": batch, "blr": rate * 256 / batch})

    def objective(self, images: Ints, seed: int) -> Classify:
        """What learns."""
        section, labelled = self.bench.section, self.bench.labelled
        weights = labelled.target.class_weights(labelled.truth[images]) if section.balance == "weights" else None
        tuned = self.fresh(seed)
        tuned.head = self.head(images).to(next(tuned.model.parameters()))
        return Classify(tuned, labelled.target, weights, section.smoothing, section.mixup, self.bench.teacher)

    def head(self, images: Ints) -> StandardisedLinear:
        """Over features as the frozen encoder has them; from logistic regression on them (LP-FT, Kumar et al. 2022),
        or from zero."""
        if self.bench.section.start == "probe":
            return self.probing.start(images)
        both = np.concatenate([self.probing.features[images], self.probing.augmented[images]])
        return StandardisedLinear.of(both, self.bench.labelled.target.width)

    def stream(self, images: Ints, batch_size: int, seed: int) -> EpochStream:
        """Augmented frames of images, in ascending order of their rows, and their labels."""
        bench, section, labelled = self.bench, self.bench.section, self.bench.labelled
        size, normalise = bench.encoder.patch_embed.img_size, normalisation(bench.encoder)
        assert size is not None
        assert section.input != "tiles"
        frames = TrainFrames(size, section.input, section.augment, normalise, seed)
        truth = {str(labelled.keys[i]): torch.as_tensor(labelled.truth[i]) for i in images}
        data = bench.settings.data
        shards, view = bench.shards.subset(bench.rows(images)), LabelledFrames(frames, truth)
        skip = data.on_damage == "skip"
        if section.balance == "sampler":
            classes = labelled.strata.truth[images]
            return BalancedStream(shards, view, batch_size, seed, data.workers, classes=classes, skip=skip)
        return EpochStream(shards, view, batch_size, seed, data.workers, skip=skip)

    def logits(self, model: Tuned, images: Ints) -> Floats:
        """(j, w) of any images."""
        train = self.bench.settings.train
        alone = needs_twin(train, self.bench.accelerator) or self.bench.section.keep == "best"
        return self.bench.gathered(images, lambda some: judge(self.bench, model, some), alone=alone)

    def cost(self, model: Tuned) -> Mapping[str, Any]:
        """How much learns, and how much of it a file holds."""
        tensors = [*model.method.contents(model.model).values(), *model.head.state_dict().values()]
        written = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return {"trainable": model.trainable, "head": model.head_parameters, "adapter_bytes": written}


def rates(bench: Bench, bounds: tuple[float, float]) -> tuple[float, ...]:
    """The candidates that were asked for, or as many of a range, on a logarithmic scale; ascending."""
    search = bench.section.search
    if search.lrs is not None:
        return tuple(sorted(search.lrs))
    if search.trials == 1:
        return (float(np.sqrt(bounds[0] * bounds[1])),)
    return tuple(float(f"{value:.3g}") for value in np.geomspace(*bounds, search.trials))


class Looks:
    """A monitor that scores the held-out part now and then, and keeps the weights of the best look on disk."""

    def __init__(self, tuning: Tuning, twin: Twin, held: Ints, place: Path):
        self.tuning, self.twin, self.held, self.place = tuning, twin, held, place
        self.every: int | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Score, and write the weights if they are the best so far; of equals the earlier ones."""
        model: Classify = self.twin.model  # type: ignore[assignment]
        labelled = self.tuning.bench.labelled
        score = headline_score(labelled, self.held, judge(self.tuning.bench, model.tuned, self.held))
        score = -1.0 if np.isnan(score) else score  # of a held-out part that lacks a class, the first look
        card = self.place / "best.json"
        known = read_json(card, BEST) if card.exists() else None
        if known is None or score > known["score"] or step == known["step"]:
            write_all(self.place / "best.safetensors", self.learning(model))
            write_json(card, BEST, {"step": step, "score": score})
        return {"held_out": score}

    def take(self, model: Classify) -> None:
        """Give a model the weights of the best look."""
        with torch.no_grad():
            read_into(self.place / "best.safetensors", self.learning(model).items())

    @staticmethod
    def learning(model: Classify) -> dict[str, Tensor]:
        """What learns, by name."""
        return {name: tensor.detach() for name, tensor in learnt(model.tuned)}
