"""Models side by side: every model x seed of the `sweep` section is one run, and tables the product.

    OUT/cells/MODEL/seed-0/    a segment run
    OUT/result.json            a table a figure; mean Dice leads
    OUT/table.csv              one row a model and figure
    OUT/figures/sweep.png

All cells get the same data, folds and steps. A cell that is finished is read and not run again, one that was stopped
goes on, one that fails is named and the others go on: the same command takes the sweep up wherever it was.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.config import Tree, check, dump_yaml, parse_yaml
from ...engine.errors import RunFailed, UserError, did_you_mean, one_line
from ...engine.files import write_atomic
from ...engine.run import Run, open_run
from ..cells import folder_of, merged, tell, work_through
from ..classify.bootstrap import cell
from ..classify.comparison import Standing, standings
from ..classify.judging import FEW_PATIENTS
from ..classify.sweep_figure import draw_sweep
from ..classify.sweep_table import numbers, scaled
from .config import SegmentConfig, SegmentSweepSection
from .told import LEADING, SHOWN, Told, read_run

SAME = ("classes", "lesion", "unmasked", "folds", "holdout", "threshold", "hit_iou", "tolerance_mm", "tolerance_px")
UNITS: Mapping[str, tuple[str, float]] = {
    "trainable": ("trainable", 1),
    "parameters": ("of", 1),
    "peak_memory_bytes": ("peak memory, MB", 1e6),
    "images_per_s": ("crops/s", 1),
    "seconds": ("s a run", 1),
}
CAPTION = (
    "Mean Dice of every model, the mean over seeds, with its 95 % interval over patients and seeds; small dots are the "
    "seeds. Intervals of two models may overlap where their paired difference is clear: see the tables."
)
Standings = Mapping[str, Mapping[str, Standing]]  # of each figure its models, in their order


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the sweep."""

    model: str
    seed: int
    settings: SegmentConfig

    @property
    def run(self) -> Run:
        """Its folder."""
        return Run(Path(self.settings.out), "segment")

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"


def sweep(settings: SegmentConfig, one: Callable[[SegmentConfig], Run], inputs: Mapping[str, str] | None = None) -> Run:
    """`miram segment CONFIG --sweep`.

    Args:
        settings: the `sweep` section says which cells, the rest what they have in common; `seed` is the bootstrap's.
        one: makes one run, or goes on with it.
        inputs: digests of what all cells read, by name.

    Raises:
        UserError: a cell cannot be, or the run folder is not usable.
        Preempted: stopped on a signal; the cells that are finished are kept.
        RunFailed: cells failed; the tables hold the others.
    """
    cells, main = list(grid(settings)), os.environ.get("RANK", "0") == "0"
    run = open_run(settings, settings.out, "sweep", inputs, writes=main)
    if run.finished:
        print(f"{run.folder} is finished; nothing to do")
        tell(run)
        return run
    with run.recorded(writes=main):
        failed = work_through(cells, one)
        if main:
            write(run, settings, cells, failed)
            tell(run)
        if failed:
            first = f"{next(iter(failed))}: {next(iter(failed.values()))}"
            raise RunFailed(
                f"{len(failed)} of {len(cells)} runs of the sweep failed and are named in {run.folder}/result.json, "
                f"which holds the others; the first: {first}; the same command tries them again"
            )
    return run


# ---------------------------------------------------------------------------------------------- the cells


def grid(settings: SegmentConfig) -> Iterator[Cell]:
    """Every cell, model by model.

    Raises:
        UserError: a model has settings that cannot be, two have one folder, or `against` is none of them.
    """
    section, folders = settings.sweep, set()
    if section.against not in section.models:
        hint = did_you_mean(section.against, list(section.models))
        raise UserError(f"sweep.against={section.against} is none of sweep.models{hint}")
    for name, changes in section.models.items():
        for seed in section.seeds:
            out = Path(settings.out, "cells", folder_of(name), f"seed-{seed}")
            if out in folders:
                raise UserError(f"sweep: {name} at seed {seed} is named twice, or much like another; rename one")
            folders.add(out)
            yield Cell(name, seed, derived(settings, name, changes, seed, str(out)))


def derived(settings: SegmentConfig, name: str, changes: Tree, seed: int, out: str) -> SegmentConfig:
    """A cell's own configuration. Options are a model's and a method's own: others start from their defaults.

    Raises:
        UserError: a key or value that the segment section does not take, or one that all cells share.
    """
    tree: Tree = parse_yaml(dump_yaml(settings), "the sweep's configuration")
    common = settings.segment
    if changes.get("model", common.model) != common.model:
        tree["segment"] |= {"model_options": {}, "control": None}
    if changes.get("method", common.method) != common.method:
        tree["segment"]["options"] = {}
    tree["segment"] = merged(tree["segment"], changes)
    tree |= {"out": out, "seed": seed, "sweep": SegmentSweepSection().model_dump(mode="json")}
    made: SegmentConfig = check(SegmentConfig, tree, f"sweep.models, {name}")
    if odd := [f"segment.{key}" for key in SAME if getattr(common, key) != getattr(made.segment, key)]:
        raise UserError(f"sweep.models: {name} differs in {', '.join(odd)}, which all models share; leave it out")
    return made


# ---------------------------------------------------------------------------------------------- what it gives


def write(run: Run, settings: SegmentConfig, cells: Sequence[Cell], failed: dict[Cell, str]) -> None:
    """Tables and picture; a finished cell that cannot be read or compared is added to the failed ones."""
    told = read_cells(cells, failed)
    found = place(settings, told)
    write_atomic(run.folder / "table.csv", table_csv(settings, found))
    if told:
        draw_sweep(run.caption({"sweep.png": CAPTION}) / "sweep.png", {1.0: found[LEADING]}, LEADING)
    run.result(content(settings, found, failed, [*told.values()]))


def read_cells(cells: Sequence[Cell], failed: dict[Cell, str]) -> dict[Cell, Told]:
    """What finished cells say, as far as they judged the same images by the same rules."""
    told: dict[Cell, Told] = {}
    for one in (one for one in cells if one not in failed):
        try:
            told[one] = read_run(one.run.folder)
            told[one].check_beside(next(iter(told.values())))
        except UserError as error:
            told.pop(one, None)
            failed[one] = one_line(str(error))
    return told


def place(settings: SegmentConfig, told: Mapping[Cell, Told]) -> Standings:
    """The models by every figure that all of them have."""
    section, models = settings.sweep, dict.fromkeys(one.model for one in told)
    names = [name for name in SHOWN if all(name in one.names for one in told.values())] if told else []
    found = {}
    for name in names:
        of = {m: {one.seed: said.by(name) for one, said in told.items() if one.model == m} for m in models}
        found[name] = standings(of, section.seeds, section.against, settings.segment.replicates, settings.seed)
    return found


def content(
    settings: SegmentConfig, found: Standings, failed: Mapping[Cell, str], told: Sequence[Told]
) -> dict[str, Any]:
    """result.json: the first model leads; with nothing judged it only says why."""
    top, against = [*found.get(LEADING, {}).values()], settings.sweep.against
    nothing = {"value": None, "interval": None}
    shared = ("task", "split", "n_images", "n_patients", "classes")
    reasons = [[one.model, one.seed, why] for one, why in failed.items()]
    lost = {"title": "Runs that failed", "columns": ["model", "seed", "why"], "rows": reasons, "note": ""}
    return {
        **{key: told[0].result[key] for key in shared if told and key in told[0].result},
        "metric": LEADING,
        **((cell(top[0].value) if top else None) or nothing),
        "rows": [{"name": s.method, **(cell(s.value) or nothing), "detail": by_seed(s)} for s in top],
        "differences": [
            {"name": f"{s.method} \N{MINUS SIGN} {against}", **(cell(s.difference) or nothing), "detail": told_p(s)}
            for s in top
            if s.difference is not None
        ],
        "notes": notes(settings, told) if told else [],
        "tables": [*(table_of(settings, name, of) for name, of in found.items()), *([lost] if reasons else [])],
    }


def by_seed(standing: Standing) -> str:
    """The figure of every seed."""
    return "seeds " + ", ".join(f"{value:.3f}" for value in standing.by_seed.values())


def told_p(standing: Standing) -> str:
    """Of no difference."""
    return "" if standing.p is None else f"p {standing.p:.3f}"


def table_of(settings: SegmentConfig, name: str, of: Mapping[str, Standing]) -> dict[str, Any]:
    """One figure, a row a model; with the costs where it is the one that leads."""
    costs, seeds = [*UNITS.values()] if name == LEADING else [], len(settings.sweep.seeds)
    rows = []
    for s in of.values():
        signed = cell(s.difference)
        spent = [scaled(s.cost.get(key), unit) for key, (_, unit) in UNITS.items()] if costs else []
        each = by_seed(s)[6:] + f" ({len(s.by_seed)} of {seeds} seeds)" * (len(s.by_seed) < seeds)
        rows.append([s.method, cell(s.value), signed and {**signed, "signed": True}, s.p, *spent, each])
    columns = ["model", name, f"\N{MINUS SIGN} {settings.sweep.against}", "p", *(title for title, _ in costs)]
    return {"title": name, "columns": [*columns, "by seed"], "rows": rows, "note": ""}


def notes(settings: SegmentConfig, told: Sequence[Told]) -> list[str]:
    """How the figures were made, for the reader of the report."""
    seeds, samples = len(settings.sweep.seeds), settings.segment.replicates
    patients = len({case.patient for case in told[0].cases})
    few = f" With {patients} patients they are too short to be taken at their word." * (patients < FEW_PATIENTS)
    reach = " With one seed they tell these trained models apart, not their kinds." * (seeds == 1)
    return [
        f"Each figure is a mean over {seeds} seed{'s' * (seeds > 1)}; a seed sets folds, weights and crops. All models "
        f"had the same patients, folds and {settings.train.steps or settings.train.epochs} "
        f"{'steps' if settings.train.steps else 'epochs'} of the same batch.",
        f"Intervals: 95 %, {samples} bootstrap samples, each of patients and of seeds, the same for all models, so "
        "that differences are paired. p is of no difference and not corrected for the number of rows. "
        f"Other pretrainings are not in them.{few}{reach}",
        *in_common([one.result.get("notes", []) for one in told]),
    ]


def in_common(notes: Sequence[Sequence[str]]) -> list[str]:
    """What all runs say, but of intervals, which hold something else here."""
    first, *others = notes
    return [note for note in first if all(note in of for of in others) and not note.startswith("Intervals: ")]


def table_csv(settings: SegmentConfig, found: Standings) -> str:
    """table.csv."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    head = ("figure", "model", "seeds", "value", "low", "high", "difference", "difference_low", "difference_high")
    table.writerow([*head, "against", "p", *UNITS])
    for name, of in found.items():
        for s in of.values():
            against = settings.sweep.against if s.difference else ""
            values = [*numbers(s.value), *numbers(s.difference), against, s.p]
            table.writerow([name, s.method, len(s.by_seed), *values, *(s.cost.get(key) for key in UNITS)])
    return buffer.getvalue()
