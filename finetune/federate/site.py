"""A site: it has images, learns from them, and tells others only what it learnt.

    facts     once: images of each class, mean and spread of the frozen encoder's features, what learns at the start
    update    every round: what learns, after some steps on its own images

    PLACE/round-001-0123456789ab/    the training of a round, by its number and order

Legend: n training images, D features, k classes.
"""

from __future__ import annotations

import hashlib
import shutil
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import cast

import numpy as np
import torch

from ...engine.loop import Trainer
from ...engine.metrics import Floats, Ints
from ...engine.recipe import TrainSection
from ...engine.run import Run, read_metrics
from ...engine.schedule import learning_rate
from ...engine.seeding import stable_seed
from ..classify.bench import Bench, judge
from ..classify.head import StandardisedLinear
from ..classify.objective import Classify
from ..classify.probing import Probing
from ..classify.tuning import Tuning
from ..peft import METHODS, apply
from ..peft.base import Tuned, learnt
from ..peft.registry import describe
from .averaging import apply_residual, as_one_adapter, from_fixed
from .config import FederateSection
from .exchange import Facts, Order, OtherEncoder, Update, payload
from .proximal import Proximal
from .start import lowered, start_digest, started, values


@dataclass(frozen=True)
class Site:
    """One party. In a simulation all have the same bench, and different images of it.

    Attributes:
        name: what others call it.
        bench: data, labels, encoder.
        section: how the federation works.
        images: numbers of the labelled images that it trains on.
        place: folder for what it is doing.
    """

    name: str
    bench: Bench
    section: FederateSection
    images: Ints
    place: Path

    # ------------------------------------------------------------------------------------------ what it tells

    def facts(self) -> Facts:
        """The first message."""
        labelled, x = self.bench.labelled, self.seen
        truth, spread = labelled.truth[self.images], x - x.mean(0)
        several = labelled.target.kind == "multilabel"
        counts = truth.sum(0) if several else np.bincount(truth, minlength=len(labelled.target.classes))
        return Facts(
            site=self.name,
            base=self.base,
            start=start_digest(self.tuned()),
            examples=len(self.images),
            counts=torch.from_numpy(counts),
            mean=torch.from_numpy(x.mean(0)),
            m2=torch.from_numpy((spread**2).mean(0) * len(self.images)),
        )

    def train(self, order: Order) -> Update:
        """Some steps from where the federation stands.

        Raises:
            UserError: the federation stands on another encoder, or there are fewer images than a batch needs.
            RunFailed: the training failed.
            Preempted: stopped on a signal.
        """
        if order.base != self.base:
            raise OtherEncoder(f"the federation tunes another encoder ({order.base[:12]}, here {self.base[:12]})")
        objective = self.objective(order)
        run = Run(self.place / f"round-{order.round:03d}-{digest(order)}", "federate")
        recipe = self.recipe(order.round)
        seed = stable_seed(self.bench.settings.seed, "round", order.round) % 2**63
        stream = self.tuning.stream(np.sort(self.images), recipe.batch_size, seed)
        trainer = Trainer(
            run, objective, stream, recipe, seed, self.bench.accelerator, signals=self.bench.signals, quiet=True
        )
        trainer.fit()
        self.bench.accelerator.free_memory()
        loss = mean(line["loss"] for line in read_metrics(run.folder / "metrics.jsonl"))
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        return Update(self.name, self.base, order.round, values(objective.tuned), len(self.images), loss)

    # ------------------------------------------------------------------------------------------ the model

    @cached_property
    def base(self) -> str:
        """sha256 of the encoder."""
        return str(describe(self.bench.encoder)["digest"])

    @cached_property
    def tuning(self) -> Tuning:
        """The method on this bench."""
        return Tuning(self.bench, Probing(self.bench))

    @cached_property
    def seen(self) -> Floats:
        """(2n, D) features of the training images, as they are and as a training view shows them."""
        probing = self.tuning.probing
        return np.concatenate([probing.features[self.images], probing.augmented[self.images]])

    def tuned(self) -> Tuned:
        """The encoder with the method and a head, before anything was learnt."""
        bench = self.bench
        return started(bench.encoder, bench.section, bench.labelled.target, self.section.average, bench.settings.seed)

    def standing(self, order: Order) -> Tuned:
        """The federation's model as it stands."""
        tuned = self.tuned()
        head = cast(StandardisedLinear, tuned.head)
        head.mean, head.deviation = (order.fixed[f"head.{name}"].to(head.weight) for name in ("mean", "deviation"))
        with torch.no_grad():
            for name, tensor in learnt(tuned):
                tensor.copy_(order.tensors[name])
        apply_residual(tuned, from_fixed(order.fixed))
        return tuned

    def final(self, order: Order) -> Tuned:
        """The same as a model that stands on the encoder as it was: what was added to its weights is in the adapter."""
        tuned, residual = self.standing(order), from_fixed(order.fixed)
        for tensor in lowered(tuned):
            tensor.requires_grad_(True)
        head = cast(StandardisedLinear, tuned.head).plain()
        if residual:
            method, tensors = as_one_adapter(tuned.method, order.tensors, residual)
            tuned = apply(deepcopy(self.bench.encoder), tuned.name, **method.model_dump())
            with torch.no_grad():
                for name, tensor in learnt(tuned):
                    tensor.copy_(tensors[name])
        tuned.head = head
        return tuned.eval()

    def objective(self, order: Order) -> Classify:
        """What learns this round."""
        section, target = self.bench.section, self.bench.labelled.target
        weights = order.fixed["class_weights"].float() if section.balance == "weights" else None
        tuned = self.standing(order)
        objective = Proximal(tuned, target, weights, section.smoothing, section.mixup, mu=order.mu)
        if order.round == 1 and section.start == "probe":
            self.start_head(cast(StandardisedLinear, tuned.head))
        return objective

    @torch.no_grad()
    def start_head(self, head: StandardisedLinear) -> None:
        """Logistic regression on the site's own features, as `miram finetune` begins; the first round averages them."""
        own = self.tuning.probing.start(self.images).plain()
        head.weight.copy_(own.weight * head.deviation)
        head.bias.copy_(own.bias + own.weight.double() @ head.mean.double())

    def recipe(self, round: int) -> TrainSection:
        """How this round trains: at one rate, that which the schedule gives round number `round` of all."""
        train, section = self.bench.settings.train, self.section
        rate = learning_rate(
            round - 1,
            steps=section.rounds,
            warmup_steps=0,
            peak=self.peak,
            schedule=train.schedule,
            cooldown=train.cooldown,
            lr_floor=train.lr_floor,
        )
        local = self.tuning.recipe(rate, len(self.images))
        flat = {"schedule": "constant", "cooldown": 0.0, "warmup_steps": 0, "warmup_epochs": None}
        return local.model_copy(update=flat)

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        low, high = METHODS[self.bench.section.method].rates
        return self.section.lr or float(f"{np.sqrt(low * high):.3g}")

    def logits(self, order: Order, images: Ints) -> Floats:
        """(j, w) of images, by the federation's model as it stands."""
        return judge(self.bench, self.standing(order).eval(), images)


def digest(order: Order) -> str:
    """Names an order: what was begun of another one, of a federation that began again, must not be gone on with."""
    return hashlib.sha256(payload(order)).hexdigest()[:12]
