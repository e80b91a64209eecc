"""Nearest neighbours: each of the nearest votes exp(cosine / T), as in DINO, on standardised features.

How many and T are chosen on inner folds of patients. The neighbours are those of the monitors (`pretrain/monitors`):
they are searched once, for the largest number asked for, and every candidate counts votes among them.

Legend: f images fitted, m images judged, D features, k classes, c candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ...engine.metrics import Floats, Ints
from ...pretrain.monitors.probes import nearest_neighbours, votes
from ..config import ProbeSection
from ..features import Features
from ..task import Fold, Judgement, Task, choose, judge_folds

Candidate = tuple[int, float]  # neighbours, temperature


def judge(features: Features, task: Task, splits: Sequence[Fold], settings: ProbeSection, seed: int) -> Judgement:
    """Search among each fold's training patients, judge the others."""
    x, k = features.pooled(-1, settings.pool)[task.chosen], len(task.classes)
    grid = list(product(settings.neighbours, settings.temperatures))

    def counted(fit: Ints, rest: Ints, candidates: Sequence[Candidate]) -> Floats:
        return count_votes(x[fit], task.truth[fit], x[rest], candidates, k)

    def fit_and_judge(fit: Ints, rest: Ints) -> tuple[Floats, str]:
        best = grid[choose(task, fit, settings.inner_folds, seed, lambda a, b: counted(a, b, grid))]
        return counted(fit, rest, [best])[0], f"k {best[0]}, T {best[1]:g}"

    return judge_folds(task, splits, fit_and_judge)


def count_votes(
    known: NDArray[np.float32], truth: Ints, asked: NDArray[np.float32], candidates: Sequence[Candidate], classes: int
) -> Floats:
    """(f, D) features of (f,) classes and (m, D) features -> (c, m, k) shares of votes, all classes of equal weight.

    Without that the rare classes would be outvoted, which balanced accuracy punishes, and no other probe does. A
    candidate that asks for more neighbours than there are gets all of them.
    """
    search = make_pipeline(StandardScaler(), nearest_neighbours(len(known), max(n for n, _ in candidates)))
    search.fit(known, truth)
    distances, nearest = search[-1].kneighbors(search[0].transform(asked))  # the nearest first
    of_class = np.eye(classes)[truth[nearest]]  # (m, neighbours, k)
    counts, shares = np.bincount(truth, minlength=classes), []
    for n, temperature in candidates:
        weights = votes(distances[:, :n], temperature)
        balanced = np.einsum("mn,mnk->mk", weights, of_class[:, :n]) / np.maximum(counts, 1)
        shares.append(balanced / balanced.sum(1, keepdims=True))
    return np.stack(shares)
