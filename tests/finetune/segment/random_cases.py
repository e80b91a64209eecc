"""Cases made of random numbers, for tests that need many."""

from __future__ import annotations

from math import pi

import numpy as np

from miram.finetune.segment.cases import Candidate, Case, Lesion, Overlap

NAN = float("nan")


def random_cases(count: int, seed: int, classes: int = 1, spaced: bool = True) -> list[Case]:
    """`count` images of about half as many patients; every second one is positive in expectation."""
    rng = np.random.default_rng(seed)
    return [random_case(i, rng, classes, spaced) for i in range(count)]


def random_case(i: int, rng: np.random.Generator, classes: int, spaced: bool) -> Case:
    """One of them."""
    overlaps, lesions, candidates, number = [], [], [], 0
    for cls in range(1, classes + 1):
        for _ in range(int(rng.integers(3)) * int(rng.integers(2))):
            number += 1
            lesions.append(random_lesion(cls, number, rng))
            candidates.append(Candidate(cls, round(float(rng.random()), 1), 9, number, number * int(rng.integers(2))))
        for _ in range(int(rng.integers(4))):
            candidates.append(Candidate(cls, round(float(rng.random()), 1), 9, 0, 0))
        truth = sum(lesion.area for lesion in lesions if lesion.cls == cls)
        both = int(rng.integers(truth + 1))
        false = int(rng.integers(3))
        overlaps.append(Overlap(truth, both + 40 * false, both, false, 40 * false))
    parts, area = sum(o.false_components for o in overlaps), sum(o.false_area for o in overlaps)
    spacing = float(rng.choice([0.05, 0.07, 0.1])) if spaced else None
    patient = f"set/{int(rng.integers(1 + i // 2))}"
    return Case(
        f"key-{i}", patient, i % 3, spacing, 400, 300, tuple(overlaps), parts, area, tuple(lesions), tuple(candidates)
    )


def random_lesion(cls: int, number: int, rng: np.random.Generator) -> Lesion:
    """Missed one time in three."""
    area, missed = int(rng.integers(20, 90000)), bool(rng.random() < 1 / 3)
    scores = [round(float(s), 1) if s > 0.2 else NAN for s in rng.random(2)]
    made = (0.0, NAN, NAN) if missed else tuple(float(v) for v in rng.uniform(0.1, 1, 3))
    hits = (not missed and bool(rng.integers(2)), not missed and bool(rng.integers(2)))
    return Lesion(cls, number, area, 2 * (area / pi) ** 0.5, *hits, *made, *scores)
