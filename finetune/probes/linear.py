"""Logistic regression on standardised features, its strength C chosen on inner folds of patients.

The feature is that of the last block, pooled as `probe.pool` says. Deterministic: lbfgs starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GridSearchCV

from ...engine.metrics import Floats, Ints
from ...pretrain.monitors.probes import linear_probe
from ..config import ProbeSection
from ..features import Features
from ..task import Fold, Judgement, Task, grouped_folds, judge_folds


def judge(features: Features, task: Task, splits: Sequence[Fold], settings: ProbeSection, seed: int) -> Judgement:
    """Fit on each fold's training patients, judge the others."""
    x = features.pooled(-1, settings.pool)[task.chosen]

    def fit_and_judge(fit: Ints, rest: Ints) -> tuple[Floats, str]:
        search = fit_linear(x[fit], task, fit, settings.c_grid, settings.inner_folds, seed)
        assert len(search.classes_) == len(task.classes), "a fold was fitted without one of the classes"
        return search.predict_proba(x[rest]), f"C {search.best_params_['logisticregression__C']:g}"

    return judge_folds(task, splits, fit_and_judge)


def fit_linear(
    x: NDArray[np.float32], task: Task, fit: Ints, c_grid: Sequence[float], inner: int, seed: int
) -> GridSearchCV:
    """The probe of (len(fit), D) features of the images `fit`, C chosen on so many inner folds of their patients."""
    truth, patients = task.truth[fit], task.patients[fit]
    scoring = "roc_auc" if task.metric == "AUC" else "balanced_accuracy"
    folds = list(grouped_folds(truth, patients, inner, seed, task))
    search = GridSearchCV(linear_probe(), {"logisticregression__C": list(c_grid)}, scoring=scoring, cv=folds)
    return search.fit(x, truth)
