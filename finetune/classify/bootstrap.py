"""Figures with intervals, all from the same bootstrap samples of patients.

One draw of patients weighs images, breasts and patients alike, so that levels and models can be compared sample by
sample.

Legend: j images, m cases, R bootstrap samples, P patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from ...engine.errors import UserError
from ...engine.metrics import Estimate, Floats, Ints, patient_bootstrap
from ...engine.metrics.delong import delong
from .units import Cases

HELD = 4_000_000  # weights in memory at once
NAN = float("nan")
Cell = dict[str, Any] | str | float | None
Table = dict[str, Any]  # {"title", "columns", "rows": lists of cells, "note"}
Figures = Callable[[Floats], Mapping[str, Floats]]  # (R, m) weights -> (R,) of every figure


@dataclass(frozen=True)
class Draws:
    """How often each patient occurs in each bootstrap sample."""

    patients: NDArray[np.str_]  # (P,) ascending
    times: NDArray[np.int16]  # (R, P)

    @classmethod
    def of(cls, truth: Ints, patients: NDArray[np.str_], replicates: int, seed: int) -> Draws:
        """Samples of the patients of (j,) images, with every class of (j,) or (j, k) truth in each.

        Where nearly all samples would lack one, they do: a figure that needs it then has no interval, others have.
        """
        names, number = np.unique(patients, return_inverse=True)
        # Images of a patient that are of one class are one row: of many thousands the weights would take gigabytes.
        first = np.unique(np.column_stack([number, truth]), axis=0, return_index=True)[1]
        try:
            weights = patient_bootstrap(truth[first], patients[first], replicates, seed)
        except UserError:
            weights = patient_bootstrap(np.zeros_like(first), patients[first], replicates, seed)
        return cls(names, weights[:, np.unique(number[first], return_index=True)[1]].astype(np.int16))

    def differ(self, patients: NDArray[np.str_]) -> bool:
        """Whether samples of (m,) cases differ: of one patient, or of one for each class, all are the same."""
        number = np.searchsorted(self.patients, np.unique(patients))
        return len(number) > 1 and bool((self.times[:, number] != self.times[0, number]).any())

    def weights(self, patients: NDArray[np.str_]) -> Iterator[Floats]:
        """How often each of (m,) cases occurs, a few samples at a time."""
        number = np.searchsorted(self.patients, patients)
        step = max(1, HELD // len(patients))
        for start in range(0, len(self.times), step):
            yield self.times[start : start + step][:, number].astype(np.float64)


def estimated(figures: Figures, patients: NDArray[np.str_], draws: Draws) -> dict[str, Estimate]:
    """Every figure of (m,) cases with its interval; nan where there is none, as of a single patient."""
    values = figures(np.ones((1, len(patients))))
    drawn = [figures(weights) for weights in draws.weights(patients)]
    samples = {name: np.concatenate([part[name] for part in drawn]) for name in values}
    told = None if draws.differ(patients) else 0
    return {name: Estimate.of(float(value[0]), samples[name][:told]) for name, value in values.items()}


def delong_within(of: Cases) -> Estimate:
    """The AUC of patients within folds with DeLong's interval, on the logit scale: folds are independent samples.

    A fold counts by its pairs of a positive and a negative, as everywhere.
    """
    total, variance, pairs = 0.0, 0.0, 0
    for fold in np.unique(of.fold):
        truth, score = of.truth[of.fold == fold], of.probabilities[of.fold == fold, 1]
        here = int(truth.sum() * (1 - truth).sum())
        if here:
            (auc,), ((spread,),) = delong(truth, score[None])
            total, variance, pairs = total + here * auc, variance + here**2 * spread, pairs + here
    if not pairs:
        return Estimate(NAN, (NAN, NAN))
    auc, variance = total / pairs, variance / pairs**2
    if not variance > 0:
        return Estimate(float(auc), (NAN, NAN))
    half = float(norm.ppf(0.975)) * np.sqrt(variance) / (auc * (1 - auc))
    return Estimate(float(auc), (float(expit(logit(auc) - half)), float(expit(logit(auc) + half))))


def cell(of: Estimate | None) -> dict[str, Any] | None:
    """A table's cell: JSON knows no nan."""
    if of is None or not np.isfinite(of.value):
        return None
    return {"value": of.value, "interval": list(of.interval) if np.isfinite(of.interval).all() else None}
