"""What came out: one table as text and JSON, one figure. It reads judged cells and hides none.

Two kinds of interval, which answer two questions. Over patients: 95 % of bootstrap samples of the judged patients, of
the mean over seeds (would other patients say the same of these encoders?). Over seeds: mean +- t s / sqrt(S) over S
pretraining seeds (would another training say the same of these patients?). Differences pair patients and seeds. A
difference counts as separated only where both intervals leave out zero.

Legend: S seeds, R bootstrap samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from miram.benchmarks.experiments.cells import cell_folder, shares_cell
from miram.benchmarks.experiments.judging import JUDGED, PROBES, TASKS
from miram.engine.files import read_json, write_atomic, write_json
from miram.engine.metrics import Estimate, Floats

RESULT = "miram.experiment.scales/1"
BUDGETS = ("steps", "time")
PAIRS = (("miram", "upsampled"), ("miram", "shared"))  # compared beside everybody with MAE
MEAN = "both"  # the mean of the tasks' AUCs
Cell = tuple[Floats, Floats]  # (S,) values, (S, R) bootstrap samples
Cells = Mapping[tuple[str, str, str, str], Cell]  # of arm, budget, task, probe


def read_cells(out: Path, arms: Sequence[str], seeds: Sequence[int], cost: dict[str, float]) -> Cells:
    """Every judged cell of the arms that have all seeds; tasks, and their mean."""
    cells: dict[tuple[str, str, str, str], Cell] = {}
    for arm in arms:
        for budget in BUDGETS:
            found = [folder_of(out, arm, budget, seed, cost) / "judged.json" for seed in seeds]
            if not all(path.exists() for path in found):
                continue
            judged = [read_json(path, JUDGED) for path in found]
            for probe in PROBES:
                each = [_stacked(judged, f"{task}/{probe}") for task in TASKS]
                cells |= {(arm, budget, task, probe): cell for task, cell in zip(TASKS, each, strict=True)}
                values, samples = zip(*each, strict=True)
                cells[arm, budget, MEAN, probe] = np.mean(values, axis=0), np.mean(samples, axis=0)
    return cells


def folder_of(out: Path, arm: str, budget: str, seed: int, cost: dict[str, float]) -> Path:
    """The cell that stands for an arm at a budget: that of equal steps where equal time means the same."""
    return cell_folder(out, arm, "steps" if shares_cell(arm, cost) else budget, seed)


def _stacked(judged: Sequence[dict[str, Any]], key: str) -> Cell:
    return np.array([j[key]["value"] for j in judged]), np.array([j[key]["samples"] for j in judged])


def summary(cell: Cell) -> dict[str, Any]:
    """Mean over seeds, each seed, and both intervals."""
    values, samples = cell
    mean, seeds = float(values.mean()), len(values)
    over_patients = Estimate.of(mean, samples.mean(0)).interval
    half = float(stats.t.ppf(0.975, seeds - 1) * values.std(ddof=1) / math.sqrt(seeds)) if seeds > 1 else math.inf
    over_seeds = (mean - half, mean + half) if seeds > 1 else None
    return {"mean": mean, "seeds": values.tolist(), "over_patients": over_patients, "over_seeds": over_seeds}


def difference(cells: Cells, one: str, other: str, budget: str, task: str, probe: str) -> dict[str, Any] | None:
    """`one` minus `other`, seed by seed and patient by patient."""
    pair = [cells.get((arm, budget, task, probe)) for arm in (one, other)]
    if pair[0] is None or pair[1] is None:
        return None
    found = summary((pair[0][0] - pair[1][0], pair[0][1] - pair[1][1]))
    bounds = (found["over_patients"], found["over_seeds"])
    separated = all(b is not None and (b[0] > 0 or b[1] < 0) for b in bounds)
    return {**found, "separated": separated}


def assemble(cells: Cells, arms: Sequence[str]) -> dict[str, Any]:
    """All rows and all differences."""
    rows = [dict(zip(("arm", "budget", "task", "probe"), key, strict=True)) | summary(c) for key, c in cells.items()]
    pairs = [(arm, "mae") for arm in arms if arm != "mae"] + [p for p in PAIRS if p[0] in arms and p[1] in arms]
    differences = [
        {"one": one, "other": other, "budget": budget, "task": task, "probe": probe} | found
        for budget in BUDGETS
        for task in (*TASKS, MEAN)
        for probe in PROBES
        for one, other in pairs
        if (found := difference(cells, one, other, budget, task, probe))
    ]
    return {"rows": rows, "differences": differences}


def write_table(out: Path, facts: dict[str, Any], arms: Sequence[str], cells: Cells) -> str:
    """scales.json, scales.txt and scales.png; returns the text."""
    content = facts | assemble(cells, arms)
    write_json(out / "scales.json", RESULT, content)
    text = "\n".join(lines(content)) + "\n"
    write_atomic(out / "scales.txt", text)
    draw(out / "scales.png", content, arms)
    return text


def lines(content: dict[str, Any]) -> Iterator[str]:
    """The table for people."""
    yield json.dumps({key: value for key, value in content.items() if key not in ("rows", "differences")})
    yield ""
    yield "AUC: mean over seeds [95 % over patients] {95 % over seeds} (each seed)"
    for row in content["rows"]:
        yield f"{row['budget']:<6}{row['task']:<8}{row['probe']:<11}{row['arm']:<12}{_figures(row, '.3f')}"
    yield ""
    yield "paired differences; * where both intervals leave out zero"
    for row in content["differences"]:
        name = f"{row['one']} - {row['other']}"
        mark = " *" if row["separated"] else ""
        yield f"{row['budget']:<6}{row['task']:<8}{row['probe']:<11}{name:<21}{_figures(row, '+.3f')}{mark}"


def _figures(row: dict[str, Any], form: str) -> str:
    patients, seeds = (["-", "-"] if b is None else [format(v, form) for v in b] for b in _bounds(row))
    each = ", ".join(format(v, form) for v in row["seeds"])
    return f"{format(row['mean'], form)} [{', '.join(patients)}] {{{', '.join(seeds)}}} ({each})"


def _bounds(row: dict[str, Any]) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    return row["over_patients"], row["over_seeds"]


def draw(path: Path, content: dict[str, Any], arms: Sequence[str]) -> None:
    """A panel a budget and probe: every arm's mean with its interval over patients, and every seed as a dot."""
    figure = Figure(figsize=(11, 3.2 * len(BUDGETS)), layout="constrained")
    panels = figure.subplots(len(BUDGETS), len(PROBES), squeeze=False, sharey=True)
    for i, budget in enumerate(BUDGETS):
        for j, probe in enumerate(PROBES):
            axis = panels[i][j]
            axis.set_title(f"equal {budget}, {probe} probe", fontsize=10)
            axis.set_xticks(range(len(arms)), arms, fontsize=9)
            axis.set_ylabel("AUC, held-out patients")
            axis.axhline(0.5, color="0.8", linewidth=0.8)
            for k, task in enumerate(TASKS):
                _points(axis, [r for r in content["rows"] if _is(r, budget, probe, task)], arms, k, task)
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _is(row: dict[str, Any], budget: str, probe: str, task: str) -> bool:
    return bool((row["budget"], row["probe"], row["task"]) == (budget, probe, task))


def _points(axis: Any, rows: list[dict[str, Any]], arms: Sequence[str], k: int, task: str) -> None:
    x = np.array([arms.index(row["arm"]) for row in rows]) + 0.24 * (k - 0.5)
    mean = np.array([row["mean"] for row in rows])
    bounds = np.abs(np.array([row["over_patients"] for row in rows]).reshape(-1, 2).T - mean)
    axis.errorbar(x, mean, bounds, fmt="o", color=f"C{k}", capsize=3, label=task)
    for place, row in zip(x, rows, strict=True):
        axis.plot([place + 0.08] * len(row["seeds"]), row["seeds"], ".", color=f"C{k}", alpha=0.45, markersize=4)
