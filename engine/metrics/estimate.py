"""A figure with its interval.

An interval is the 2.5 to 97.5 percentile over bootstrap samples of *patients*: images of one patient go together,
because they are no independent evidence (Field & Welsh 2007). Two models are compared on the same samples.

Legend: m cases, k classes, R bootstrap samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..seeding import generator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["binary", "multiclass", "ordinal", "multilabel"]

NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, value: float, samples: Floats) -> Estimate:
        """From the figure itself and its (R,) bootstrap samples.

        Samples in which it cannot be computed are left out; where they are half of all or more, where there is no
        sample, or where the figure itself cannot be computed, the interval is nan.
        """
        known = samples[~np.isnan(samples)]
        if np.isnan(value) or 2 * len(known) <= len(samples):
            return cls(float(value), (NAN, NAN))
        low, high = np.percentile(known, [2.5, 97.5])
        return cls(float(value), (float(low), float(high)))


def patient_bootstrap(truth: Ints, patients: NDArray[np.str_], replicates: int, seed: int) -> Floats:
    """(R, m) how often each case occurs in each bootstrap sample of patients; samples lacking a class are redrawn.

    Args:
        truth: (m,) classes; or (m, k) 0/1 of k labels: a sample then needs each label present in a case and absent in
            one, as far as all cases together have both.
        patients: (m,) whose each case is.
        replicates: R.
        seed: of the samples.

    Raises:
        UserError: nearly all samples lack a class.
    """
    names, patient_of = np.unique(patients, return_inverse=True)
    rng, has = generator(seed, "bootstrap"), patients_with(truth, patient_of, len(names))
    rows: list[Floats] = []
    for _ in range(100 * replicates):
        if len(rows) == replicates:
            break
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)).astype(np.float64)
        if (times @ has > 0).all():
            rows.append(times[patient_of])
    if len(rows) < replicates:
        raise UserError("too few patients of a class are judged for an interval: most bootstrap samples lack the class")
    return np.stack(rows)


def patients_with(truth: Ints, patient_of: Ints, patients: int) -> Floats:
    """(patients, c) 1 where a patient has a case of each class that occurs; each label gives two: present, absent."""
    if truth.ndim == 1:
        occurs = truth[:, None] == np.unique(truth)
    else:
        occurs = np.concatenate([truth == 1, truth == 0], axis=1)
        occurs = occurs[:, occurs.any(0)]
    has = np.zeros((patients, occurs.shape[1]))
    np.maximum.at(has, patient_of, occurs.astype(np.float64))
    return has


def ratio(above: Floats, below: Floats) -> Floats:
    """Quotient; nan where there is nothing below."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, NAN), where=below > 0)


def mean(values: Floats, weights: Floats) -> Floats:
    """(R,) weighted means of (m,) values."""
    return ratio(weights @ values, weights.sum(1))
