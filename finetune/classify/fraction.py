"""A share of the training patients, as if only theirs had been labelled."""

from __future__ import annotations

import numpy as np

from ...engine.metrics import Ints
from ...engine.seeding import stable_seed
from ..task import Task


def labelled_fraction(task: Task, fit: Ints, fraction: float, seed: int) -> Ints:
    """The images of a share of the patients, in the order of `fit`.

    Patients come whole and class by class; one with several classes counts as the rarest of them. Every class there
    is stays. A smaller share lies inside a larger one, and who comes first follows from the seed and a patient's name
    alone: more images change little.

    Args:
        task: classes and patients.
        fit: images that may be trained on.
        fraction: share of their patients, above 0 to 1.
        seed: another one, other patients.
    """
    assert 0 < fraction <= 1, fraction
    names, of = np.unique(task.patients[fit], return_inverse=True)
    order = np.argsort([stable_seed(seed, "fraction", str(name)) for name in names])
    has = np.zeros((len(names), len(task.classes)), np.bool_)  # patient by class
    has[of, task.truth[fit]] = True
    count = has.sum(0)
    rarest = np.where(has, count, len(names) + 1).argmin(1)
    chosen = np.zeros(len(names), np.bool_)
    for c in np.flatnonzero(count):
        members = order[rarest[order] == c]
        chosen[members[: max(1, round(fraction * len(members)))]] = True
        if not len(members):  # all who have it also have a rarer one
            chosen[order[has[order, c]][0]] = True
    return fit[chosen[of]]
