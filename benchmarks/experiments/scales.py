"""Does a second decoder with real high-resolution targets help? A short controlled experiment on planted lesions.

python benchmarks/experiments/scales.py [--out DIR] [--small|--large] [--arms miram mae …] [--seeds 0 1 2] [--jobs 2]

The protocol, fixed before any comparison was looked at. The lesions' contrast was set on patients of their own, with
random weights and MAE alone: random weights come out at an AUC of .62 to .65. Two things could not be reached at once
with that: hand-made features are near 1 at either resolution (with weaker lesions they are at 1.00 against .96, but
random weights near chance), and a short MAE does not beat random weights: after 500 steps of 64 images it had .60 for
`margin` and .57 for `calc`. MoCo's pairs and crops were chosen so that its loss on held-out pairs falls below chance,
without a probe.
- Images: squares of 19 mm of phantom films (lesions.py), stored at 0.2 mm. Encoders see 32 x 32 pixels (tokens of 5
  mm), the second decoder's target is 64 x 64 of the same crop. Labels `margin` (spiculated or indistinct) on half of
  the squares, `calc` (a cluster of microcalcifications, or none) on the others. Pretraining has no labels; patients of
  pretraining and judging differ, and so do their generators' seeds.
- Arms: miram (scales 1 and 2, second loss on all patches as its authors have it), mae (scale 1), upsampled (miram
  whose second target is the encoder's own input enlarged), shared (second scale predicted from the first decoder's
  tokens), moco (MoCo v3), random (no training). Optional: masked (miram, second loss on masked patches). Encoder,
  decoder blocks, data, order of samples, crops, masks and schedule are the same for a seed; MoCo has its own views
  and learning rate. Both decoders use exact attention, so that attention is no part of the question.
- Budgets: equal steps, and equal time: as many steps as fit into what mae's steps take, by each arm's own cost a
  step (cells.py measures it: processor time of one process of one thread, reading included; wall time on a GPU). The
  learning rate falls to zero at each run's own end.
- Judged: frozen encoder at its own input size on whole squares; linear probe (class token and mean patch token, C on
  inner folds of patients) and attentive probe (fixed recipe); two folds by patient, so that every image is judged
  once by a probe that never saw its patient; AUC; the same bootstrap samples of patients for all.
- Primary: mean AUC of the two tasks, attentive probe, equal time: miram - mae, miram - upsampled, miram - shared. A
  difference counts where the interval over patients and the interval over seeds both leave out zero (table.py). All
  else is secondary, and nothing is corrected for how many there are.

Resumable: finished cells are skipped, a killed one goes on from its own checkpoint. Repeat the command.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from miram.benchmarks.experiments.cells import (
    ARMS,
    LARGE,
    OPTIONAL,
    SMALL,
    TINY,
    Form,
    cell_folder,
    make_data,
    measure_costs,
    run_cell,
    shares_cell,
    steps_of,
)
from miram.benchmarks.experiments.table import BUDGETS, read_cells, write_table

Cell = tuple[str, str, int]  # arm, budget, seed
PREEMPTED = 75
FORMS = {"small": SMALL, "large": LARGE, "tiny": TINY}


def main() -> None:
    """Run what is missing, then write the table."""
    asked = arguments()
    form, out = FORMS[asked.form], Path(asked.out)
    if not form.workers:
        torch.set_num_threads(1)
    if asked.cell:
        arm, budget, seed = asked.cell
        run_cell(arm, int(seed), budget, form, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    make_data(form, out, asked.jobs)
    cost = measure_costs(asked.arms, form, out)
    todo = [cell for cell in wanted(asked.arms, asked.seeds, cost) if not judged(out, cell)]
    begin = time.perf_counter()
    run_all(todo, asked, out)
    print(f"{len(todo)} cells in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    cells = read_cells(out, asked.arms, asked.seeds, cost)
    print(write_table(out, facts(asked, form, out, cost), asked.arms, cells))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/experiments/scales")
    for name, what in (("small", "two cores, about an hour (the default)"), ("large", "a ViT-S for one GPU")):
        parser.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=what)
    parser.add_argument("--tiny", dest="form", action="store_const", const="tiny", help=argparse.SUPPRESS)
    parser.set_defaults(form="small")
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *OPTIONAL), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--cell", nargs=3, metavar=("ARM", "BUDGET", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def wanted(arms: list[str], seeds: list[int], cost: dict[str, float]) -> Iterator[Cell]:
    """Cells in the order they are run: whole seeds first, so that an early end still compares all arms."""
    for seed in seeds:
        for budget in BUDGETS:
            yield from ((arm, budget, seed) for arm in arms if budget == "steps" or not shares_cell(arm, cost))


def judged(out: Path, cell: Cell) -> bool:
    """Whether a cell is finished."""
    return (cell_folder(out, *cell) / "judged.json").exists()


def run_all(todo: list[Cell], asked: argparse.Namespace, out: Path) -> None:
    """Each cell in a process of its own, some at once; on a signal or a failure the others are asked to save and stop.

    Raises:
        SystemExit: a cell failed, or the experiment was told to stop.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    waiting = list(todo)
    try:
        while waiting or running:
            while waiting and len(running) < asked.jobs:
                cell = waiting.pop(0)
                running[cell] = start(cell, asked, out)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                code = running.pop(cell).returncode
                print(f"{'-'.join(map(str, cell))}: exit {code}, {len(waiting)} to start", file=sys.stderr)
                if code:
                    sys.exit(f"cell {cell} failed; see {cell_folder(out, *cell)}/log.txt, then repeat the command")
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(cell: Cell, asked: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """One cell's process; its output goes to a log in its folder."""
    folder = cell_folder(out, *cell)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--out", str(out), f"--{asked.form}", "--cell", *map(str, cell)]
    threads = {} if asked.form == "large" else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads})


def facts(asked: argparse.Namespace, form: Form, out: Path, cost: dict[str, float]) -> dict[str, Any]:
    """What a reader needs to know of the figures."""
    trained, squares = [arm for arm in asked.arms if arm != "random"], 2 * form.lesions.per_film
    steps = {budget: {arm: steps_of(arm, budget, form, out) for arm in trained} for budget in BUDGETS}
    return {
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores, torch {torch.__version__}",
        "form": asked.form,
        "squares": {"pretrain": squares * form.pretrain_patients, "judged": squares * form.judge_patients},
        "patients": {"pretrain": form.pretrain_patients, "judged": form.judge_patients},
        "chance": 0.5,
        "seconds_a_step": {arm: round(cost[arm], 4) for arm in trained},
        "steps": steps,
        "seconds_a_cell": {b: {arm: round(n * cost[arm], 1) for arm, n in of.items()} for b, of in steps.items()},
    }


if __name__ == "__main__":
    main()
