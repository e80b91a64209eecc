"""What judged images are worth: the figures of a finetune run, of a locked model on another set, of a sweep's cell.

Every metric at the level of images, breasts and patients, calibration before and after temperature, and the same
group by group, all with intervals from the same bootstrap samples of patients; and what they hold, in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...data.table import Rows
from ...engine.metrics import Estimate, Floats, Ints, Kind, Metric, chance, headline, panel
from ...engine.metrics.calibration import brier, ece, log_loss
from .bootstrap import Draws, Figures, Table, cell, delong_within, estimated
from .config import FinetuneSection, Level
from .judged import Judged
from .subgroups import groupings, subgroup_table
from .units import LEVELS, PLURAL, Cases, counted

FEW_PATIENTS = 50  # below, intervals of a bootstrap over patients are too short to be left without a word
CALIBRATION = {"ECE": ece, "Brier": brier, "log loss": log_loss}
NOT_JUDGED = "chosen on validation patients, none of whom is judged"


@dataclass(frozen=True)
class AtLevel:
    """A level's cases, what was decided on them, every figure with its interval."""

    cases: Cases
    decided: Ints
    figures: Mapping[str, Estimate]


def figures_of(
    judged: Judged, rows: Rows, section: FinetuneSection, seed: int, label: str | None = None
) -> dict[str, Any]:
    """What result.json says of judged images, ready for JSON: None where a figure or an interval cannot be computed.

    Args:
        judged: images with their logits, temperatures and thresholds.
        rows: of the data set, which say what divides it into subgroups.
        section: read-out, level that leads, subgroups, bootstrap samples, and how thresholds were chosen.
        seed: of the bootstrap.
        label: that the truth was taken from, where it is called otherwise than the task; it makes no subgroups.
    """
    labelled, target = judged.labelled, judged.labelled.target
    truth, metric = labelled.truth[judged.images], headline(target.kind)
    draws = Draws.of(truth, labelled.patients[judged.images], section.replicates, seed)
    levels = at_levels(judged, section, draws)
    return {
        "task": target.name,
        "kind": target.kind,
        "level": section.headline,
        "metric": metric,
        **(cell(levels[section.headline].figures.get(metric)) or NOTHING),
        "n_images": len(judged.images),
        "n_patients": len(draws.patients),
        "classes": count(target.kind, target.classes, truth),
        "rows": [*level_rows(levels, metric), majority(metric, len(target.classes))],
        "tables": [
            level_table(levels, target.kind),
            calibration_table(judged, levels["image"], draws),
            *subgroups(judged, rows, levels, section, seed, label or target.name),
        ],
        "notes": [
            *what_is_judged(target.kind, levels, section),
            what_intervals_hold(draws, section.replicates),
            *how_compared(judged.grouped),
            how_decided(target.kind, section),
        ],
    }


NOTHING: Mapping[str, None] = {"value": None, "interval": None}


def at_levels(judged: Judged, section: FinetuneSection, draws: Draws) -> dict[Level, AtLevel]:
    """Cases, decisions and figures of every level; a level without cases has no figures."""
    found = {}
    for level in LEVELS:
        of = judged.cases(level, section.readout)
        decided = judged.decided(of)
        figures = estimated(all_of(judged, of, decided), of.patients, draws) if len(of) else {}
        found[level] = AtLevel(of, decided, figures)
    return found


def all_of(judged: Judged, of: Cases, decided: Ints) -> Figures:
    """Every figure of the task's kind, as a function of weights."""
    kind, groups = judged.labelled.target.kind, of.fold if judged.grouped else None
    return partial(panel, kind, of.truth, of.probabilities, decided, groups=groups)


def count(kind: Kind, classes: Sequence[str], truth: Ints) -> dict[str, int]:
    """Images of each class, or with each label."""
    counts = truth.sum(0) if kind == "multilabel" else np.bincount(truth, minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------- rows and tables


def level_rows(levels: Mapping[Level, AtLevel], metric: Metric) -> Iterator[dict[str, Any]]:
    """One figure at every level."""
    for level, found in levels.items():
        figure = cell(found.figures.get(metric)) or NOTHING
        yield {"name": f"by {level}", **figure, "detail": counted(len(found.cases), level)}


def majority(metric: Metric, classes: int) -> dict[str, Any]:
    """The row of the most frequent class, always answered."""
    return {"name": "majority class", "value": chance(metric, classes), "interval": None}


def level_table(levels: Mapping[Level, AtLevel], kind: Kind) -> Table:
    """Every figure at every level; the AUC of patients with DeLong's interval too."""
    rows: list[list[Any]] = []
    for name in dict.fromkeys(name for found in levels.values() for name in found.figures):
        rows.append([name, *(cell(found.figures.get(name)) for found in levels.values())])
        if (kind, name) == ("binary", "AUC"):
            rows.append(["AUC, interval by DeLong", None, None, cell(delong_within(levels["patient"].cases))])
    return {
        "title": "Figures by level",
        "columns": ["figure", *(counted(len(found.cases), level) for level, found in levels.items())],
        "rows": rows,
        "note": "DeLong's interval wants independent cases, so it is of patients alone." if kind == "binary" else "",
    }


def calibration_table(judged: Judged, images: AtLevel, draws: Draws) -> Table:
    """How far probabilities are from frequencies, before and after temperature."""
    of = images.cases

    def uncalibrated(weights: Floats) -> dict[str, Floats]:
        kind = judged.labelled.target.kind
        return {name: figure(kind, of.truth, judged.uncalibrated, weights) for name, figure in CALIBRATION.items()}

    before = estimated(uncalibrated, of.patients, draws)
    found = ", ".join(f"{judged.temperatures[fold]:.3g}" for fold in np.unique(judged.fold).tolist())
    return {
        "title": "Calibration of images",
        "columns": ["figure", "before", "after temperature"],
        "rows": [[name, cell(before[name]), cell(images.figures[name])] for name in CALIBRATION],
        "note": f"Lower is better. Temperature{', fold by fold' * judged.grouped}: {found}.",
    }


def subgroups(
    judged: Judged, rows: Rows, levels: Mapping[Level, AtLevel], section: FinetuneSection, seed: int, label: str
) -> Iterator[Table]:
    """A table for every column that divides the images, of the coarsest level up to the leading one that it divides."""
    labelled, finer = judged.labelled, LEVELS[LEVELS.index(section.headline) :: -1]
    for name, values in groupings(rows, labelled.rows, section.subgroups, label).items():
        for found in (levels[level] for level in finer):
            group = found.cases.grouped_by(values)
            if group is not None and len(np.unique(group)) > 1:
                yield subgroup_table(judged, found.cases, found.decided, name, group, section.replicates, seed)
                break


# ---------------------------------------------------------------------------------------------- notes


def what_is_judged(kind: Kind, levels: Mapping[Level, AtLevel], section: FinetuneSection) -> Iterator[str]:
    """The unit of the figures, and what has none."""
    word = {"mean": "mean", "max": "worst" if kind == "ordinal" else "largest"}
    asked = (section.readout.views, section.readout.breasts)
    views, breasts = ("mean" if kind == "multiclass" else word[how] for how in asked)
    yield (
        f"The figure that leads is of {PLURAL[section.headline]}. A breast's probability is the {views} over its "
        f"images, a patient's the {breasts} over her breasts; an image of unknown side is a breast of its own."
    )
    lost = [f"{f.cases.left_out} of {PLURAL[level]}" for level, f in levels.items() if f.cases.left_out]
    if lost:
        yield f"Left out, as their images are of different classes: {', '.join(lost)}."


def what_intervals_hold(draws: Draws, replicates: int) -> str:
    """What the intervals are of, and what is not in them."""
    if len(draws.patients) < 2:
        return "There are no intervals: all images are of one patient."
    few = f" With {len(draws.patients)} patients they are too short to be taken at their word."
    return (
        f"Intervals: 95 %, {replicates} bootstrap samples of patients, the same at every level. They hold the trained "
        "models, temperatures and thresholds fixed: the spread over folds, seeds and training sets is not in them."
        + few
        * (len(draws.patients) < FEW_PATIENTS)
    )


def how_compared(grouped: bool) -> Iterator[str]:
    """What several folds mean for a figure."""
    if grouped:
        yield (
            "AUC and partial AUC compare cases of the same fold alone, as models of different folds are not on one "
            "scale; a fold counts by its pairs. The other figures are over all judged cases together."
        )


def how_decided(kind: Kind, section: FinetuneSection) -> str:
    """What a decision is."""
    if kind in ("multiclass", "ordinal"):
        answer = "the most probable class" if kind == "multiclass" else "the class at the median of its distribution"
        return f"Decided is {answer}. The temperature was {NOT_JUDGED}."
    point = {
        "youden": "with the largest sum of sensitivity and specificity",
        "sensitivity": f"with the largest specificity at a sensitivity of at least {section.operating_at:g}",
        "specificity": f"with the largest sensitivity at a specificity of at least {section.operating_at:g}",
    }[section.operating_point]
    return f"Decided is by a threshold for each level, the one {point}. It and the temperature were {NOT_JUDGED}."
