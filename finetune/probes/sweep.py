"""Many linear heads in one pass: learning rates x layers x poolings, the best chosen on inner folds of patients.

As DINOv2 judges its encoders (Oquab et al. 2023, arXiv 2304.07193, appendix B): every head starts from N(0, 0.01), is
trained by SGD with momentum 0.9 and no decay, its learning rate falling to zero on a cosine, and all of them see the
same batches at the same time. Ours differs where few patients ask for it: features are standardised by what is trained
on, classes weighted to balance, and the best head of inner folds is trained again on all training patients.

With `probe.crops` a training step draws one of an image's cached crops; what is judged is always the mean over the
windows that cover the image. A head's start and batches depend on the seed alone, not on the heads beside it.

Legend: n images, v views, D features, h heads on one input, k classes, m judged images, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...engine.launch import device
from ...engine.metrics import Floats, Ints
from ...engine.seeding import generator
from ..config import Pool, ProbeSection
from ..features import Features
from ..task import Fold, Judgement, Task, choose, judge_folds

STEPS, BATCH = 500, 128
MOMENTUM, START = 0.9, 0.01

Input = tuple[int, Pool]  # block counted from the end, pooling


@dataclass(frozen=True)
class Head:
    """One linear head: what it reads and how fast it learns."""

    layer: int
    pool: Pool
    lr: float

    def __str__(self) -> str:
        return f"lr {self.lr:g}, block {self.layer}, {self.pool}"


@dataclass(frozen=True)
class Views:
    """One input of all images: (n, v, D) to train on and (n, D) to judge by."""

    trained: NDArray[np.float32]
    judged: NDArray[np.float32]


def judge(features: Features, task: Task, splits: Sequence[Fold], settings: ProbeSection, seed: int) -> Judgement:
    """Train all heads on each inner fold, the best again on the fold's training patients, and judge the others."""
    views = {(i, pool): read_views(features, i, pool, task.chosen, settings) for i, pool in inputs(settings)}
    heads = [Head(*read, lr) for read in views for lr in settings.lrs]

    def swept(fit: Ints, rest: Ints, riding: Sequence[Head]) -> Floats:
        return sweep(views, riding, task.truth, len(task.classes), fit, rest, seed)

    def fit_and_judge(fit: Ints, rest: Ints) -> tuple[Floats, str]:
        best = heads[choose(task, fit, settings.inner_folds, seed, lambda a, b: swept(a, b, heads))]
        return swept(fit, rest, [best])[0], str(best)

    return judge_folds(task, splits, fit_and_judge)


def inputs(settings: ProbeSection) -> list[Input]:
    """What the heads read: every layer in every pooling."""
    return [(layer, pool) for layer in settings.layers for pool in settings.pools]


def read_views(features: Features, layer: int, pool: Pool, rows: Ints, settings: ProbeSection) -> Views:
    """One input of the rows of the data set."""
    judged = features.pooled(layer, pool)[rows]
    return Views(features.crops(layer, pool)[rows] if settings.crops else judged[:, None], judged)


def sweep(
    views: Mapping[Input, Views], heads: Sequence[Head], truth: Ints, classes: int, fit: Ints, rest: Ints, seed: int
) -> Floats:
    """(heads, m, k) probabilities of the images `rest` by every head, trained on the images `fit`."""
    probabilities = np.empty((len(heads), len(rest), classes))
    for read in dict.fromkeys((head.layer, head.pool) for head in heads):
        places = [i for i, head in enumerate(heads) if (head.layer, head.pool) == read]
        x, asked = standardised(views[read], fit, rest)
        lrs = torch.tensor([heads[i].lr for i in places])
        weight = train(x, torch.from_numpy(truth[fit]), classes, lrs, seed)
        found = torch.einsum("md,dhk->hmk", asked, weight).softmax(-1)
        probabilities[places] = found.double().cpu().numpy()
    return probabilities


def standardised(views: Views, fit: Ints, rest: Ints) -> tuple[Tensor, Tensor]:
    """(n, v, D+1) to train on and (m, D+1) to judge, by mean and deviation of the former; a constant is the bias."""
    x = views.trained[fit]
    mean, deviation = x.mean((0, 1), dtype=np.float64), x.std((0, 1), dtype=np.float64)
    shift, scale = mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)
    scaled = (torch.from_numpy((part - shift) / scale) for part in (x, views.judged[rest]))
    first, second = (F.pad(part, (0, 1), value=1).to(device()) for part in scaled)
    return first, second


def train(x: Tensor, truth: Tensor, classes: int, lrs: Tensor, seed: int) -> Tensor:
    """(D+1, h, k) weights of h heads after SGD on (n, v, D+1) views of (n,) classes.

    The gradient of the weighted cross-entropy is written out: x^T (softmax - one-hot), images weighted.
    """
    n, v, d = x.shape
    weights = (n / (classes * truth.bincount(minlength=classes).clamp(min=1))).float().to(x.device)
    answers, truth, lrs = F.one_hot(truth, classes).float().to(x.device), truth.to(x.device), lrs.to(x.device)
    start = generator(seed, "sweep", "start").normal(scale=START, size=(d, 1, classes))
    start[-1] = 0  # the bias
    weight = torch.from_numpy(start).float().to(x.device).repeat(1, len(lrs), 1)
    velocity = torch.zeros_like(weight)
    for step, (images, crops) in enumerate(zip(*draws(n, v, seed), strict=True)):
        batch, share = x[images, crops], weights[truth[images]]
        logits = (batch @ weight.flatten(1)).view(-1, *weight.shape[1:])
        error = (logits.softmax(-1) - answers[images][:, None]) * (share / share.sum())[:, None, None]
        velocity = MOMENTUM * velocity + (batch.T @ error.flatten(1)).view_as(weight)
        weight -= (lrs * 0.5 * (1 + math.cos(math.pi * step / STEPS)))[:, None] * velocity
    return weight


def draws(n: int, v: int, seed: int) -> tuple[Tensor, Tensor]:
    """(steps, B) images and (steps, B) views of them: every image once an epoch, a view at random."""
    rng, batch = generator(seed, "sweep", "order"), min(BATCH, n)
    epochs = math.ceil(STEPS * batch / n)
    order = np.concatenate([rng.permutation(n) for _ in range(epochs)])[: STEPS * batch]
    views = generator(seed, "sweep", "views").integers(v, size=order.shape)
    return torch.from_numpy(order.reshape(STEPS, batch)), torch.from_numpy(views.reshape(STEPS, batch))
