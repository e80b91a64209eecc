"""Made-up labelled and judged images: whose, of which side, what is true and what was said, all known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miram.data.table import Rows, Table
from miram.engine.metrics import Floats, Ints, Kind
from miram.finetune.classify.config import FinetuneSection
from miram.finetune.classify.judged import Judged
from miram.finetune.classify.labels import Labelled
from miram.finetune.classify.targets import Target

CLASSES = {"binary": ("0", "1"), "multiclass": ("a", "b", "c"), "ordinal": ("1", "2", "3", "4")}
NAMES = {"multilabel": ("mass", "calc", "nodes")}


def labelled(
    kind: Kind, truth: Any, patients: Sequence[str], sides: Sequence[str] | None = None, datasets: Any = "one"
) -> Labelled:
    n = len(patients)
    keys = np.array([f"key-{i}" for i in range(n)])
    owners = np.char.add(np.char.add(np.broadcast_to(datasets, n), "/"), np.array(patients))
    side = np.array(sides if sides is not None else ["L"] * n)
    breasts = np.where(side == "", keys, np.char.add(np.char.add(owners, "/"), side))
    target = Target("task", kind, (CLASSES | NAMES)[kind])
    return Labelled(target, np.arange(n), np.array(truth, np.int64), owners, breasts, keys, np.array([""] * n), {})


def section(**settings: Any) -> FinetuneSection:
    return FinetuneSection(encoder="made up", **({"replicates": 50} | settings))


def judge(of: Labelled, logits: Any, fold: Any = 0, temperature: float = 1.0, threshold: float = 0.5) -> Judged:
    """All images judged, every fold with the same temperature and threshold."""
    n = len(of.keys)
    folds = np.broadcast_to(fold, n).astype(np.int64)
    count = {"binary": 1, "multilabel": len(of.target.classes)}.get(of.target.kind, 0)
    cut = dict.fromkeys(("image", "breast", "patient"), (threshold,) * count)
    numbers = np.unique(folds).tolist()
    given = np.array(logits, np.float64)
    return Judged(of, np.arange(n), given, folds, dict.fromkeys(numbers, temperature), dict.fromkeys(numbers, cut))


def binary_logits(scores: Any) -> Floats:
    """(n, 2) logits of which the softmax gives these probabilities of class 1."""
    scores = np.array(scores, np.float64)
    return np.log(np.stack([1 - scores, scores], 1))


def population(kind: Kind, patients: int, seed: int, skill: float = 1.0) -> tuple[Labelled, Floats]:
    """Four images of each of so many women, and logits that know the truth somewhat; her images are alike."""
    rng = np.random.default_rng(seed)
    k = len((CLASSES | NAMES)[kind])
    shape = (patients, k) if kind == "multilabel" else (patients,)
    of_her = rng.integers(2 if kind == "multilabel" else k, size=shape)
    names = [f"p{i:03}" for i in range(patients)]
    truth = np.repeat(of_her, 4, axis=0)
    of = labelled(kind, truth, np.repeat(names, 4).tolist(), ["L", "L", "R", "R"] * patients)
    known = truth if kind == "multilabel" else np.eye(k)[truth]
    if kind == "ordinal":
        known = (truth[:, None] > np.arange(k - 1)).astype(float)
    noise = np.repeat(rng.normal(size=(patients, known.shape[1])), 4, axis=0) + rng.normal(size=known.shape)
    return of, skill * 2 * (known - known.mean()) + noise


def rows(n: int, **columns: Sequence[str]) -> Rows:
    """An index of n images with these columns."""
    table = Table({name: np.array([v.encode() for v in values], "S") for name, values in columns.items()})
    return Rows([table], np.stack([np.zeros(n, np.int64), np.arange(n)], 1))


def softmax(logits: Floats) -> Floats:
    shares: NDArray[np.float64] = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def folds_of(of: Labelled, folds: int) -> Ints:
    """A fold for each image, by patient."""
    return np.unique(of.patients, return_inverse=True)[1] % folds
