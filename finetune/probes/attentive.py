"""An attentive probe: learned queries look over frozen patch tokens, and a linear head reads what they found.

Mean pooling dilutes a finding of one patch by the number of patches; a query that has learnt what to look for does not
(Efficient Probing, Psomas et al. 2025, arXiv 2506.10178, judges frozen encoders like this). Its key and value
projections fold into the query and the head, so neither is written here. Ours has 4 queries instead of 32, each over
all channels, and whitens the tokens: with a few hundred labelled patients every parameter that adds nothing costs
accuracy.

How long it is trained is chosen on inner folds of patients: a finding of one patch takes hundreds of steps to be found,
and what every patch shows is overfitted by then. The rest of the recipe is fixed: classes weighted to balance, AdamW
with a one-cycle cosine, decay on the head alone. Whitened on the training images, because a few directions hold nearly
all of the variance of a young encoder's tokens (measured: four hold nine tenths), and descent would see nothing else.

Images have as many tokens as their windows have patches, so a batch is padded and masked. Tokens are read from the
file when they are needed: what is held is one batch, and for whitening one image.

Legend: n images, T tokens of an image, N tokens of the longest in a batch B, D channels, h queries, k classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ...engine.launch import device
from ...engine.metrics import Floats, Ints
from ...engine.seeding import stable_seed
from ..config import ProbeSection
from ..features import Features
from ..task import Fold, Judgement, Task, choose, judge_folds

QUERIES, EPOCHS, BATCH = 4, 40, 64
LR, WEIGHT_DECAY = 3e-3, 0.3
STEPS = (60, 400)  # of all training images; as many epochs on an inner fold's
RIDGE = 1e-3  # added to the eigenvalues of the channels' correlation before they are evened out


class Tokens(Protocol):
    """The (T, D) tokens of each of n images; an (n, T, D) array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class TokenRows:
    """Tokens of some rows of a data set, read when asked for."""

    features: Features
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int, /) -> NDArray[np.float32]:
        return self.features.tokens(int(self.rows[i]))


def judge(features: Features, task: Task, splits: Sequence[Fold], settings: ProbeSection, seed: int) -> Judgement:
    """Fit on each fold's training patients, judge the others."""

    def fitted(fit: Ints, rest: Ints, epochs: int) -> Floats:
        known, asked = (TokenRows(features, task.chosen[part]) for part in (fit, rest))
        return fit_attentive(known, task.truth[fit], seed=seed, epochs=epochs).predict(asked)

    def fit_and_judge(fit: Ints, rest: Ints) -> tuple[Floats, str]:
        lengths = [math.ceil(steps / math.ceil(len(fit) / BATCH)) for steps in STEPS]
        best = choose(
            task, fit, settings.inner_folds, seed, lambda a, b: np.stack([fitted(a, b, epochs) for epochs in lengths])
        )
        return fitted(fit, rest, lengths[best]), f"{STEPS[best]} steps"

    return judge_folds(task, splits, fit_and_judge)


class AttentiveProbe(nn.Module):
    """Whiten tokens of `dim` channels, let every query pool them, classify what the queries pooled."""

    def __init__(self, dim: int, classes: int, queries: int = QUERIES):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whiten", torch.eye(dim))
        self.mean: Tensor
        self.whiten: Tensor
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))  # about mean pooling, and not all alike
        self.head = nn.Linear(queries * dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, N, D), with (B, N) true where a token is padding -> (B, k) logits.

        softmax(x q^T / sqrt(D))^T x for every query q over whitened tokens x, then linear. Whitening is linear, so it
        is applied to the queries and to what they pooled: the same numbers for h instead of D products a token.
        """
        x = tokens - self.mean
        attention = x @ (self.whiten @ self.queries.T) / math.sqrt(x.shape[-1])
        if padding is not None:
            attention = attention.masked_fill(padding[..., None], -torch.inf)
        pooled = attention.softmax(dim=1).transpose(1, 2) @ x @ self.whiten
        logits: Tensor = self.head(pooled.flatten(1))
        return logits

    @torch.inference_mode()
    def predict(self, tokens: Tokens) -> Floats:
        """Tokens of n images -> (n, k) class probabilities."""
        chunks = torch.arange(len(tokens)).split(BATCH)
        parts = [self(*padded(tokens, chunk, self.mean.device)).softmax(1) for chunk in chunks]
        probabilities: Floats = torch.cat(parts).double().cpu().numpy()
        return probabilities


def padded(tokens: Tokens, images: Tensor, on: torch.device) -> tuple[Tensor, Tensor]:
    """(B, N, D) tokens of the images, the shorter ones filled up with zeros, and (B, N) true where they are."""
    parts = [torch.from_numpy(np.ascontiguousarray(tokens[i])) for i in images.tolist()]
    lengths = torch.tensor([len(part) for part in parts])
    x = pad_sequence(parts, batch_first=True)
    return x.to(on), (torch.arange(x.shape[1]) >= lengths[:, None]).to(on)


def fit_attentive(
    tokens: Tokens,
    truth: Ints,
    *,
    seed: int,
    queries: int = QUERIES,
    epochs: int = EPOCHS,
    lr: float = LR,
    weight_decay: float = WEIGHT_DECAY,
) -> AttentiveProbe:
    """Fit a probe on frozen tokens of n images and (n,) classes 0 … k-1; the same arguments give the same probe.

    Args:
        tokens: (T, D) of each image.
        truth: (n,) classes.
        seed: of the start and of the order of images.
        queries: how many look over the tokens.
        epochs: passes over the images.
        lr: the highest learning rate.
        weight_decay: of the head.

    Raises:
        ValueError: tokens and truth do not fit, or there are fewer than two classes.
    """
    counts = np.bincount(truth)
    if len(tokens) != len(truth) or len(counts) < 2 or not counts.all():
        raise ValueError(f"tokens of {len(tokens)} images and {len(truth)} labels, {counts.tolist()}, do not fit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "attentive") % 2**63)
        probe = AttentiveProbe(tokens[0].shape[1], len(counts), queries)
        for buffer, value in zip((probe.mean, probe.whiten), whitening(tokens), strict=True):
            buffer.copy_(torch.from_numpy(value))
        weights = torch.from_numpy(len(truth) / (len(counts) * counts)).float()
        _descend(probe.to(device()), tokens, torch.from_numpy(truth).long(), weights, epochs, lr, weight_decay)
    return probe.eval()


def whitening(tokens: Tokens) -> tuple[Floats, Floats]:
    """(D,) mean and (D, D) matrix after which channels have unit variance and no correlation, up to the ridge.

    Images are read one after the other, twice: a covariance about the mean loses no digits to a mean that is far from
    zero, as masked autoencoders have it.
    """
    total, count = np.zeros(tokens[0].shape[1]), 0
    for i in range(len(tokens)):
        total, count = total + tokens[i].sum(0, dtype=np.float64), count + len(tokens[i])
    mean, products = total / count, np.zeros((len(total), len(total)))
    for i in range(len(tokens)):
        centred = (tokens[i] - mean).astype(np.float32)
        products += centred.T @ centred
    scale = np.maximum(np.sqrt(np.diag(products) / count), 1e-6)
    values, vectors = np.linalg.eigh(products / (count - 1) / np.outer(scale, scale))
    matrix = (vectors / np.sqrt(np.maximum(values, 0) + RIDGE)) @ vectors.T
    return mean, matrix / scale[:, None]


def _descend(
    probe: AttentiveProbe, tokens: Tokens, y: Tensor, weights: Tensor, epochs: int, lr: float, weight_decay: float
) -> None:
    on = probe.mean.device
    y, weights = y.to(on), weights.to(on)
    groups = [
        {"params": [probe.head.weight], "weight_decay": weight_decay},
        {"params": [probe.queries, probe.head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * math.ceil(len(y) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y)).split(BATCH):
            loss = F.cross_entropy(probe(*padded(tokens, chosen, on)), y[chosen], weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
