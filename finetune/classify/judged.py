"""What models said of images that none of them was fitted to.

Nothing here, or built on it, chooses by the truth of judged images: temperatures and thresholds come with them, one for
each fold, from validation images.

Legend: j judged images, m cases of a level, k classes, w outputs of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...engine.metrics import Floats, Ints
from .config import Level, ReadoutSection
from .labels import Labelled
from .units import Cases, cases


@dataclass(frozen=True)
class Judged:
    """Judged images, and what turns their logits into decisions. One model: every fold 0."""

    labelled: Labelled
    images: Ints  # (j,) numbers into labelled
    logits: Floats  # (j, w)
    fold: Ints  # (j,) whose model said it
    temperatures: Mapping[int, float]  # of each fold's model
    thresholds: Mapping[int, Mapping[Level, tuple[float, ...]]]  # the same

    @cached_property
    def probabilities(self) -> Floats:
        """(j, k) at each fold's temperature."""
        return self._at(self.temperatures)

    @cached_property
    def uncalibrated(self) -> Floats:
        """(j, k) at temperature 1."""
        return self._at(dict.fromkeys(self.temperatures, 1.0))

    @property
    def grouped(self) -> bool:
        """Whether several models judged: their scores are not on one scale."""
        return len(np.unique(self.fold)) > 1

    def cases(self, level: Level, readout: ReadoutSection) -> Cases:
        """The cases of a level, with calibrated probabilities."""
        return cases(self.labelled, self.images, self.probabilities, self.fold, level, readout)

    def decided(self, of: Cases) -> Ints:
        """(m,) class or (m, k) 0/1 of each case, by the thresholds of its own fold."""
        decided = np.zeros_like(of.truth)
        for fold in np.unique(of.fold).tolist():
            here = of.fold == fold
            decided[here] = self.labelled.target.decide(of.probabilities[here], self.thresholds[fold][of.level])
        return decided

    def _at(self, temperatures: Mapping[int, float]) -> Floats:
        target = self.labelled.target
        found = np.empty((len(self.images), len(target.classes)))
        for fold in np.unique(self.fold).tolist():
            here = self.fold == fold
            found[here] = target.probabilities(self.logits[here], temperatures[fold])
        return found
