"""Models side by side: every model x seed of the `sweep` section is one run, and tables the product.

    OUT/cells/MODEL/seed-0/    a segment run
    OUT/result.json            a table a figure; mean Dice leads
    OUT/table.csv              one row a model and figure
    OUT/figures/sweep.png

All cells get the same data, folds and steps. A cell that is finished is read and not run again, one that was stopped
goes on, one that fails is named and the others go on: the same command takes the sweep up wherever it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.config import Tree, check, dump_yaml, parse_yaml
from ...engine.errors import UserError
from ...engine.files import write_atomic
from ...engine.run import Run
from ...pretrain.weights.loading import read_encoder
from ..cells import check_against, folder_of, merged, read_cells, run_sweep
from ..classify.bootstrap import Table, cell
from ..classify.comparison import Standing, standings
from ..classify.judging import NOTHING
from ..classify.sweep_figure import draw_sweep
from ..classify.sweep_table import caveats, columns, csv_of, differences, row_of, rows, table_of_failed
from .config import SegmentConfig, SegmentSweepSection
from .judging import METRIC
from .told import SHOWN, Finished, read_run

SAME = (
    *("classes", "task", "lesion", "unmasked", "folds", "holdout"),
    *("threshold", "hit_iou", "tolerance_mm", "tolerance_px"),
)
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
    return run_sweep(settings, list(grid(settings)), one, inputs, write)


# ---------------------------------------------------------------------------------------------- the cells


def grid(settings: SegmentConfig) -> Iterator[Cell]:
    """Every cell, model by model.

    Raises:
        UserError: a model has settings that cannot be, two have one folder, or `against` is none of them.
    """
    section, folders = settings.sweep, set()
    check_against(section.against, section.models, "sweep.models")
    settings = with_tile(settings)
    for name, changes in section.models.items():
        for seed in section.seeds:
            out = Path(settings.out, "cells", folder_of(name), f"seed-{seed}")
            if out in folders:
                raise UserError(f"sweep: {name} at seed {seed} is named twice, or much like another; rename one")
            folders.add(out)
            yield Cell(name, seed, derived(settings, name, changes, seed, str(out)))


def with_tile(settings: SegmentConfig) -> SegmentConfig:
    """The same with the size of a tile said: networks without an encoder are to see what those with one do."""
    common = settings.segment
    alone = any(changes.get("encoder", "") is None for changes in settings.sweep.models.values())
    if common.image_size is not None or common.encoder is None or not alone:
        return settings
    size = read_encoder(common.encoder)[0].patch_embed.img_size
    return settings.model_copy(update={"segment": common.model_copy(update={"image_size": size})})


def derived(settings: SegmentConfig, name: str, changes: Tree, seed: int, out: str) -> SegmentConfig:
    """A cell's own configuration. Options are a model's and a method's own: others start from their defaults.

    Raises:
        UserError: a key or value that the segment section does not take, or one that all cells share.
    """
    tree: Tree = parse_yaml(dump_yaml(settings), "the sweep's configuration")
    common = settings.segment
    if changes.get("model", common.model) != common.model:
        tree["segment"] |= {"model_options": {}, "control": None}
    if changes.get("method", common.method) != common.method or changes.get("encoder", "") is None:
        tree["segment"]["options"] = {}
    if changes.get("encoder", "") is None:
        tree["segment"]["drop_path"] = 0.0
    tree["segment"] = merged(tree["segment"], changes)
    tree |= {"out": out, "seed": seed, "sweep": SegmentSweepSection().model_dump(mode="json")}
    made: SegmentConfig = check(SegmentConfig, tree, f"sweep.models, {name}")
    if odd := [f"segment.{key}" for key in SAME if getattr(common, key) != getattr(made.segment, key)]:
        raise UserError(f"sweep.models: {name} differs in {', '.join(odd)}, which all models share; leave it out")
    return made


# ---------------------------------------------------------------------------------------------- what it gives


def write(run: Run, settings: SegmentConfig, cells: Sequence[Cell], failed: dict[Cell, str]) -> None:
    """Tables and picture; a finished cell that cannot be read or compared is added to the failed ones."""
    told = read_cells(cells, failed, lambda one: read_run(one.run.folder))
    found = place(settings, told)
    write_atomic(run.folder / "table.csv", csv_of(("figure", "model"), found, settings.sweep.against, [*UNITS]))
    if METRIC in found:
        draw_sweep(run.caption({"sweep.png": CAPTION}) / "sweep.png", {1.0: found[METRIC]}, METRIC)
    run.result(content(settings, found, failed, [*told.values()]))


def place(settings: SegmentConfig, told: Mapping[Cell, Finished]) -> Standings:
    """The models by every figure that all of them have."""
    section, models = settings.sweep, dict.fromkeys(one.model for one in told)
    names = [name for name in SHOWN if all(name in one.names for one in told.values())] if told else []
    found = {}
    for name in names:
        of = {m: {one.seed: said.by(name) for one, said in told.items() if one.model == m} for m in models}
        found[name] = standings(of, section.seeds, section.against, settings.segment.replicates, settings.seed)
    return found


def content(
    settings: SegmentConfig, found: Standings, failed: Mapping[Cell, str], told: Sequence[Finished]
) -> dict[str, Any]:
    """result.json: the first model leads; with nothing judged it only says why."""
    top = [*found.get(METRIC, {}).values()]
    shared = ("task", "split", "n_images", "n_patients", "classes")
    reasons = [[one.model, one.seed, why] for one, why in failed.items()]
    return {
        **{key: told[0].result[key] for key in shared if told and key in told[0].result},
        "metric": METRIC,
        **((cell(top[0].value) if top else None) or NOTHING),
        "rows": list(rows(top)),
        "differences": list(differences(top, settings.sweep.against)),
        "notes": notes(settings, told) if told else [],
        "tables": [
            *(table_of(settings.sweep, name, of) for name, of in found.items()),
            *table_of_failed(["model", "seed", "why"], reasons),
        ],
    }


def table_of(section: SegmentSweepSection, name: str, of: Mapping[str, Standing]) -> Table:
    """One figure, a row a model; with the costs where it is the one that leads."""
    units = UNITS if name == METRIC else {}
    return {
        "title": name,
        "columns": ["model", name, *columns(section.against, units)],
        "rows": [row_of(standing, len(section.seeds), units) for standing in of.values()],
        "note": "",
    }


def notes(settings: SegmentConfig, told: Sequence[Finished]) -> list[str]:
    """How the figures were made, for the reader of the report."""
    seeds, patients = len(settings.sweep.seeds), len({case.patient for case in told[0].cases})
    return [
        f"Each figure is a mean over {seeds} seed{'s' * (seeds > 1)}; a seed sets folds, weights and crops. All models "
        f"had the same patients, folds and {settings.train.steps or settings.train.epochs} "
        f"{'steps' if settings.train.steps else 'epochs'} of the same batch.",
        *caveats("configurations", seeds, settings.segment.replicates, patients),
        *in_common([one.result.get("notes", []) for one in told]),
    ]


def in_common(notes: Sequence[Sequence[str]]) -> list[str]:
    """What all runs say, but of intervals, which hold something else here."""
    first, *others = notes
    return [note for note in first if all(note in of for of in others) and not note.startswith("Intervals: ")]
