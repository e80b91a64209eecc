"""What a sweep writes: result.json with a table a fraction, and table.csv with the same numbers unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...engine.metrics import Estimate, chance
from .bootstrap import Table, cell
from .comparison import Standing, Told
from .config import FinetuneConfig, SweepSection
from .judging import FEW_PATIENTS

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
    largest = max(section.fractions)
    top = [*found[largest].values()]
    lead = cell(top[0].value) if top else None
    rows = [{"name": s.method, **(cell(s.value) or NOTHING), "detail": by_seed(s)} for s in top]
    if told:
        base = chance(told[0].metric, told[0].cases.probabilities.shape[1])
        rows.append({"name": "majority class", "value": base, "interval": None, "detail": ""})
    shared = ("task", "kind", "level", "split", "n_images", "n_patients", "classes")
    return {
        **{key: told[0].result[key] for key in shared if told and key in told[0].result},
        "metric": metric,
        **(lead or NOTHING),
        "rows": rows,
        "differences": list(differences(top, section.against)),
        "notes": notes(settings, found, told) if told else [],
        "tables": [
            *(
                table_of(section, found[fraction], fraction, metric)
                for fraction in section.fractions
                if found[fraction]
            ),
            *([table_of_failed(failed)] if failed else []),
        ],
    }


NOTHING: Mapping[str, None] = {"value": None, "interval": None}


def by_seed(standing: Standing) -> str:
    """The figure of every seed."""
    return "seeds " + ", ".join(f"{value:.3f}" for value in standing.by_seed.values())


def differences(of: Sequence[Standing], against: str) -> Iterator[dict[str, Any]]:
    """Of every method and the one compared with, on the seeds that both have."""
    for standing in of:
        if standing.difference is not None:
            p = "" if standing.p is None else f"p {standing.p:.3f}"
            name = f"{standing.method} \N{MINUS SIGN} {against}"
            yield {"name": name, **(cell(standing.difference) or NOTHING), "detail": p}


def table_of(section: SweepSection, of: Mapping[str, Standing], fraction: float, metric: str) -> Table:
    """One fraction, a row a method."""
    columns = ["method", metric, f"\N{MINUS SIGN} {section.against}", "p", *(name for name, _ in UNITS.values())]
    return {
        "title": f"{100 * fraction:.4g} % of the training patients' labels",
        "columns": [*columns, "by seed"],
        "rows": [row_of(standing, len(section.seeds)) for standing in of.values()],
        "note": "Trainable parameters without those of the head. Peak memory is the device's, else the process'.",
    }


def row_of(standing: Standing, seeds: int) -> list[Any]:
    """Cells as the report reads them."""
    difference = cell(standing.difference)
    costs = [scaled(standing.cost[name], unit) for name, (_, unit) in UNITS.items()]
    values = ", ".join(f"{value:.3f}" for value in standing.by_seed.values())
    lacking = f" ({len(standing.by_seed)} of {seeds} seeds)" * (len(standing.by_seed) < seeds)
    signed = difference and {**difference, "signed": True}
    return [standing.method, cell(standing.value), signed, standing.p, *costs, values + lacking]


def scaled(number: float | None, unit: float) -> float | int | None:
    """A cost in its unit; counts stay whole."""
    if number is None or unit == 1:
        return number
    return round(number / unit) if number >= 10 * unit else number / unit


def table_of_failed(failed: Sequence[Failure]) -> Table:
    """Runs that judged nothing, and why."""
    rows = [[method, fraction, seed, why] for method, fraction, seed, why in failed]
    return {"title": "Runs that failed", "columns": ["method", "fraction", "seed", "why"], "rows": rows, "note": ""}


def notes(settings: FinetuneConfig, found: Standings, told: Sequence[Told]) -> list[str]:
    """How the figures were made, for the reader of the report."""
    section, one = settings.sweep, told[0]
    seeds, samples = len(section.seeds), settings.finetune.replicates
    patients = len(np.unique(one.cases.patients))
    within = ", within folds and then over them," * (one.groups is not None and one.metric == "AUC")
    several = (
        f"Of {seeds} seeds a bootstrap shows about {(seeds - 1) / seeds:.0%} of their variance."
        if seeds > 1
        else "With one seed, how much another would change is not in them."
    )
    reach = (
        "With few seeds it is too bold where seeds differ in quality, and too careful where they only differ by chance."
        if seeds > 1
        else "It tells these trained models apart, not their methods: trained again, equal methods may differ as much."
    )
    few = f" With {patients} patients they are too short to be taken at their word." * (patients < FEW_PATIENTS)
    return [
        f"Rows and differences above are at {100 * max(section.fractions):.4g} % of the labels. Each figure is a mean "
        f"over {seeds} seed{'s' * (seeds > 1)}: of the {one.metric}{within} by {one.result['level']}. A seed sets "
        "folds, labelled patients, heads and batches.",
        f"Intervals: 95 %, {samples} bootstrap samples, each of patients and of seeds, the same for all methods, so "
        f"that differences are paired. {several} Other pretrainings are not in them.{few}",
        "p is of no difference: twice the share of samples on the rarer side of zero, at least "
        f"{2 / (samples + 1):.2g}, and not corrected for the number of rows. {reach}",
        "All tuning methods had as many candidates, inner folds and steps, and heads that start from the probe's; the "
        "probe chose among five strengths. What each chose is in its own run.",
    ]


def table_csv(settings: FinetuneConfig, found: Standings) -> str:
    """table.csv."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    head = ("fraction", "method", "seeds", "value", "low", "high", "difference", "difference_low", "difference_high")
    table.writerow([*head, "against", "p", *COSTS])
    for fraction, of in found.items():
        for s in of.values():
            figures = [*numbers(s.value), *numbers(s.difference)]
            against = settings.sweep.against if s.difference else ""
            costs = [s.cost[name] for name in COSTS]
            table.writerow([fraction, s.method, len(s.by_seed), *figures, against, s.p, *costs])
    return buffer.getvalue()


def numbers(of: Estimate | None) -> list[float | None]:
    """Value and interval, empty where there is none."""
    found = (None, None, None) if of is None else (of.value, *of.interval)
    return [None if number is None or np.isnan(number) else number for number in found]
