"""What a locked model's figures changed by, from its run's own test to another set.

The two sets are independent, so are their bootstrap samples: the interval of the figure that leads is that of the
differences of samples. Of other figures and of subgroups only intervals are known; theirs are combined (Zou and Donner
2008): of estimates a in [l, u] and b in [L, U], a - b lies in

    [a - b - sqrt((a - l)^2 + (U - b)^2),  a - b + sqrt((u - a)^2 + (b - L)^2)]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import UserError
from ..engine.files import read_json
from ..engine.metrics import Estimate, Floats, headline
from ..engine.metrics.panel import panel
from ..engine.run import RESULT
from ..engine.seeding import stable_seed
from .classify.bootstrap import Draws, cell
from .classify.cards import ModelCard
from .classify.config import FinetuneSection, Level
from .classify.judged import Judged
from .classify.labels import Labelled
from .classify.predictions import Predictions, read_predictions
from .classify.targets import Target
from .classify.units import LEVELS, PLURAL, Cases, cases

Table = dict[str, Any]
METHOD = "Their intervals are combined from both sets' (Zou and Donner 2008)."


def against(
    run: Path, card: ModelCard, judged: Judged, content: Mapping[str, Any], section: FinetuneSection, seed: int
) -> tuple[list[dict[str, Any]], list[Table], list[str]]:
    """Differences to the run's own test, the tables after the first with them, and what is to be said.

    Args:
        run: the finetune run; of a copied model folder alone nothing is known.
        card: of its model.
        judged: the other set.
        content: its figures.
        section: read-out and number of bootstrap samples.
        seed: of the samples.
    """
    try:
        own, result = read_predictions(run / "predictions.csv"), read_json(run / "result.json", RESULT)
    except UserError as error:
        return [], list(content["tables"][1:]), [f"No comparison with the run's own test: {error}."]
    tables = [overall(result, content, card), *content["tables"][1:2]]
    tables += [beside(table, result) for table in content["tables"][2:]]
    told = ["Differences are to the run's own test, whose patients are others: negative is less here."]
    if both := len(np.intersect1d(own.patients, judged.labelled.patients)):
        told = [f"{both} patients are in the run's own test, too: the differences are of no independent sets."]
    return list(differences(own, card, judged, section, seed)), tables, told


# ---------------------------------------------------------------------------------------------- sample by sample


def differences(
    own: Predictions, card: ModelCard, judged: Judged, section: FinetuneSection, seed: int
) -> list[dict[str, Any]]:
    """The leading figure here minus that of the own test, at every level."""
    target, everything = card.target.target, np.arange(len(own.keys))
    known = Labelled(
        target,
        everything,
        own.coded(own.truth, target.kind, card.target.separator),
        own.patients,
        own.breasts,
        own.keys,
        np.full(len(own.keys), ""),
        {},
    )
    other = stable_seed(seed, "own test") % 2**63
    ours = Draws.of(known.truth, known.patients, section.replicates, other)
    theirs = Draws.of(judged.labelled.truth, judged.labelled.patients, section.replicates, seed)
    found = []
    for level in LEVELS:
        before = cases(known, everything, own.probabilities, own.fold, level, section.readout)
        a = leading(target, judged.cases(level, section.readout), theirs, card, level)
        b = leading(target, before, ours, card, level)
        gap = cell(Estimate.of(float(a[0] - b[0]), a[1:] - b[1:])) or {"value": None, "interval": None}
        found.append({"name": f"by {level}: here - own test", **gap})
    return found


def leading(target: Target, of: Cases, draws: Draws, card: ModelCard, level: Level) -> Floats:
    """(1 + R,) the figure that leads, then its bootstrap samples."""
    decided = target.decide(of.probabilities, card.thresholds[level])
    folds = of.fold if len(np.unique(of.fold)) > 1 else None
    weights = [np.ones((1, len(of))), *draws.weights(of.patients)]
    found = (panel(target.kind, of.truth, of.probabilities, decided, part, folds) for part in weights)
    return np.concatenate([figures[headline(target.kind)] for figures in found])


# ---------------------------------------------------------------------------------------------- interval by interval


def overall(own: Mapping[str, Any], here: Mapping[str, Any], card: ModelCard) -> Table:
    """Every figure of the level that leads, in the own test and here."""
    column = 1 + LEVELS.index(card.headline)
    before = {row[0]: row[column] for row in own["tables"][0]["rows"]}
    now = {row[0]: row[column] for row in here["tables"][0]["rows"]}
    rows = [[name, before[name], value, gap(value, before[name])] for name, value in now.items() if name in before]
    note = f"The own test's figures are of models that never saw its patients. {METHOD}"
    return {
        "title": f"Against the run's own test ({PLURAL[card.headline]})",
        "columns": ["figure", "own test", "here", "here - own test"],
        "rows": [row for row in rows if row[1] or row[2]],
        "note": note,
    }


def beside(table: Table, own: Mapping[str, Any]) -> Table:
    """A subgroup table with the leading figure of the same group in the own test."""
    same = [one for one in own["tables"] if one["title"] == table["title"]]
    metric = next((name for name in table["columns"] if name == own["metric"]), None)
    if not same or metric not in same[0]["columns"]:
        return table
    before = {row[0]: row[same[0]["columns"].index(metric)] for row in same[0]["rows"]}
    place = table["columns"].index(metric)
    rows = [[*row, before.get(row[0]), gap(row[place], before.get(row[0]))] for row in table["rows"]]
    columns = [*table["columns"], f"{metric}, own test", "here - own test"]
    return {**table, "columns": columns, "rows": rows, "note": f"{table['note']} {METHOD}"}


def gap(here: Any, before: Any) -> dict[str, Any] | None:
    """The difference of two cells of independent sets; None where one has no figure."""
    if not (isinstance(here, dict) and isinstance(before, dict)):
        return None
    value = here["value"] - before["value"]
    if here["interval"] is None or before["interval"] is None:
        return {"value": value, "interval": None}
    return {"value": value, "interval": combined(here["value"], here["interval"], before["value"], before["interval"])}


def combined(a: float, of_a: Sequence[float], b: float, of_b: Sequence[float]) -> list[float]:
    """The interval of a - b, from those of two independent estimates."""
    (low, high), (least, most) = of_a, of_b
    return [a - b - math.hypot(a - low, most - b), a - b + math.hypot(high - a, b - least)]
