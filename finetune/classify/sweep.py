"""Methods side by side: every method x label fraction x seed of the `sweep` section is one run, and tables the product.

    OUT/cells/METHOD/fraction-0.1/seed-0/    a finetune run; METHOD has its options in its name, as in lora-rank-8
    OUT/result.json                          a table a fraction; the figure that leads is the first method's
    OUT/table.csv                            one row a method and fraction
    OUT/figures/sweep.png

All cells get the same search, folds and steps. A cell that is finished is read and not run again, one that was stopped
goes on, one that fails is named and the others go on: the same command takes the sweep up wherever it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.config import Tree, check, dump_yaml, parse_yaml
from ...engine.errors import UserError
from ...engine.files import write_atomic
from ...engine.run import Run
from ..cells import check_against, folder_of, merged, read_cells, run_sweep
from .comparison import Standing, Told, read_run, standings
from .config import FinetuneConfig, FinetuneSection, SweepSection
from .sweep_figure import CAPTION, draw_sweep
from .sweep_table import Standings, content, table_csv

SAME = ("kind", "classes", "separator", "readout", "folds", "headline", "operating_point", "operating_at")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the sweep."""

    method: str  # with its options, for people
    fraction: float
    seed: int
    settings: FinetuneConfig

    @property
    def run(self) -> Run:
        """Its folder."""
        return Run(Path(self.settings.out), "finetune")

    def __str__(self) -> str:
        return f"{self.method}, {100 * self.fraction:.4g} % of the labels, seed {self.seed}"


def sweep(
    settings: FinetuneConfig, one: Callable[[FinetuneConfig], Run], inputs: Mapping[str, str] | None = None
) -> Run:
    """`miram finetune CONFIG --sweep`.

    Args:
        settings: the `sweep` section says which cells, the rest what they have in common; `seed` is the bootstrap's.
        one: makes one run, or goes on with it.
        inputs: digests of what all cells read, by name.

    Raises:
        UserError: the grid cannot be, or the run folder is not usable.
        Preempted: stopped on a signal; the cells that are finished are kept.
        RunFailed: cells failed; the tables hold the others.
    """
    return run_sweep(settings, list(grid(settings)), one, inputs, write)


# ---------------------------------------------------------------------------------------------- the grid


def grid(settings: FinetuneConfig) -> Iterator[Cell]:
    """Every cell, fraction by fraction.

    Raises:
        UserError: a method has settings that cannot be, something is named twice, or `against` is not in the grid.
    """
    section, folders = settings.sweep, set()
    methods = {label(settings, entry): entry for entry in section.methods}
    check_against(section.against, methods, "sweep.methods")
    for fraction in section.fractions:
        for entry in section.methods:
            name = label(settings, entry)
            for seed in section.seeds:
                out = Path(settings.out, "cells", folder_of(name), f"fraction-{fraction:g}", f"seed-{seed}")
                if out in folders:
                    raise UserError(
                        f"sweep: {name} at fraction {fraction:g} and seed {seed} is named twice; leave one out"
                    )
                folders.add(out)
                yield Cell(name, fraction, seed, derived(settings, entry, fraction, seed, str(out)))


def derived(settings: FinetuneConfig, entry: str | Tree, fraction: float, seed: int, out: str) -> FinetuneConfig:
    """A cell's own configuration. Options are a method's own: another one starts from its defaults.

    Raises:
        UserError: a key or value that the finetune section does not take.
    """
    tree: Tree = parse_yaml(dump_yaml(settings), "the sweep's configuration")
    chosen = {"method": entry} if isinstance(entry, str) else entry
    if chosen.get("method", settings.finetune.method) != settings.finetune.method:
        tree["finetune"]["options"] = {}
    tree["finetune"] = merged(tree["finetune"], chosen) | {"fraction": fraction}
    tree |= {"out": out, "seed": seed, "sweep": SweepSection().model_dump(mode="json")}
    made: FinetuneConfig = check(FinetuneConfig, tree, f"sweep.methods, {label(settings, entry)}")
    refuse_unequal(settings.finetune, made.finetune, label(settings, entry))
    return made


def refuse_unequal(common: FinetuneSection, own: FinetuneSection, name: str) -> None:
    """Refuse a method that would be asked something else, judged otherwise, or given more to try than the others.

    Raises:
        UserError: it would.
    """
    odd = [f"finetune.{key}" for key in SAME if getattr(common, key) != getattr(own, key)]
    mine, theirs = budget(own), budget(common)
    odd += [f"finetune.search ({key})" for key in mine if mine[key] != theirs[key]]
    if odd:
        raise UserError(f"sweep.methods: {name} differs in {', '.join(odd)}, which all methods share; leave it out")


def budget(section: FinetuneSection) -> dict[str, float]:
    """What a method may try."""
    search = section.search
    candidates = search.trials if search.lrs is None else len(search.lrs)
    return {"candidates": candidates, "folds": search.folds, "holdout": search.holdout}


def label(settings: FinetuneConfig, entry: str | Tree) -> str:
    """What a method is called by: its name, and in brackets what is set for it."""
    if isinstance(entry, str):
        return entry
    rest = {key: value for key, value in entry.items() if key not in ("method", "options")}
    options = entry.get("options")
    said = [*spelled(options if isinstance(options, dict) else {}), *spelled(rest)]
    name = str(entry.get("method", settings.finetune.method))
    return f"{name} ({', '.join(said)})" if said else name


def spelled(tree: Tree, prefix: str = "") -> Iterator[str]:
    """`key value` of everything in it."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from spelled(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} {value}"


# ---------------------------------------------------------------------------------------------- what it gives


def write(run: Run, settings: FinetuneConfig, cells: Sequence[Cell], failed: dict[Cell, str]) -> None:
    """Tables and picture; a finished cell that cannot be read or compared is added to the failed ones."""
    section = settings.finetune
    told = read_cells(cells, failed, lambda cell: read_run(cell.run.folder, section.readout, section.separator))
    found: Standings = {fraction: place(settings, fraction, told) for fraction in settings.sweep.fractions}
    reasons = [(cell.method, cell.fraction, cell.seed, why) for cell, why in failed.items()]
    write_atomic(run.folder / "table.csv", table_csv(settings, found))
    if told:
        draw_sweep(run.caption({"sweep.png": CAPTION}) / "sweep.png", found, next(iter(told.values())).metric)
    run.result(content(settings, found, reasons, [*told.values()]))


def place(settings: FinetuneConfig, fraction: float, told: Mapping[Cell, Told]) -> dict[str, Standing]:
    """The methods at one fraction, in their order."""
    section, of = settings.sweep, {cell: said for cell, said in told.items() if cell.fraction == fraction}
    methods = dict.fromkeys(cell.method for cell in of)
    by_method = {m: {cell.seed: said for cell, said in of.items() if cell.method == m} for m in methods}
    return standings(by_method, section.seeds, section.against, settings.finetune.replicates, settings.seed)
