"""The table of the paper's experiment: what every row got under a recipe, how far it is ahead, what others published.

Figures are means over the seeds of the fine-tuning. A bootstrap sample draws patients and seeds, the same for all rows,
so that a difference of two rows is paired; one pretraining stands behind a row, and its seed is not in the intervals.

Legend: m judged lesions, R bootstrap samples.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..engine.errors import UserError
from ..engine.files import read_json
from ..engine.metrics import Estimate, Floats, Ints, panel
from ..engine.run import RESULT, read_metrics
from ..finetune.classify.bootstrap import Draws, Table, cell
from ..finetune.classify.comparison import over_seeds, seed_draws
from ..finetune.classify.predictions import Predictions, read_predictions
from .config import PaperConfig

ACCURACY = "accuracy"
CAPTION = (
    "Dots: accuracy on the official test patients, mean over the seeds of the fine-tuning, with the 95 % interval over "
    "patients and seeds. Crosses: published, of one run on another set of patients. Dotted: the most frequent class."
)
COLOURS = ("#2f6f9f", "#c8561b", "#5a5fc0", "#4d8032")
Cell = tuple[str, str, int]  # row, recipe, seed


@dataclass(frozen=True)
class Told:
    """What a finished fine-tuning says."""

    said: Predictions
    result: Mapping[str, Any]

    @property
    def truth(self) -> Ints:
        """(m,) classes."""
        return self.said.coded(self.said.truth, self.result["kind"])

    def figures(self, weights: Floats) -> dict[str, Floats]:
        """(R,) every figure of its kind of task."""
        kind, decided = self.result["kind"], self.said.coded(self.said.decisions, self.result["kind"])
        return panel(kind, self.truth, self.said.probabilities, decided, weights)


@dataclass(frozen=True)
class Row:
    """A row of a table: means over seeds."""

    name: str
    figures: Mapping[str, Estimate]
    ahead: Estimate | None  # in accuracy, of the row compared with
    by_seed: Mapping[int, float]


Found = Mapping[str, Sequence[Row]]  # by recipe


def read_told(folder: Path) -> Told:
    """A finished run.

    Raises:
        UserError: its files are damaged, or the task is no question of one class.
    """
    told = Told(read_predictions(folder / "predictions.csv"), read_json(folder / "result.json", RESULT))
    if told.result["kind"] not in ("binary", "multiclass"):
        raise UserError(f"{folder}: accuracy leads the paper's table, and a {told.result['kind']} task has none")
    return told


@dataclass(frozen=True)
class Drawn:
    """A run's figures, and each of them on (R,) bootstrap samples of patients."""

    values: Mapping[str, float]
    samples: Mapping[str, Floats]

    @classmethod
    def of(cls, told: Told, draws: Draws) -> Drawn:
        """Of a run, on samples that all runs share."""
        values = {name: float(value[0]) for name, value in told.figures(np.ones((1, len(told.truth)))).items()}
        parts = [told.figures(weights) for weights in draws.weights(told.said.patients)]
        return cls(values, {name: np.concatenate([part[name] for part in parts]) for name in values})


Drawns = Mapping[int, Drawn]  # by seed
Times = Mapping[int, Ints]  # by seed: (R,) how often it is drawn


def standing(settings: PaperConfig, told: Mapping[Cell, Told]) -> dict[str, list[Row]]:
    """Every recipe's rows, in their order; those without a finished fine-tuning are left out."""
    first = next(iter(told.values()))
    draws = Draws.of(first.truth, first.said.patients, settings.replicates, settings.seed)
    drawn = {cell: Drawn.of(one, draws) for cell, one in told.items()}
    times = seed_draws(len(settings.seeds), settings.replicates, settings.seed)
    column = {seed: times[:, place] for place, seed in enumerate(settings.seeds)}
    found: dict[str, list[Row]] = {}
    for recipe in settings.finetune:
        of = {
            name: {s: drawn[name, recipe, s] for s in settings.seeds if (name, recipe, s) in drawn}
            for name in settings.pretrain
        }
        base = of[settings.against]
        rows = [row_of(name, mine, {} if mine is base else base, column) for name, mine in of.items() if mine]
        found |= {recipe: rows} if rows else {}
    return found


def row_of(name: str, mine: Drawns, base: Drawns, column: Times) -> Row:
    """A row: means over its seeds, and the difference over the seeds that the row compared with has, too."""
    figures = {figure: across(mine, figure, column) for figure in next(iter(mine.values())).values}
    apart = {
        seed: Drawn(
            {ACCURACY: one.values[ACCURACY] - base[seed].values[ACCURACY]},
            {ACCURACY: one.samples[ACCURACY] - base[seed].samples[ACCURACY]},
        )
        for seed, one in mine.items()
        if seed in base
    }
    ahead = across(apart, ACCURACY, column) if apart else None
    return Row(name, figures, ahead, {seed: one.values[ACCURACY] for seed, one in mine.items()})


def across(of: Drawns, figure: str, column: Times) -> Estimate:
    """The mean over seeds with its interval."""
    samples = {seed: one.samples[figure] for seed, one in of.items()}
    return Estimate.of(float(np.mean([one.values[figure] for one in of.values()])), over_seeds(samples, column))


# ---------------------------------------------------------------------------------------------- what is written


def content(
    settings: PaperConfig, told: Mapping[Cell, Told], found: Found, failed: Mapping[str, str]
) -> dict[str, Any]:
    """result.json."""
    first = next(iter(told.values()))
    recipe, leading = next(iter(found.items()))
    detail = f"recipe {recipe}"
    return {
        "task": first.result["task"],
        "split": "official train and test",
        "metric": ACCURACY,
        **(cell(leading[0].figures[ACCURACY]) or {}),
        "n_images": len(first.truth),
        "n_patients": len(np.unique(first.said.patients)),
        "classes": counted(first),
        "rows": [
            *({"name": row.name, **(cell(row.figures[ACCURACY]) or {}), "detail": detail} for row in leading),
            {"name": "majority class", "value": majority(first), "interval": None},
        ],
        "differences": [
            {"name": f"{row.name} - {settings.against}", **(cell(row.ahead) or {}), "detail": detail}
            for row in leading
            if row.ahead is not None
        ],
        "tables": [*(table_of(settings, *one) for one in found.items()), costs(settings)],
        "notes": list(notes(settings, first, failed)),
    }


def counted(one: Told) -> dict[str, int]:
    """Judged lesions of each class."""
    counts = np.bincount(one.truth, minlength=len(one.said.classes))
    return dict(zip(one.said.classes, counts.tolist(), strict=True))


def majority(one: Told) -> float:
    """Accuracy of the most frequent judged class, always answered."""
    return max(counted(one).values()) / len(one.truth)


def table_of(settings: PaperConfig, recipe: str, rows: Sequence[Row]) -> Table:
    """A recipe's table."""
    others = [name for name in rows[0].figures if name in SHOWN]
    columns = ["pretraining", ACCURACY, f"ahead of {settings.against}", *others, "by seed", "published accuracy"]
    return {
        "title": f"Recipe {recipe}",
        "columns": columns,
        "rows": [
            [
                row.name,
                cell(row.figures[ACCURACY]),
                None if row.ahead is None else (cell(row.ahead) or {}) | {"signed": True},
                *(cell(row.figures[name]) for name in others),
                ", ".join(f"{value:.3f}" for value in row.by_seed.values()),
                settings.published[row.name].accuracy if row.name in settings.published else None,
            ]
            for row in rows
        ],
        "note": f"Seeds {', '.join(map(str, settings.seeds))} of the fine-tuning; differences are paired.",
    }


SHOWN = ("balanced accuracy", "AUC", "AUC, one against the rest", "macro F1", "ECE")


def costs(settings: PaperConfig) -> Table:
    """What the pretrainings took."""
    rows: list[list[Any]] = []
    for name, entry in settings.pretrain.items():
        log = Path(settings.out, "pretrain", name, "metrics.jsonl")
        lines = read_metrics(log) if entry.preset is not None and log.is_file() else []
        if lines:
            peak = max(line["peak_memory_bytes"] for line in lines) / 2**30
            rows.append([name, lines[-1]["step"], median(line["images_per_s"] for line in lines), peak])
    note = (
        "On a processor the peak is the whole process', what was run before it included; on a GPU it is the run's own."
    )
    columns = ["pretraining", "steps", "images/s", "peak memory, GiB"]
    return {"title": "What the pretrainings took", "columns": columns, "rows": rows, "note": note}


def notes(settings: PaperConfig, one: Told, failed: Mapping[str, str]) -> Iterator[str]:
    """What the reader must know before comparing."""
    n, patients, classes = len(one.truth), len(np.unique(one.said.patients)), one.said.classes
    if any(patient.startswith("phantom") for patient in one.said.patients):
        yield "These are phantoms and no patients: the figures show that the experiment runs, and nothing of CBIS-DDSM."
    yield (
        f"Task {one.result['task']}: {len(classes)} classes, {n} lesions of {patients} test patients, none of whom was "
        f"trained on here; always answering the most frequent class is right in {majority(one):.1%}. With "
        f"so many lesions an accuracy of 60 % has a 95 % interval of about +-{1.96 * (0.24 / n) ** 0.5:.1%}, if all "
        "were independent."
    )
    if settings.published:
        told = "; ".join(f"{name} {entry.accuracy:.1%} ({entry.source})" for name, entry in settings.published.items())
        yield (
            f"Published: {told}. These come without an interval and from one run each, on test patients of whom some "
            "were in training unless the authors took them out; image size, epochs and split of that version are not "
            "known. They stand beside our figures, and are no baseline to be tested against."
        )
    if len(classes) == 4:
        yield (
            "Of the official CBIS-DDSM test lesions 60.8 % are benign, so 61 % right would be the trivial answer to "
            "benign against malignant. The published figures make sense for four classes, the most frequent of which "
            "makes 32.8 % there."
        )
    yield (
        f"Intervals: 95 %, {settings.replicates} bootstrap samples of patients and of the {len(settings.seeds)} seeds "
        "of the fine-tuning. There is one pretraining a row: what another seed of it would change is not in them."
    )
    yield from (f"Failed: {which}: {why}" for which, why in failed.items())


def table_csv(settings: PaperConfig, found: Found) -> str:
    """table.csv: one row a recipe and pretraining, every figure."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    figures = list(next(iter(found.values()))[0].figures)
    spread = [f"{name}{part}" for name in (*figures, f"ahead of {settings.against}") for part in ("", " low", " high")]
    table.writerow(["recipe", "pretraining", "seeds", *spread, "published accuracy"])
    for recipe, rows in found.items():
        for row in rows:
            known = [*row.figures.values(), row.ahead]
            numbers = [number for of in known for number in (("",) * 3 if of is None else (of.value, *of.interval))]
            published = settings.published.get(row.name)
            seeds = " ".join(map(str, row.by_seed))
            table.writerow([recipe, row.name, seeds, *numbers, published.accuracy if published else ""])
    return buffer.getvalue()


def draw(path: Path, settings: PaperConfig, first: Told, found: Found) -> None:
    """Every row's accuracy under each recipe, and what was published."""
    names = list(settings.pretrain)
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(names)), layout="constrained")
    axis = figure.add_subplot(xlabel=f"accuracy, {first.result['task']}")
    step = 0.5 / max(1, len(found))
    for number, (recipe, rows) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [names.index(row.name) + (number - (len(found) - 1) / 2) * step for row in rows]
        axis.plot([row.figures[ACCURACY].value for row in rows], places, "o", color=colour, label=recipe)
        for place, row in zip(places, rows, strict=True):
            axis.hlines(place, *row.figures[ACCURACY].interval, color=colour, linewidth=1.2)
    for number, (name, entry) in enumerate(settings.published.items()):
        axis.plot(entry.accuracy, names.index(name), "x", color="black", label="published" if not number else None)
    axis.axvline(majority(first), color="#d0d5da", linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
