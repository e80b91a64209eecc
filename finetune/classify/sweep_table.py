"""What a sweep writes: result.json with a table a fraction, and table.csv with the same numbers unrounded.

A sweep of segmenters writes the same, with a table a figure: what both say is in functions of standings alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ...engine.metrics import Estimate, chance
from .bootstrap import Table, cell
from .comparison import Standing, Told
from .config import FinetuneConfig, SweepSection
from .judging import FEW_PATIENTS, NOTHING

K = TypeVar("K", bound=float | str)
Standings = Mapping[float, Mapping[str, Standing]]  # of each fraction its methods, in their order
Failure = tuple[str, float, int, str]  # method, fraction, seed, why
UNITS: Mapping[str, tuple[str, float]] = {  # as people read them; table.csv has them as they are
    "trainable": ("trainable", 1),
    "adapter_bytes": ("adapter, kB", 1e3),
    "peak_memory_bytes": ("peak memory, MB", 1e6),
    "images_per_s": ("images/s", 1),
    "seconds": ("s a run", 1),
}
COSTS = ("trainable", "head", "adapter_bytes", "peak_memory_bytes", "images_per_s", "seconds", "trainings")


def content(
    settings: FinetuneConfig, found: Standings, failed: Sequence[Failure], told: Sequence[Told]
) -> dict[str, Any]:
    """result.json: the first method at the largest fraction leads; with nothing judged it only says why."""
    section, metric = settings.sweep, told[0].metric if told else ""
    top = [*found[max(section.fractions)].values()]
    base = [majority(told[0])] if told else []
    reasons = [[method, fraction, seed, why] for method, fraction, seed, why in failed]
    shared = ("task", "kind", "level", "split", "n_images", "n_patients", "classes")
    return {
        **{key: told[0].result[key] for key in shared if told and key in told[0].result},
        "metric": metric,
        **((cell(top[0].value) if top else None) or NOTHING),
        "rows": [*rows(top), *base],
        "differences": list(differences(top, section.against)),
        "notes": notes(settings, found, told) if told else [],
        "tables": [
            *(
                table_of(section, found[fraction], fraction, metric)
                for fraction in section.fractions
                if found[fraction]
            ),
            *table_of_failed(["method", "fraction", "seed", "why"], reasons),
        ],
    }


def majority(told: Told) -> dict[str, Any]:
    """The row of a model that says the same of everyone."""
    base = chance(told.metric, told.cases.probabilities.shape[1])
    return {"name": "majority class", "value": base, "interval": None, "detail": ""}


def by_seed(standing: Standing) -> str:
    """The figure of every seed."""
    return ", ".join(f"{value:.3f}" for value in standing.by_seed.values())


def rows(of: Sequence[Standing]) -> Iterator[dict[str, Any]]:
    """Of every method."""
    for standing in of:
        figure = cell(standing.value) or NOTHING
        yield {"name": standing.method, **figure, "detail": f"seeds {by_seed(standing)}"}


def differences(of: Sequence[Standing], against: str) -> Iterator[dict[str, Any]]:
    """Of every method and the one compared with, on the seeds that both have."""
    for standing in of:
        if standing.difference is not None:
            p = "" if standing.p is None else f"p {standing.p:.3f}"
            name = f"{standing.method} \N{MINUS SIGN} {against}"
            yield {"name": name, **(cell(standing.difference) or NOTHING), "detail": p}


def table_of(section: SweepSection, of: Mapping[str, Standing], fraction: float, metric: str) -> Table:
    """One fraction, a row a method."""
    return {
        "title": f"{100 * fraction:.4g} % of the training patients' labels",
        "columns": ["method", metric, *columns(section.against, UNITS)],
        "rows": [row_of(standing, len(section.seeds), UNITS) for standing in of.values()],
        "note": "Trainable parameters without those of the head. Peak memory is the device's, else the process'.",
    }


def columns(against: str, units: Mapping[str, tuple[str, float]]) -> list[str]:
    """What stands behind the name and the figure."""
    return [f"\N{MINUS SIGN} {against}", "p", *(name for name, _ in units.values()), "by seed"]


def row_of(standing: Standing, seeds: int, units: Mapping[str, tuple[str, float]]) -> list[Any]:
    """Cells as the report reads them."""
    difference = cell(standing.difference)
    costs = [scaled(standing.cost[name], unit) for name, (_, unit) in units.items()]
    lacking = f" ({len(standing.by_seed)} of {seeds} seeds)" * (len(standing.by_seed) < seeds)
    signed = difference and {**difference, "signed": True}
    return [standing.method, cell(standing.value), signed, standing.p, *costs, by_seed(standing) + lacking]


def scaled(number: float | None, unit: float) -> float | int | None:
    """A cost in its unit; counts stay whole."""
    if number is None or unit == 1:
        return number
    return round(number / unit) if number >= 10 * unit else number / unit


def table_of_failed(names: Sequence[str], reasons: Sequence[Sequence[Any]]) -> Iterator[Table]:
    """Runs that judged nothing, and why; no table where there are none."""
    if reasons:
        yield {"title": "Runs that failed", "columns": [*names], "rows": [*reasons], "note": ""}


def notes(settings: FinetuneConfig, found: Standings, told: Sequence[Told]) -> list[str]:
    """How the figures were made, for the reader of the report."""
    section, one = settings.sweep, told[0]
    seeds, patients = len(section.seeds), len(np.unique(one.cases.patients))
    within = ", within folds and then over them," * (one.groups is not None and one.metric == "AUC")
    return [
        f"Rows and differences above are at {100 * max(section.fractions):.4g} % of the labels. Each figure is a mean "
        f"over {seeds} seed{'s' * (seeds > 1)}: of the {one.metric}{within} by {one.result['level']}. A seed sets "
        "folds, labelled patients, heads and batches.",
        *caveats("methods", seeds, settings.finetune.replicates, patients),
        "All tuning methods had as many candidates, inner folds and steps, and heads that start from the probe's; the "
        "probe chose among five strengths. What each chose is in its own run.",
    ]


def caveats(compared: str, seeds: int, samples: int, patients: int) -> list[str]:
    """What intervals and p hold, what they do not, and where there is too little of something to believe them."""
    several = (
        f"Of {seeds} seeds a bootstrap shows about {(seeds - 1) / seeds:.0%} of their variance."
        if seeds > 1
        else "With one seed, how much another would change is not in them."
    )
    reach = (
        "With few seeds it is too bold where seeds differ in quality, and too careful where they only differ by chance."
        if seeds > 1
        else f"It tells these trained models apart, not their {compared}: trained again, equal {compared} may differ "
        "as much."
    )
    few = f" With {patients} patients they are too short to be taken at their word." * (patients < FEW_PATIENTS)
    return [
        f"Intervals: 95 %, {samples} bootstrap samples, each of patients and of seeds, the same for all {compared}, so "
        f"that differences are paired. {several} Other pretrainings are not in them.{few}",
        "p is of no difference: twice the share of samples on the rarer side of zero, at least "
        f"{2 / (samples + 1):.2g}, and not corrected for the number of rows. {reach}",
    ]


def table_csv(settings: FinetuneConfig, found: Standings) -> str:
    """table.csv."""
    return csv_of(("fraction", "method"), found, settings.sweep.against, COSTS)


def csv_of(
    first: tuple[str, str], found: Mapping[K, Mapping[str, Standing]], against: str, costs: Sequence[str]
) -> str:
    """A line for each thing that rows stand side by side at, and each row; `first` is what the two are called."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    head = ("seeds", "value", "low", "high", "difference", "difference_low", "difference_high", "against", "p")
    table.writerow([*first, *head, *costs])
    for at, of in found.items():
        for s in of.values():
            figures = [*numbers(s.value), *numbers(s.difference), against if s.difference else "", s.p]
            table.writerow([at, s.method, len(s.by_seed), *figures, *(s.cost[name] for name in costs)])
    return buffer.getvalue()


def numbers(of: Estimate | None) -> list[float | None]:
    """Value and interval, empty where there is none."""
    found = (None, None, None) if of is None else (of.value, *of.interval)
    return [None if number is None or np.isnan(number) else number for number in found]
