"""Probes of frozen features: one function a method, all called alike and judged by the same folds of patients.

judge(features, task, splits, settings, seed) -> Judgement
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..config import Method, ProbeSection
from ..features import Features
from ..task import Fold, Judgement, Task
from . import attentive, knn, linear, mae_linear, sweep

Judge = Callable[[Features, Task, Sequence[Fold], ProbeSection, int], Judgement]

PROBES: Mapping[Method, Judge] = {
    "linear": linear.judge,
    "sweep": sweep.judge,
    "knn": knn.judge,
    "attentive": attentive.judge,
    "mae_linear": mae_linear.judge,
}
