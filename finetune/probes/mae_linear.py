"""The linear probe of masked autoencoders, for figures beside published ones (He et al. 2022, arXiv 2111.06377, A.2).

BatchNorm without affine, then one linear layer: N(0, 0.01) cut off at 2, LARS with momentum 0.9, a trust ratio of 0.001
on the weights and none on the bias, no decay; blr 0.1 at a batch of 16,384, so lr 6.4; 90 epochs, 10 of them warm-up,
then a cosine. Nothing is chosen. The feature is that of the last block, pooled as `probe.pool` says; theirs is `cls`.
With `probe.crops` it is trained on an image's crops, as theirs is, and else on the mean over its windows.

Ours differs in two places. A set smaller than a batch makes one step an epoch, of all its images, each as often as it
has views (a crop each; one, where it has no crops) or as a batch holds them all, and the rate is the published one, not
scaled down to that step. LARS moves a weight by a share of its length, so scaled down to a hundred images lr would
leave it where it began. And classes are weighted to balance, which changes nothing where they are balanced, as there.

Legend: n images, v views, D features, k classes, m judged images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.launch import device
from ...engine.metrics import Floats, Ints
from ...engine.schedule import scaled_lr, warmup_cosine
from ...engine.seeding import generator, stable_seed
from ..config import ProbeSection
from ..features import Features
from ..task import Fold, Judgement, Task, judge_folds
from .sweep import Views, read_views

BLR, BATCH = 0.1, 16384
EPOCHS, WARMUP = 90, 10
MOMENTUM, TRUST, START = 0.9, 0.001, 0.01


def judge(features: Features, task: Task, splits: Sequence[Fold], settings: ProbeSection, seed: int) -> Judgement:
    """Train on each fold's training patients, judge the others."""
    views = read_views(features, -1, settings.pool, task.chosen, settings)

    def fit_and_judge(fit: Ints, rest: Ints) -> tuple[Floats, str]:
        probe = train(views, task.truth, fit, len(task.classes), seed)
        return predict(probe, views, rest), f"lr {scaled_lr(BLR, BATCH):g}, {EPOCHS} epochs"

    return judge_folds(task, splits, fit_and_judge)


def new_probe(dim: int, classes: int, seed: int) -> nn.Sequential:
    """The same arguments give the same start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "mae_linear") % 2**63)
        head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(head.weight, std=START)
        nn.init.zeros_(head.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), head)


def lars(head: nn.Linear) -> torch.optim.Optimizer:
    """The rate adapts to the length of the weights though nothing decays, and not to that of the bias."""
    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias], "always_adapt": False}]
    return Lars(groups, momentum=MOMENTUM, trust_coeff=TRUST)


def train(views: Views, truth: Ints, fit: Ints, classes: int, seed: int) -> nn.Sequential:
    """The probe of the images `fit`, which alone are in its statistics.

    Args:
        views: of all images.
        truth: (n,) classes of all images.
        fit: images to train on.
        classes: k.
        seed: of the start, of the order of images and of their views.
    """
    x, y = torch.from_numpy(views.trained[fit]).to(device()), torch.from_numpy(truth[fit]).to(device())
    weights = (len(y) / (classes * y.bincount(minlength=classes).clamp(min=1))).float()
    probe = new_probe(x.shape[2], classes, seed).to(device()).train()
    head = probe[1]
    assert isinstance(head, nn.Linear)
    optimizer, batches = lars(head), list(draws(len(x), x.shape[1], seed))
    for step, (images, of) in enumerate(batches):
        warmup = WARMUP * len(batches) // EPOCHS
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, len(batches), warmup, scaled_lr(BLR, BATCH))
        optimizer.zero_grad()
        F.cross_entropy(probe(x[images, of]), y[images], weights).backward()
        optimizer.step()
    return probe.eval()


def draws(n: int, v: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and views of every step: each image once an epoch, or as often as fills a batch with other views of it."""
    rng = generator(seed, "mae_linear", "order")
    passes = min(v, max(1, BATCH // n))
    for _ in range(EPOCHS):
        order = torch.from_numpy(np.concatenate([rng.permutation(n) for _ in range(passes)]))
        of = torch.from_numpy(rng.integers(v, size=len(order)))
        whole = max(1, len(order) // BATCH) * BATCH  # what does not fill another batch waits for the next epoch
        yield from zip(order[:whole].split(BATCH), of[:whole].split(BATCH), strict=True)


@torch.inference_mode()
def predict(probe: nn.Sequential, views: Views, rest: Ints) -> Floats:
    """(m, k) class probabilities of the images `rest`, from the mean over their windows."""
    logits: Tensor = probe(torch.from_numpy(views.judged[rest]).to(device()))
    return logits.softmax(1).double().cpu().numpy()
