"""The paper's experiment as one command: every pretraining, every fine-tuning on top of it, one table.

    OUT/pretrain/NAME/                  a pretraining, on split `train` alone
    OUT/finetune/NAME/RECIPE/seed-0/    a fine-tuning of it, judged on the official test patients
    OUT/result.json                     a table a recipe beside what was published (table.py)
    OUT/table.csv, OUT/figures/paper.png, OUT/report.html

Each of them is a run of its stage, so the same command goes on wherever it was stopped and runs nothing twice; settings
of this file may change in between as long as those of a finished run do not. Like demo.py it may call every stage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.opening import open_shards
from ..data.phantom import PhantomSettings
from ..data.phantom_cbis import make_lesions
from ..data.shards import ShardDataset
from ..engine.config import Tree, dump_yaml, load, parse_yaml
from ..engine.errors import RunFailed, UserError, one_line
from ..engine.files import write_atomic
from ..engine.launch import make_accelerator, together
from ..engine.report import write_report
from ..engine.run import Run, open_run
from ..engine.signals import StopSignals
from ..finetune.classify.config import FinetuneConfig
from ..finetune.classify.stage import finetune
from ..pretrain.config import PretrainConfig
from ..pretrain.stage import pretrain
from .config import PaperConfig
from .table import CAPTION, Told, content, draw, read_told, standing, table_csv

ABOUT = (
    "The experiment of Vo et al. (MIRAM, arXiv 2503.07157) from crops to a table: every pretraining of `pretrain`, and",
    "every recipe of `finetune` on each. The same command goes on with what is unfinished. docs/paper.md has the rest.",
)


def paper(config: str, arguments: Sequence[str] = (), *, signals: StopSignals | None = None) -> Run:
    """`miram paper CONFIG --a.b=value …`.

    Raises:
        UserError: a configuration or the data is not usable; nothing was trained then.
        Preempted: stopped on a signal; what was trained is kept.
        RunFailed: a run failed; the table holds the others.
    """
    settings = load(PaperConfig, config, arguments)
    experiment = Experiment(settings, signals or StopSignals())
    experiment.refuse_keys()
    experiment.find_data()
    run = experiment.opened()
    with run.recorded(writes=experiment.main):
        experiment.work_through()
        if experiment.main:
            experiment.write(run)
        if experiment.failed:
            which, why = next(iter(experiment.failed.items()))
            raise RunFailed(
                f"{len(experiment.failed)} runs failed, the others are in {run.folder}; the first: {which}: {why}; "
                "the same command tries them again"
            )
    return run


@dataclass
class Experiment:
    """All runs of a configuration."""

    settings: PaperConfig
    signals: StopSignals
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.accelerator = make_accelerator()
        self.main = self.accelerator.is_main_process
        self.shards: ShardDataset | None = None

    # ------------------------------------------------------------------------------------------ what is run

    def pretraining(self, name: str) -> tuple[str, list[str]]:
        """Preset and arguments of a row's `miram pretrain`."""
        entry = self.settings.pretrain[name]
        assert entry.preset is not None
        given = {"seed": self.settings.seed, **self.data("shards", "split_file", "workers", "cache_mb", "on_damage")}
        fixed = {"out": str(self.folder("pretrain", name)), "data.split": "train"}
        return entry.preset, arguments_of(given, self.settings.every.pretrain, entry.set, fixed)

    def finetuning(self, name: str, recipe: str, seed: int) -> tuple[str, list[str]]:
        """Preset and arguments of a row's `miram finetune`."""
        entry = self.settings.finetune[recipe]
        given = self.data("shards", "split_file", "task", "workers", "cache_mb", "on_damage") | {"data.split": None}
        encoder = self.settings.pretrain[name].encoder or str(self.folder("pretrain", name))
        fixed = {"out": str(self.cell_folder(name, recipe, seed)), "seed": seed, "finetune.encoder": encoder}
        return entry.preset, arguments_of(given, self.settings.every.finetune, entry.set, fixed)

    def data(self, *names: str) -> Tree:
        """Keys of the data section that a stage takes over."""
        section = self.settings.data.model_dump(mode="json")
        return {f"data.{name}": section[name] for name in names}

    def folder(self, *parts: str) -> Path:
        """Of a run."""
        return Path(self.settings.out, *parts)

    def cell_folder(self, name: str, recipe: str, seed: int) -> Path:
        """Of a fine-tuning."""
        return self.folder("finetune", name, recipe, f"seed-{seed}")

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """Every row, recipe and seed."""
        for name in self.settings.pretrain:
            for recipe in self.settings.finetune:
                yield from ((name, recipe, seed) for seed in self.settings.seeds)

    # ------------------------------------------------------------------------------------------ what is refused

    def refuse_keys(self) -> None:
        """Read every configuration before anything is run.

        Raises:
            UserError: one cannot be, with the entry that it comes from.
        """
        for name, entry in self.settings.pretrain.items():
            if entry.preset is not None:
                of_entry(f"pretrain.{name}", partial(load, PretrainConfig, *self.pretraining(name)))
            for recipe in self.settings.finetune:
                cell = (name, recipe, self.settings.seeds[0])
                of_entry(f"finetune.{recipe}", partial(load, FinetuneConfig, *self.finetuning(*cell)))

    def find_data(self) -> None:
        """Make phantoms where they are asked for, and open the data.

        Raises:
            UserError: no task is named, a split is missing, or a test patient would be trained on.
        """
        data, asked = self.settings.data, self.settings.phantoms
        if data.task is None:
            raise UserError("data.task is not set; the paper's is --data.task=four_class")
        if asked is not None and isinstance(data.shards, str) and not Path(data.shards, "manifest.json").exists():
            wanted = PhantomSettings(size=asked.size, seed=asked.seed, mass_rate=0.6, calc_rate=0.5)
            self.alone(partial(make_lesions, Path(data.shards), asked.patients, wanted))
        self.shards = open_shards(data.model_copy(update={"split": None}))
        self.refuse_leaks(self.shards)

    def refuse_leaks(self, shards: ShardDataset) -> None:
        """Refuse data in which a patient is trained and tested on, pretraining included.

        Raises:
            UserError: that, or there is no official train or test.
        """
        splits, patients = np.array(shards.splits), whose(shards)
        for name in ("train", "test"):
            if name not in splits:
                raise UserError(f"data.shards: no sample is in split {name!r}; the experiment needs train and test")
        tested = patients[splits == "test"]
        for name in (name for name, entry in self.settings.pretrain.items() if entry.preset is not None):
            section = load(PretrainConfig, *self.pretraining(name)).data
            refuse_shared(f"pretrain.{name}", set(whose(open_shards(section)).tolist()), tested)
        for side in ("train", "val"):
            refuse_shared(f"split {side!r}", set(patients[splits == side].tolist()), tested)

    # ------------------------------------------------------------------------------------------ running and telling

    def opened(self) -> Run:
        """The folder of all of it. Each run guards its own settings, so those of this file are written anew."""
        run, shards = Run(Path(self.settings.out), "paper"), self.shards
        assert shards is not None

        saved = run.folder / "config.yaml"

        def begin() -> None:
            if saved.is_file() and "published" in parse_yaml(saved.read_text(), str(saved)):
                write_atomic(saved, dump_yaml(self.settings))
            open_run(self.settings, self.settings.out, "paper", shards.inputs)

        self.alone(begin)
        return run

    def alone(self, work: Callable[[], object]) -> None:
        """On the rank that writes; the others wait."""
        together(self.accelerator, work if self.main else lambda: None)

    def work_through(self) -> None:
        """Every pretraining, and the fine-tunings of those that came to an end."""
        for name, entry in self.settings.pretrain.items():
            if entry.preset is not None:
                self.attempt(f"pretrain.{name}", partial(pretrain, *self.pretraining(name), signals=self.signals))
            if f"pretrain.{name}" in self.failed:
                continue
            for cell in (cell for cell in self.cells() if cell[0] == name):
                which = "finetune.{}.{}.seed-{}".format(*cell)
                self.attempt(which, partial(finetune, *self.finetuning(*cell), signals=self.signals))

    def attempt(self, which: str, work: Callable[[], object]) -> None:
        """Run something; where it fails the others go on."""
        if self.main:
            print(f"paper: {which}", file=sys.stderr, flush=True)
        try:
            work()
        except RunFailed as failure:
            self.failed[which] = one_line(str(failure))

    def write(self, run: Run) -> None:
        """Tables, picture and page over all runs that came to an end."""
        told = self.told()
        if not told:
            return
        found = standing(self.settings, told)
        run.result(content(self.settings, told, found, self.failed))
        write_atomic(run.folder / "table.csv", table_csv(self.settings, found))
        draw(run.caption({"paper.png": CAPTION}) / "paper.png", self.settings, next(iter(told.values())), found)
        print(f"report: {self.page(run)}")

    def page(self, run: Run) -> Path:
        """The report: the table, every pretraining, and of every fine-tuning the first seed."""
        pretrained = [self.folder("pretrain", name) for name in self.settings.pretrain]
        tuned = [self.cell_folder(*cell) for cell in self.cells() if cell[2] == self.settings.seeds[0]]
        folders = [run.folder, *(folder for folder in (*pretrained, *tuned) if (folder / "config.yaml").is_file())]
        names = [" ".join(folder.relative_to(run.folder).parts) or "the experiment" for folder in folders]
        return write_report(folders, run.folder / "report.html", title="The paper's experiment", names=names)

    def told(self) -> dict[tuple[str, str, int], Told]:
        """What finished fine-tunings say."""
        done = {cell: self.cell_folder(*cell) for cell in self.cells()}
        return {cell: read_told(folder) for cell, folder in done.items() if Run(folder, "finetune").finished}


def arguments_of(*trees: Mapping[str, Any]) -> list[str]:
    """`--a.b=value` of all keys, later ones last."""
    return [f"--{key}={json.dumps(value)}" for tree in trees for key, value in assignments(tree)]


def assignments(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values: sections are opened up, what stands under a dotted key is a value as on the command line."""
    for name, value in tree.items():
        if isinstance(value, dict) and value and "." not in name:
            yield from assignments(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def of_entry(which: str, work: Callable[[], object]) -> None:
    """Do something, and name the entry where it is refused.

    Raises:
        UserError: it was.
    """
    try:
        work()
    except UserError as error:
        raise UserError(f"{which}: {error}") from error


def whose(shards: ShardDataset) -> Any:
    """(n,) "dataset/patient" of the samples that are used."""
    dataset, patient = (np.array(shards.rows.column(name)) for name in ("dataset", "patient"))
    return np.char.add(np.char.add(dataset, "/"), patient)


def refuse_shared(where: str, seen: set[str], tested: Any) -> None:
    """Refuse patients that are trained on and tested.

    Raises:
        UserError: there are some.
    """
    if shared := seen & set(tested.tolist()):
        raise UserError(
            f"{where}: {len(shared)} patients of it are test patients, too; ingest CBIS-DDSM with --disjoint, or "
            "divide the data with `miram data split` and name the file as data.split_file"
        )
