"""A sweep's cells: runs that differ in one thing, made one after the other, told in tables.

A cell that is finished is not run again, one that was stopped goes on, one that fails is named and the others go on.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch

from ..engine.config import Tree
from ..engine.errors import RunFailed, UserError, did_you_mean, one_line
from ..engine.files import read_json
from ..engine.run import RESULT, Run, open_run

LONGEST = 80  # characters of a folder's name
WHOLE = ("options", "model_options")  # of a method or model: another one's would be mixed in


class Cell(Protocol):
    """One run of a sweep; as text, what people call it."""

    @property
    def run(self) -> Run:
        """Its folder."""
        ...

    @property
    def settings(self) -> Any:
        """Its configuration."""
        ...


class Told(Protocol):
    """What a finished cell says."""

    def check_beside(self, other: Self) -> None:
        """Raise UserError where the two judged something else."""
        ...


C = TypeVar("C", bound=Cell)
T = TypeVar("T", bound=Told)


def merged(base: Tree, update: Tree) -> Tree:
    """Keys of sections replaced one by one; those in WHOLE as they are."""
    both = {k: v for k, v in update.items() if isinstance(v, dict) and isinstance(base.get(k), dict) and k not in WHOLE}
    return base | update | {key: merged(base[key], value) for key, value in both.items()}


def folder_of(method: str) -> str:
    """A name that any file system takes, and that leads nowhere else."""
    safe = re.sub(r"[^A-Za-z0-9._=+]+", "-", method).strip("-.") or "method"
    if len(safe) <= LONGEST:
        return safe
    return f"{safe[: LONGEST - 9]}-{hashlib.sha256(method.encode()).hexdigest()[:8]}"


def check_against(against: str, names: Iterable[str], key: str) -> None:
    """Refuse a comparison with what is not there.

    Raises:
        UserError: it is none of the names; `key` is where they stand.
    """
    if against not in (known := list(names)):
        raise UserError(f"sweep.against={against} is none of {key}{did_you_mean(against, known)}")


def run_sweep(
    settings: Any,
    cells: Sequence[C],
    one: Callable[[Any], Run],
    inputs: Mapping[str, str] | None,
    write: Callable[[Run, Any, Sequence[C], dict[C, str]], None],
) -> Run:
    """Run the cells and write what they say together.

    Args:
        settings: the sweep's configuration; `out` is its folder.
        cells: every run of it.
        one: makes a run of a cell's settings, or goes on with it.
        inputs: digests of what all cells read, by name.
        write: tables and pictures of a run, its settings, its cells and why some of these failed; it may add to them.

    Raises:
        UserError: the run folder is not usable.
        Preempted: stopped on a signal; the cells that are finished are kept.
        RunFailed: cells failed; the tables hold the others.
    """
    main = os.environ.get("RANK", "0") == "0"
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


def work_through(cells: Sequence[C], one: Callable[[Any], Run]) -> dict[C, str]:
    """Run what is not finished, one after the other; and why some could not be."""
    failed: dict[C, str] = {}
    finished = {cell: cell.run.finished for cell in cells}  # asked once, so that all ranks do the same
    if any(finished.values()):
        say(f"sweep: {sum(finished.values())} of {len(cells)} runs are finished")
    for number, cell in enumerate(cells, 1):
        if finished[cell]:
            continue
        say(f"sweep: run {number} of {len(cells)}: {cell}")
        try:
            one(cell.settings)
        except (UserError, RunFailed, torch.OutOfMemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError) and os.environ.get("WORLD_SIZE", "1") != "1":
                raise  # the other ranks wait for this one
            failed[cell] = one_line(str(error))
            say(f"sweep: {cell} failed: {failed[cell]}")
    return failed


def read_cells(cells: Sequence[C], failed: dict[C, str], read: Callable[[C], T]) -> dict[C, T]:
    """What finished cells say, as far as they judged the same; the others are added to the failed ones."""
    told: dict[C, T] = {}
    for cell in (cell for cell in cells if cell not in failed):
        try:
            told[cell] = read(cell)
            told[cell].check_beside(next(iter(told.values())))
        except UserError as error:
            told.pop(cell, None)
            failed[cell] = one_line(str(error))
    return told


def say(line: str) -> None:
    """To people, once."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def tell(run: Run) -> None:
    """The tables as lines: method, value, difference."""
    for table in read_json(run.folder / "result.json", RESULT)["tables"]:
        print(f"{table['title']}: {', '.join(table['columns'][:4])}")
        for row in table["rows"]:
            print("  " + "  ".join(f"{spoken(cell):<{24 if i else 32}}" for i, cell in enumerate(row[:4])).rstrip())
    print(f"all of it: {run.folder / 'table.csv'}; a page of it: miram report {run.folder}")


def spoken(cell: object) -> str:
    """A cell of a table for a line of text."""
    if not isinstance(cell, dict):
        return f"{cell:.3g}" if isinstance(cell, float) else "-" if cell is None else str(cell)
    interval = " [{:.3f}, {:.3f}]".format(*cell["interval"]) if cell.get("interval") else ""
    return f"{cell['value']:.3f}{interval}"
