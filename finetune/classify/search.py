"""Nested cross-validation by patient: whatever is chosen is chosen on inner folds of the training patients.

PLACE/inner-0/<knob>-0.001/logits.safetensors    what a candidate says of the images that an inner fold holds out
PLACE/chosen/logits.safetensors                  what the chosen one, trained on all of them, says of the judged images
      …/training.json                            {"schema", "seconds", "peak_memory_bytes", "images_per_s", "trainable",
                                                 "head", "adapter_bytes"}; written last

A training whose training.json is there is not run again. Every method gets the same number of candidates, folds and
steps, and none of them sees an image that it is judged on, nor another one of its patient.
Legend: j images, w outputs of a head.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...engine.errors import UserError
from ...engine.files import make_folder, read_json, write_json
from ...engine.metrics import Floats, Ints
from ...engine.metrics.calibration import fit_temperature
from ...engine.run import read_metrics
from ...engine.seeding import stable_seed
from ...engine.tensors import read_tensors
from ...engine.track import Meter, peak_memory_bytes, reset_peak_memory
from ..peft.base import write_all
from ..task import Fold, Task, grouped_folds
from .bench import Approach, Bench, refuse_not_finite
from .config import Level
from .scores import headline_score
from .thresholds import choose_thresholds
from .units import LEVELS

TRAINING = "miram.training/1"
UNDECIDED = "too few patients of a class to choose anything: the middle candidate, no temperature, threshold 0.5"


@dataclass(frozen=True)
class Candidate:
    """One value of the knob, and its score on each inner fold; nan where a fold lacks a class."""

    value: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the folds that can be scored; of none, nan."""
        scored = [score for score in self.scores if not np.isnan(score)]
        return float(np.mean(scored)) if scored else float("nan")


@dataclass(frozen=True)
class Nested:
    """What came of an outer fold's training patients, with nothing known of its judged ones but their images."""

    logits: Floats  # (j, w) of the judged images
    model: Any  # None where it was not trained in this start
    value: float
    candidates: tuple[Candidate, ...]
    temperature: float
    thresholds: dict[Level, tuple[float, ...]]
    inner: str  # how it was chosen, for people
    trainings: tuple[Mapping[str, Any], ...]  # what each cost, the chosen one last


@dataclass(frozen=True)
class Search:
    """The search of one approach."""

    bench: Bench
    approach: Approach[Any]
    meter: Meter

    def nested(self, fit: Ints, rest: Ints, place: Path, *, keep: bool = False) -> Nested:
        """Choose on inner folds, fit temperature and thresholds to what was said there, train, judge once.

        Args:
            fit: images of the training patients whose labels may be used.
            rest: images to judge.
            place: folder of all these trainings; its name seeds them, the same for every candidate and method.
            keep: the model is wanted, too, and trained again if need be.
        """
        bench, values = self.bench, self.approach.values
        seed = stable_seed(bench.settings.seed, "training", place.name) % 2**63
        pairs, inner = inner_folds(bench, fit)
        tried = [self.trial(value, pairs, place, seed) for value in values] if pairs else []
        if not pairs:
            bench.accelerator.print(f"miram: {place.name}: {UNDECIDED}")
        candidates = tuple(candidate for candidate, _ in tried)
        best = choose(candidates) if tried else (len(values) - 1) // 2
        held = np.concatenate([held for _, held in pairs]) if pairs else fit[:0]
        said = np.concatenate(tried[best][1]) if tried else np.zeros((0, bench.labelled.target.width))
        temperature, thresholds = self.calibrated(held, said)
        known: Ints
        picky: Ints | None
        known, picky = pairs[0] if bench.section.search.folds == 1 and pairs else (fit, None)
        logits, model = self.trained(known, picky, rest, values[best], place / "chosen", seed, keep=keep)
        costs = (*(cost_at(p) for p in sorted(place.glob("inner-*/*/training.json"))), cost_at(place / "chosen"))
        return Nested(logits, model, values[best], candidates, temperature, thresholds, inner, costs)

    def trial(self, value: float, pairs: Sequence[Fold], place: Path, seed: int) -> tuple[Candidate, list[Floats]]:
        """One candidate on every inner fold: its scores, and its logits of the held images."""
        said = []
        for number, (known, held) in enumerate(pairs):
            folder = place / f"inner-{number}" / f"{self.approach.knob.replace(' ', '-')}-{value:g}"
            said.append(self.trained(known, held, held, value, folder, seed)[0])
        scores = [headline_score(self.bench.labelled, held, x) for (_, held), x in zip(pairs, said, strict=True)]
        return Candidate(value, tuple(scores)), said

    def trained(
        self, known: Ints, held: Ints | None, rest: Ints, value: float, place: Path, seed: int, *, keep: bool = False
    ) -> tuple[Floats, Any]:
        """(j, w) logits of the images `rest` by a model of the images `known`; and the model, if it was trained now."""
        if (place / "training.json").exists() and not keep:
            self.meter.advance()
            return np.asarray(read_tensors(place / "logits.safetensors")["logits"].numpy(), np.float64), None
        if self.bench.main:
            make_folder(place)
        self.bench.accelerator.wait_for_everyone()
        reset_peak_memory()
        began = time.monotonic()
        model = self.approach.make(known, value, place, seed, held)
        spent = time.monotonic() - began
        logits = self.approach.logits(model, rest) if len(rest) else np.zeros((0, self.bench.labelled.target.width))
        logits = refuse_not_finite(logits, place)
        if self.bench.main:
            write_all(place / "logits.safetensors", {"logits": torch.from_numpy(logits)})
            write_json(place / "training.json", TRAINING, {**spending(place, spent), **self.approach.cost(model)})
        self.bench.accelerator.wait_for_everyone()
        self.meter.advance()
        return logits, model

    def calibrated(self, held: Ints, said: Floats) -> tuple[float, dict[Level, tuple[float, ...]]]:
        """Temperature and thresholds from what models said of images that they were not trained on."""
        labelled, section = self.bench.labelled, self.bench.section
        if not len(held):
            return 1.0, dict.fromkeys(LEVELS, (0.5,) * labelled.target.thresholds)
        temperature = fit_temperature(labelled.target.kind, said, labelled.truth[held])
        return temperature, choose_thresholds(labelled, held, said, temperature, section)


def inner_folds(bench: Bench, fit: Ints) -> tuple[list[Fold], str]:
    """Pairs of images to train on and to choose by, and how they came about: the official `val` where it can choose.

    A class with fewer patients than there are folds makes fewer folds; one with a single patient is not balanced, and
    where no two classes have more there is no choosing.
    """
    search, task = bench.section.search, bench.labelled.strata
    val = official_val(bench, fit)
    if val.any():
        return [(fit[~val], fit[val])], "the official val patients"
    classes, truth, patients = *np.unique(task.truth[fit], return_inverse=True), task.patients[fit]
    counts = np.array([len(np.unique(patients[truth == k])) for k in range(len(classes))])
    balanced = np.flatnonzero(counts > 1)
    if len(balanced) < 2:
        return [], UNDECIDED
    kept = np.searchsorted(balanced, np.where(np.isin(truth, balanced), truth, int(counts.argmax())))
    whole = replace(task, classes=tuple(task.classes[classes[k]] for k in balanced))
    wanted = search.folds if search.folds > 1 else max(2, round(1 / search.holdout))
    found = largest_division(kept, patients, min(wanted, int(counts[balanced].min())), bench.settings.seed, whole)
    pairs = [(fit[known], fit[held]) for known, held in found]
    if not pairs:
        return [], UNDECIDED
    if search.folds == 1:
        return pairs[:1], f"one held-out part of {len(pairs[0][1])} images"
    fewer = f", fewer than {search.folds} for lack of patients" if len(pairs) < search.folds else ""
    return pairs, f"{len(pairs)} inner folds by patient{fewer}"


def official_val(bench: Bench, fit: Ints) -> NDArray[np.bool_]:
    """Which of the training images choose: the official `val` of three splits, unless it is of a single class."""
    labelled = bench.labelled
    val = np.isin(fit, np.flatnonzero(labelled.splits == "val"))
    official = {"train", "val", "test"} <= set(labelled.splits.tolist())
    useful = len(np.unique(labelled.strata.truth[fit[val]])) > 1 and not val.all()
    return val if official and useful else np.zeros(len(fit), np.bool_)


def largest_division(truth: Ints, patients: NDArray[np.str_], folds: int, seed: int, task: Task) -> list[Fold]:
    """As many folds, up to so many, as leave every class among what each is trained on; none where two do not."""
    for count in range(folds, 1, -1):
        with suppress(UserError):
            return list(grouped_folds(truth, patients, count, seed, task))
    return []


def choose(candidates: Sequence[Candidate]) -> int:
    """The best mean score; of equals the mildest, and where none can be scored the middle one."""
    means = np.array([candidate.mean for candidate in candidates])
    return (len(means) - 1) // 2 if np.isnan(means).all() else int(np.nanargmax(means))


def spending(place: Path, seconds: float) -> dict[str, float]:
    """What a training took, from its metrics where it has some."""
    path = place / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    peak = max([peak_memory_bytes(), *(line["peak_memory_bytes"] for line in lines)])
    speed = {"images_per_s": median(line["images_per_s"] for line in lines)} if lines else {}
    return {"seconds": round(seconds, 2), "peak_memory_bytes": peak, **speed}


def cost_at(place: Path) -> Mapping[str, Any]:
    """A training's record."""
    return read_json(place if place.suffix else place / "training.json", TRAINING)
