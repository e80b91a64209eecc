"""Made-up features and tasks that the tests of probes share: what a probe must find in them is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miram.engine.metrics import score
from miram.finetune.config import Method, ProbeSection
from miram.finetune.probes import PROBES
from miram.finetune.task import Judgement, Task, outer_folds

METHODS: tuple[Method, ...] = ("linear", "sweep", "knn", "attentive", "mae_linear")


@dataclass
class MadeUp:
    """Stands in for a file of features: (n, D) arrays for every layer and pool, crops, tokens of each image."""

    of: dict[tuple[int, str], NDArray[Any]]
    of_crops: dict[tuple[int, str], NDArray[Any]] = field(default_factory=dict)
    of_tokens: list[NDArray[Any]] | None = None

    @classmethod
    def alike(cls, features: NDArray[Any]) -> MadeUp:
        """The same features for every method; for attention two tokens about them, three of every other image."""
        spread = np.array([1.0, -1.0, 0.0])[:, None]
        tokens = [(row + spread[: 2 + i % 2]).astype(np.float32) for i, row in enumerate(features)]
        return cls({(-1, "mean"): features.astype(np.float32)}, of_tokens=tokens)

    def pooled(self, layer: int, pool: str) -> NDArray[Any]:
        return self.of[layer, pool]

    def crops(self, layer: int, pool: str) -> NDArray[Any]:
        return self.of_crops[layer, pool]

    def tokens(self, i: int) -> NDArray[Any]:
        assert self.of_tokens is not None
        return self.of_tokens[i]


def task(truth: NDArray[np.int64], patients: NDArray[np.int64], splits: str | NDArray[np.str_] = "") -> Task:
    everything = np.arange(len(truth))
    classes = tuple(f"class {k}" for k in range(truth.max() + 1))
    return Task("made up", classes, everything, truth, patients.astype(str), np.broadcast_to(splits, len(truth)))


def section(**settings: Any) -> ProbeSection:
    chosen = {"c_grid": (0.01, 1.0), "neighbours": (5, 20), "lrs": (0.001, 0.05), "inner_folds": 2}
    return ProbeSection(encoder="made up", **(chosen | settings))


def judged(method: Method, features: MadeUp, made_up: Task, folds: int = 4, **settings: Any) -> Judgement:
    splits, _ = outer_folds(made_up, folds, seed=0)
    return PROBES[method](features, made_up, splits, section(**settings), 0)


def figure(made_up: Task, judgement: Judgement) -> float:
    return score(made_up.metric, made_up.truth[judgement.images], judgement.probabilities, groups=judgement.fold)
