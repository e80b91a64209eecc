"""What a finished segment run says, as far as it takes to compare it with others on the same images.

Legend: m images, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import UserError
from ...engine.files import read_json
from ...engine.metrics import Floats, Ints
from ...engine.run import RESULT
from ..classify.bootstrap import Draws
from .casefile import read_cases
from .cases import Case
from .judging import METRIC
from .measures import figures

SHOWN = (
    METRIC,
    "pooled Dice",
    "lesion sensitivity, IoU rule",
    "CPM, IoU rule",
    "CPM, point rule",
    "negatives with anything said",
    "false components per negative",
)
ALIKE = ("task", "metric", "split", "rules")  # what runs that are compared have in common


@dataclass(frozen=True)
class Finished:
    """A run's cases and result.json."""

    cases: tuple[Case, ...]  # (m,) by key
    result: Mapping[str, Any]
    drawn: dict[Hashable, Mapping[str, Floats]] = field(default_factory=dict)  # samples of all figures, by the draws

    @property
    def names(self) -> list[str]:
        """Figures that are numbers here."""
        return [name for name, value in self.plain.items() if not np.isnan(value).all()]

    @cached_property
    def plain(self) -> Mapping[str, Floats]:
        """(1,) of every figure."""
        return figures(self.cases, np.ones((1, len(self.cases))))

    def by(self, name: str) -> Figure:
        """The run by one of its figures."""
        return Figure(self, name)

    def all_samples(self, draws: Draws, patients: NDArray[np.str_]) -> Mapping[str, Floats]:
        """(R,) of every figure."""
        which = (*draws.patients.tolist(), draws.times.tobytes())
        if which not in self.drawn:
            parts = [figures(self.cases, weights) for weights in draws.weights(patients)]
            self.drawn[which] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self.drawn[which]

    def check_beside(self, other: Finished) -> None:
        """Refuse a comparison of what is not the same.

        Raises:
            UserError: it judged other images, or by other rules.
        """
        for name in ALIKE:
            if (here := self.result.get(name)) != (there := other.result.get(name)):
                raise UserError(f"its {name} is {here!r}, that of the others {there!r}; a sweep compares one task")
        if [case.key for case in self.cases] != [case.key for case in other.cases]:
            raise UserError("it judged other images than the others, so it cannot be compared with them")


@dataclass(frozen=True)
class Figure:
    """A run by one figure, as comparison.py wants it."""

    told: Finished
    name: str

    @property
    def truth(self) -> Ints:
        """(m,) whether there is anything on an image."""
        return np.array([case.positive for case in self.told.cases], np.int64)

    @property
    def patients(self) -> NDArray[np.str_]:
        """(m,) whose the images are."""
        return np.array([case.patient for case in self.told.cases])

    @property
    def result(self) -> Mapping[str, Any]:
        """Its result.json."""
        return self.told.result

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.told.plain[self.name][0])

    def samples(self, draws: Draws) -> Floats:
        """(R,) the figure on each bootstrap sample of patients."""
        return self.told.all_samples(draws, self.patients)[self.name]


def read_run(folder: Path) -> Finished:
    """A finished run's figures and cases.

    Raises:
        UserError: a file is missing or damaged.
    """
    result = read_json(folder / "result.json", RESULT)
    return Finished(tuple(sorted(read_cases(folder), key=lambda case: case.key)), result)
