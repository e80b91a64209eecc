"""An attentive probe: learned queries look over frozen patch tokens, and a linear head reads what they found.

Mean pooling dilutes a finding of one patch by the number of patches; a query that has learnt what to look for does not
(Bardes et al. 2024, arXiv 2404.08471, and Darcet et al. 2025, arXiv 2502.08769, judge frozen encoders like this). For
an input-independent query the key and value projections of cross-attention fold into the query and the head, so
neither is written here: with a few hundred labelled patients every parameter that adds nothing costs accuracy.

The recipe is fixed, nothing is chosen on any fold: tokens whitened on the training images, classes weighted to
balance, AdamW with a one-cycle cosine, decay on the head alone. Whitened, because a few directions hold nearly all of
the variance of a young encoder's tokens (measured: four hold nine tenths), and descent would see nothing else.

Legend: n images, N tokens, D channels, h queries, k classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.metrics import Floats, Ints
from ..engine.seeding import stable_seed

QUERIES, EPOCHS, BATCH = 4, 40, 64
LR, WEIGHT_DECAY = 3e-3, 0.3
RIDGE = 1e-3  # added to the eigenvalues of the channels' correlation before they are evened out
CHUNK = 512  # images judged at once

Tokens = NDArray[np.float32]  # (n, N, D)


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

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, k) logits: softmax(x q^T / sqrt(D))^T x for every query q, then linear."""
        x = (tokens - self.mean) @ self.whiten
        attention = (x @ self.queries.T / math.sqrt(x.shape[-1])).softmax(dim=1)
        pooled = attention.transpose(1, 2) @ x
        logits: Tensor = self.head(pooled.flatten(1))
        return logits

    @torch.inference_mode()
    def predict(self, tokens: Tokens) -> Floats:
        """(n, N, D) -> (n, k) class probabilities."""
        parts = [self(torch.from_numpy(tokens[i : i + CHUNK])).softmax(1) for i in range(0, len(tokens), CHUNK)]
        probabilities: Floats = torch.cat(parts).double().numpy()
        return probabilities


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
    """Fit a probe on frozen (n, N, D) tokens and (n,) classes 0 … k-1; the same arguments give the same probe.

    Args:
        seed: of the start and of the order of images.
        lr: the highest learning rate.
        weight_decay: of the head.

    Raises:
        ValueError: tokens and truth do not fit, or there are fewer than two classes.
    """
    counts = np.bincount(truth)
    if len(tokens) != len(truth) or tokens.ndim != 3 or len(counts) < 2 or not counts.all():
        raise ValueError(f"tokens {tokens.shape} and truth {truth.shape} with classes {counts.tolist()} do not fit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "attentive") % 2**63)
        probe = AttentiveProbe(tokens.shape[2], len(counts), queries)
        for buffer, value in zip((probe.mean, probe.whiten), whitening(tokens), strict=True):
            buffer.copy_(torch.from_numpy(value))
        weights = torch.from_numpy(len(truth) / (len(counts) * counts)).float()
        _descend(probe, torch.from_numpy(tokens), torch.from_numpy(truth).long(), weights, epochs, lr, weight_decay)
    return probe.eval()


def whitening(tokens: Tokens) -> tuple[Floats, Floats]:
    """(D,) mean and (D, D) matrix after which channels have unit variance and no correlation, up to the ridge."""
    flat = tokens.reshape(-1, tokens.shape[2]).astype(np.float64)
    scale = np.maximum(flat.std(0), 1e-6)
    values, vectors = np.linalg.eigh(np.cov(flat / scale, rowvar=False))
    matrix = (vectors / np.sqrt(np.maximum(values, 0) + RIDGE)) @ vectors.T
    return flat.mean(0), matrix / scale[:, None]


def _descend(
    probe: AttentiveProbe, x: Tensor, y: Tensor, weights: Tensor, epochs: int, lr: float, weight_decay: float
) -> None:
    groups = [
        {"params": [probe.head.weight], "weight_decay": weight_decay},
        {"params": [probe.queries, probe.head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(probe(x[chosen]), y[chosen], weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
