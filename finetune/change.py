"""What a locked model's figures changed by, from its run's own test to another set.

Two sets without a patient in common are independent, and so are their bootstrap samples: the interval of the figure
that leads is that of the differences of samples. Of other figures and of subgroups only intervals are known; theirs are
combined (Zou and Donner 2008): of estimates a in [l, u] and b in [L, U], a - b lies in

    [a - b - sqrt((a - l)^2 + (U - b)^2),  a - b + sqrt((u - a)^2 + (b - L)^2)]

With patients in common no difference has an interval.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import UserError, one_line
from ..engine.files import read_json
from ..engine.metrics import Estimate, Floats, headline
from ..engine.metrics.panel import panel
from ..engine.result import parse_result, why
from ..engine.run import RESULT
from ..engine.seeding import stable_seed
from .classify.bootstrap import Draws, cell
from .classify.cards import ModelCard
from .classify.config import FinetuneSection, Level
from .classify.judged import Judged
from .classify.labels import Labelled
from .classify.predictions import Predictions, read_predictions
from .classify.targets import Target
from .classify.units import LEVELS, PLURAL, Cases, cases, counted

Table = dict[str, Any]
APART = "Intervals of differences are combined from both sets' (Zou and Donner 2008)."
TOGETHER = "Differences have no intervals, as the sets share patients."


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
    first, rest = list(content["tables"][1:2]), content["tables"][2:]
    try:
        said, own, tables = own_test(run, card)
    except UserError as error:
        reason = str(error).replace(f"{run}{os.sep}", "")  # the report must not tell whose machine it was
        return [], [*first, *rest], [f"No comparison with the run's own test: {reason}."]
    shared = len(np.intersect1d(hashed(own.patients), hashed(judged.labelled.patients)))
    apart = not shared
    told = [*overall(tables, content, card, apart), *first, *(beside(table, tables, card, apart) for table in rest)]
    return list(differences(said, own, card, judged, section, seed, apart)), told, [what_differs(shared)]


def what_differs(shared: int) -> str:
    """What the differences are, and where they have no intervals why."""
    if not shared:
        return "Differences are to the run's own test, whose patients are others: negative is less here."
    return (
        f"{counted(shared, 'patient')} of this set {'is' if shared == 1 else 'are'} in the run's own test, too: what "
        "the sets have in common is in both figures, so that the differences (negative is less here) have no intervals."
    )


def hashed(patients: NDArray[np.str_]) -> NDArray[np.str_]:
    """(n,) patients without their data set, which may have been made again under another name."""
    return np.array([patient.rpartition("/")[2] for patient in patients.tolist()])


def own_test(run: Path, card: ModelCard) -> tuple[Predictions, Labelled, dict[str, Table]]:
    """What a run said of its own test: images, their truth, and tables by title, as far as they can be read.

    Raises:
        UserError: a file is missing, damaged, or not of this model.
    """
    path, said = run / "result.json", read_predictions(run / "predictions.csv")
    read_json(path, RESULT)
    try:
        result = parse_result(path.read_text(), [])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({one_line(why(error))})") from error
    if said.classes != card.target.classes:
        here, there = (", ".join(map(repr, classes)) for classes in (said.classes, card.target.classes))
        raise UserError(f"predictions.csv is of the classes {here}, and the model of {there}")
    if result.n_images is not None and result.n_images != len(said.keys):
        raise UserError(
            f"predictions.csv holds {counted(len(said.keys), 'image')}, and result.json is of {result.n_images}"
        )
    own = said.labelled(card.target.name, card.target.kind, card.target.separator)
    return said, own, {table.title: table.model_dump(exclude_unset=True) for table in result.tables}


# ---------------------------------------------------------------------------------------------- sample by sample


def differences(
    said: Predictions, own: Labelled, card: ModelCard, judged: Judged, section: FinetuneSection, seed: int, apart: bool
) -> Iterator[dict[str, Any]]:
    """The leading figure here minus that of the own test, at every level."""
    target, other = card.target.target, stable_seed(seed, "own test") % 2**63
    ours = Draws.of(own.truth, own.patients, section.replicates, other)
    theirs = Draws.of(judged.labelled.truth, judged.labelled.patients, section.replicates, seed)
    for level in LEVELS:
        before = cases(own, own.rows, said.probabilities, said.fold, level, section.readout)
        now = judged.cases(level, section.readout)
        a, b = leading(target, now, theirs, card, level), leading(target, before, ours, card, level)
        tell = apart and theirs.differ(now.patients) and ours.differ(before.patients)
        gap = cell(Estimate.of(float(a[0] - b[0]), a[1:] - b[1:] if tell else a[:0]))
        yield {"name": f"by {level}: here - own test", **(gap or {"value": None, "interval": None})}


def leading(target: Target, of: Cases, draws: Draws, card: ModelCard, level: Level) -> Floats:
    """(1 + R,) the figure that leads, then its bootstrap samples; nan without a case."""
    if not len(of):
        return np.full(1 + len(draws.times), np.nan)
    decided = target.decide(of.probabilities, card.thresholds[level])
    folds = of.fold if len(np.unique(of.fold)) > 1 else None
    weights = [np.ones((1, len(of))), *draws.weights(of.patients)]
    found = (panel(target.kind, of.truth, of.probabilities, decided, part, folds) for part in weights)
    return np.concatenate([figures[headline(target.kind)] for figures in found])


# ---------------------------------------------------------------------------------------------- interval by interval


def overall(own: Mapping[str, Table], here: Mapping[str, Any], card: ModelCard, apart: bool) -> Iterator[Table]:
    """Every figure of the level that leads, in the own test and here; nothing where the own test's are lost."""
    column, now = 1 + LEVELS.index(card.headline), here["tables"][0]
    then = own.get(now["title"])
    if then is None or len(then["columns"]) != len(now["columns"]):
        return
    before = {row[0]: row[column] for row in then["rows"]}
    told = ((row[0], before.get(row[0]), row[column]) for row in now["rows"] if row[0] in before)
    yield {
        "title": f"Against the run's own test ({PLURAL[card.headline]})",
        "columns": ["figure", "own test", "here", "here - own test"],
        "rows": [[name, was, value, gap(value, was, apart)] for name, was, value in told if was or value],
        "note": f"The own test's figures are of models that never saw its patients. {APART if apart else TOGETHER}",
    }


def beside(table: Table, own: Mapping[str, Table], card: ModelCard, apart: bool) -> Table:
    """A subgroup table with the leading figure of the same group in the own test."""
    metric, same = headline(card.target.kind), own.get(table["title"], {"columns": []})
    if metric not in table["columns"] or metric not in same["columns"]:
        return table
    before = {row[0]: row[same["columns"].index(metric)] for row in same["rows"]}
    place = table["columns"].index(metric)
    rows = [[*row, before.get(row[0]), gap(row[place], before.get(row[0]), apart)] for row in table["rows"]]
    columns = [*table["columns"], f"{metric}, own test", "here - own test"]
    return {**table, "columns": columns, "rows": rows, "note": f"{table['note']} {APART if apart else TOGETHER}"}


def gap(here: Any, before: Any, apart: bool) -> dict[str, Any] | None:
    """The difference of two cells, with an interval if their sets are independent; None where one has no figure."""
    known = [one for one in (here, before) if isinstance(one, dict) and one["value"] is not None]
    if len(known) < 2:
        return None
    value, (a, b) = here["value"] - before["value"], (one.get("interval") for one in known)
    interval = combined(here["value"], a, before["value"], b) if apart and a and b else None
    return {"value": value, "interval": interval}


def combined(a: float, of_a: Sequence[float], b: float, of_b: Sequence[float]) -> list[float]:
    """The interval of a - b, from those of two independent estimates."""
    (low, high), (least, most) = of_a, of_b
    return [a - b - math.hypot(a - low, most - b), a - b + math.hypot(high - a, b - least)]
