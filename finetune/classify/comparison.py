"""Methods compared on the same judged cases: every figure the mean over seeds, patients and seeds resampled.

A bootstrap sample draws patients and seeds, both with replacement and independently, as they are crossed: every seed
judges every patient (Owen 2007, Ann. Appl. Stat. 1, 386). All methods get the same draws, so that what patients and
seeds have in common leaves the difference of two methods. It knows nothing of other pretrainings.

Legend: m cases, R bootstrap samples, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import UserError
from ...engine.files import read_json
from ...engine.metrics import Estimate, Floats, Ints, Metric, bootstrap_scores, score
from ...engine.run import RESULT
from ...engine.seeding import generator
from .bootstrap import Draws
from .config import ReadoutSection
from .predictions import read_predictions
from .units import Cases, cases


class Compared(Protocol):
    """A finished run, as far as it takes to compare it."""

    @property
    def truth(self) -> Ints:
        """(m,) classes of its cases, or (m, k) labels: every bootstrap sample has each."""
        ...

    @property
    def patients(self) -> NDArray[np.str_]:
        """(m,) whose its cases are."""
        ...

    @property
    def result(self) -> Mapping[str, Any]:
        """Its result.json."""
        ...

    @property
    def value(self) -> float:
        """The figure."""
        ...

    def samples(self, draws: Draws) -> Floats:
        """(R,) the figure on each bootstrap sample of patients."""
        ...


@dataclass(frozen=True)
class Told:
    """What a finished run says: its cases at the level that leads, and its result.json."""

    cases: Cases
    result: Mapping[str, Any]

    @property
    def truth(self) -> Ints:
        """(m,) or (m, k) of its cases."""
        return self.cases.truth

    @property
    def patients(self) -> NDArray[np.str_]:
        """(m,) whose its cases are."""
        return self.cases.patients

    @property
    def metric(self) -> Metric:
        """The figure that leads."""
        metric: Metric = self.result["metric"]
        return metric

    @property
    def groups(self) -> Ints | None:
        """(m,) folds; their models are not on one scale."""
        return self.cases.fold if len(np.unique(self.cases.fold)) > 1 else None

    @property
    def value(self) -> float:
        """The figure."""
        return score(self.metric, self.cases.truth, self.cases.probabilities, groups=self.groups)

    def check_beside(self, other: Told) -> None:
        """Refuse a comparison of what is not the same.

        Raises:
            UserError: it judged other cases, or another task.
        """
        for name in ("metric", "kind", "level", "task"):
            if self.result.get(name) != other.result.get(name):
                here, there = self.result.get(name), other.result.get(name)
                raise UserError(f"its {name} is {here!r}, that of the others {there!r}; a sweep compares one task")
        if sorted(self.cases.ids) != sorted(other.cases.ids):
            raise UserError("it judged other cases than the others, so it cannot be compared with them")

    def samples(self, draws: Draws) -> Floats:
        """(R,) the figure on each bootstrap sample of patients."""
        found = self.cases
        parts = draws.weights(found.patients)
        judged = (self.metric, found.truth, found.probabilities)
        return np.concatenate([bootstrap_scores(*judged, weights, self.groups) for weights in parts])


def read_run(folder: Path, readout: ReadoutSection, separator: str = "|") -> Told:
    """A finished run's figures and predictions; `separator` is that of several labels of an image.

    Raises:
        UserError: a file is missing, damaged, or says nothing of what is judged.
    """
    result, said = read_json(folder / "result.json", RESULT), read_predictions(folder / "predictions.csv")
    if missing := [key for key in ("kind", "level", "metric") if key not in result]:
        raise UserError(f"{folder / 'result.json'} does not say {missing[0]!r}; was it made by another version?")
    labelled = said.labelled(str(result.get("task", "")), result["kind"], separator)
    return Told(cases(labelled, labelled.rows, said.probabilities, said.fold, result["level"], readout), result)


@dataclass(frozen=True)
class Standing:
    """A method's place: the mean over its seeds, what it has ahead of the one compared with, what it costs."""

    method: str
    value: Estimate
    by_seed: Mapping[int, float]
    difference: Estimate | None
    p: float | None
    cost: Mapping[str, float | None]


def standings(
    told: Mapping[str, Mapping[int, Compared]], seeds: Sequence[int], against: str, replicates: int, seed: int
) -> dict[str, Standing]:
    """Every method that judged something.

    Args:
        told: of each method what its seeds say, as far as they came to an end.
        seeds: S of them, drawn from in every bootstrap sample.
        against: the method that others are compared with, on the seeds that both have.
        replicates: R.
        seed: of the bootstrap.
    """
    every = [one for of in told.values() for one in of.values()]
    if not every:
        return {}
    truth, patients = (np.concatenate([getattr(one, name) for one in every]) for name in ("truth", "patients"))
    draws, times = Draws.of(truth, patients, replicates, seed), seed_draws(len(seeds), replicates, seed)
    values = {method: {s: one.value for s, one in of.items()} for method, of in told.items() if of}
    samples = {method: {s: one.samples(draws) for s, one in told[method].items()} for method in values}
    column = {s: times[:, place] for place, s in enumerate(seeds)}
    found = {}
    for method, mine in samples.items():
        both = [s for s in mine if method != against and s in samples.get(against, {})]
        ahead = {s: mine[s] - samples[against][s] for s in both}
        gap = float(np.mean([values[method][s] - values[against][s] for s in both])) if both else None
        drawn = over_seeds(ahead, column) if both else None
        found[method] = Standing(
            method,
            Estimate.of(float(np.mean([*values[method].values()])), over_seeds(mine, column)),
            values[method],
            None if gap is None or drawn is None else Estimate.of(gap, drawn),
            None if drawn is None else two_sided(drawn),
            mean_cost([one.result.get("cost", {}) for one in told[method].values()]),
        )
    return found


def seed_draws(seeds: int, replicates: int, seed: int) -> Ints:
    """(R, S) how often each seed occurs in each bootstrap sample."""
    return generator(seed, "bootstrap", "seeds").multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates)


def over_seeds(samples: Mapping[int, Floats], times: Mapping[int, Ints]) -> Floats:
    """(R,) means over the seeds drawn, each (R,) times; nan where none of them is there."""
    drawn = np.stack([times[s] for s in samples]).astype(np.float64)
    values = np.where(drawn > 0, drawn * np.stack([*samples.values()]), 0).sum(0)
    total = drawn.sum(0)
    return np.divide(values, total, out=np.full(len(total), np.nan), where=total > 0)


def two_sided(differences: Floats) -> float | None:
    """p of no difference: twice the share of bootstrap samples on the rarer side of zero, zero itself on both.

    It is below about 0.05 where the 95 % interval leaves zero out. One sample more than there are is counted on that
    side, so that it never is 0 (Davison & Hinkley 1997, chapter 4). None where fewer than half of the samples tell.
    """
    known = differences[~np.isnan(differences)]
    if 2 * len(known) <= len(differences):
        return None
    rarer = min((known <= 0).sum(), (known >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(known) + 1))


def mean_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of several seeds: the largest of sizes and memory, the mean of pace, time and trainings."""
    largest = ("trainable", "parameters", "head", "adapter_bytes", "peak_memory_bytes")
    found: dict[str, float | None] = {}
    for name in (*largest, "images_per_s", "seconds", "trainings"):
        known = [cost[name] for cost in costs if cost.get(name) is not None]
        found[name] = None if not known else max(known) if name in largest else float(np.mean(known))
    return found
