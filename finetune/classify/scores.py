"""The one figure by which candidates are compared on inner validation."""

from __future__ import annotations

import numpy as np

from ...engine.metrics import Floats, Ints
from ...engine.metrics.panel import headline, panel
from .labels import Labelled


def headline_score(labelled: Labelled, images: Ints, logits: Floats) -> float:
    """The task's leading metric over images, nan where a class is missing.

    Args:
        labelled: the task.
        images: (j,) numbers into it.
        logits: (j, w) of them.
    """
    target = labelled.target
    probabilities = target.probabilities(logits)
    decided = target.decide(probabilities, (0.5,) * target.thresholds)
    found = panel(target.kind, labelled.truth[images], probabilities, decided, np.ones((1, len(images))))
    return float(found[headline(target.kind)][0])
