"""The finetune stage: an encoder and a labelled data set in, figures of unseen patients and a locked model out.

    RUN/result.json        the figure that leads, every metric by level and subgroup, what it cost
    RUN/predictions.csv    one row a judged image
    RUN/search.csv         one row a candidate of an outer fold, with its score on every inner one
    RUN/model/             what `miram predict` and `miram evaluate` take (locked.py)
    RUN/fits/              the trainings; a start that was stopped goes on from them (search.py)
    RUN/../features/       frozen features, shared by the runs beside this one

Where the data has train and test patients, the test is judged once, and the model that judged it is the one that is
kept. Else folds of patients judge the procedure, and the kept model is what the same procedure makes of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from ...data.opening import open_shards
from ...engine.config import load
from ...engine.errors import UserError, did_you_mean
from ...engine.files import read_json, write_atomic
from ...engine.launch import make_accelerator, together
from ...engine.metrics import Ints
from ...engine.run import RESULT, Run, open_run
from ...engine.seeding import stable_seed
from ...engine.signals import StopSignals
from ...engine.track import Meter
from ...pretrain.encoder import normalisation
from ...pretrain.weights.loading import encoder_digest, read_encoder
from ..examples import explained
from ..features import check_channels
from ..peft import METHODS
from ..peft.registry import describe
from ..seen import seen
from ..task import Fold
from .account import cost, notes, search_table, taught
from .bench import Approach, Bench
from .cards import card_for
from .config import FinetuneConfig
from .figures import draw_figures
from .fraction import labelled_fraction
from .judged import Judged
from .judging import figures_of
from .labels import read_labels
from .locked import read_model, write_locked
from .outer import outer
from .predictions import write_predictions
from .probing import Probing
from .search import Nested, Search
from .subgroups import check_subgroups
from .sweep import sweep
from .teacher import read_teacher, teacher_digest
from .telling import say
from .tiles import spacings
from .tiling import Tiling
from .tuning import Tuning

FROZEN: Mapping[str, Callable[[Bench], Approach[Any]]] = {"probe": Probing, "attention_mil": Tiling}


def finetune(
    config: str, arguments: Sequence[str] = (), *, sweeps: bool = False, signals: StopSignals | None = None
) -> Run:
    """`miram finetune CONFIG --a.b=value …`, as the only rank or as one of many.

    Args:
        sweeps: methods side by side, as the `sweep` section says (sweep.py).
        signals: those that came before this was called.

    Raises:
        UserError: configuration, encoder, data or run folder are not usable.
        Preempted: stopped on a signal; what was trained is kept.
        RunFailed: a training failed, or the disk is full.
    """
    settings = load(FinetuneConfig, config, arguments)
    accelerator = make_accelerator(settings.train.deterministic)
    out = Path(settings.out)
    cache = (out if sweeps else out.parent) / "features"
    one = partial(run_one, accelerator=accelerator, signals=signals or StopSignals(), cache=cache)
    return sweep(settings, one, inputs_of(settings)) if sweeps else one(settings)


def run_one(settings: FinetuneConfig, accelerator: Accelerator, signals: StopSignals, cache: Path) -> Run:
    """One method on one task; `cache` is the folder of frozen features.

    Raises:
        UserError, Preempted, RunFailed: as `finetune`.
    """
    bench, splits, split_name = prepare(settings, accelerator, signals, cache)
    inputs = inputs_of(settings)
    run = Run(Path(settings.out), "finetune")
    together(accelerator, lambda: open_run(settings, settings.out, "finetune", inputs) if bench.main else None)
    if run.finished:
        accelerator.print(f"{run.folder} is finished; nothing to do")
    else:
        with run.recorded(writes=bench.main):
            Stage(bench, run, splits, split_name).run_through()
        accelerator.wait_for_everyone()
    if bench.main:
        say(read_json(run.folder / "result.json", RESULT))
    return run


def inputs_of(settings: FinetuneConfig) -> dict[str, str]:
    """Digests of what a run reads."""
    section = settings.finetune
    taught = {"teacher": teacher_digest(section.teacher)} if section.teacher else {}
    return open_shards(settings.data).inputs | {"encoder": encoder_digest(section.encoder)} | taught


def prepare(
    settings: FinetuneConfig, accelerator: Accelerator, signals: StopSignals, cache: Path
) -> tuple[Bench, list[Fold], str]:
    """All that can be refused before anything is written.

    Raises:
        UserError: data, task, encoder or method do not fit each other.
    """
    section = settings.finetune
    if section.method not in {*METHODS, *FROZEN}:
        known = [*FROZEN, *METHODS]
        raise UserError(f"finetune.method: there is no {section.method!r}{did_you_mean(section.method, known)}")
    shards = open_shards(settings.data)
    labelled = read_labels(shards, settings.data.task, section.kind, section.classes, section.separator)
    splits, name = outer(labelled, section.folds, settings.seed)
    vit, said = read_encoder(section.encoder, section.image_size, shards.channels)
    check_channels(vit, shards)
    check_subgroups(shards.rows, section.subgroups)
    if section.input == "tiles":
        spacings(shards, section.tiles)
    judged = np.concatenate([rest for _, rest in splits])
    teacher = read_teacher(section, shards, labelled, judged, vit) if section.teacher else None
    bench = Bench(settings, shards, labelled, vit, accelerator, signals, cache, teacher)
    approach = approach_of(bench)
    if isinstance(approach, Tuning):
        approach.fresh(0)  # whatever does not fit is found now, and not in a run folder that is then in the way
    for line in said[-1:]:
        accelerator.print(f"miram: encoder {section.encoder}: {line}")
    return bench, splits, name


def approach_of(bench: Bench) -> Approach[Any]:
    """By the method's name."""
    frozen = FROZEN.get(bench.section.method)
    return frozen(bench) if frozen else Tuning(bench, Probing(bench))


@dataclass(frozen=True)
class Stage:
    """One run: every outer fold, the last model, and what is written of them."""

    bench: Bench
    run: Run
    splits: Sequence[Fold]
    split_name: str

    def run_through(self) -> None:
        """Judge, keep, tell."""
        wanted = not self.folder.exists() and (self.alone or self.bench.section.final)
        self.bench.accelerator.wait_for_everyone()  # before any rank makes the folder, all have looked for it
        with Meter("trainings", self.trainings) as meter:
            search = Search(self.bench, approach_of(self.bench), meter)
            found = [self.fold(search, number, keep=wanted and self.alone) for number in range(len(self.splits))]
            if wanted:
                self.keep(found[0] if self.alone else self.last(search))
        if self.bench.main:
            self.write(self.joined(found), found)

    @property
    def alone(self) -> bool:
        """Whether one model judges all: that of an official split."""
        return len(self.splits) == 1

    @property
    def folder(self) -> Path:
        """Of the model."""
        return self.run.folder / "model"

    @property
    def trainings(self) -> int:
        """At most so many: candidates on inner folds and the chosen one, for every outer fold and the last model."""
        section, last = self.bench.section, not self.alone and self.bench.section.final
        return (len(self.splits) + last) * (len(approach_of(self.bench).values) * section.search.folds + 1)

    # ------------------------------------------------------------------------------------------ training

    def fold(self, search: Search, number: int, *, keep: bool) -> Nested:
        """What came of one outer fold; with its model, where that is wanted."""
        fit, rest = self.splits[number]
        return search.nested(self.labelled_part(fit, number), rest, self.place(f"outer-{number}"), keep=keep)

    def last(self, search: Search) -> Nested:
        """What the same procedure makes of everybody; it judges nobody."""
        return search.nested(self.everybody, self.everybody[:0], self.place("final"), keep=True)

    @property
    def everybody(self) -> Ints:
        """All images whose labels the kept model may learn from."""
        fit = self.splits[0][0] if self.alone else np.arange(len(self.bench.labelled.rows))
        return self.labelled_part(fit, 0)

    def labelled_part(self, fit: Ints, number: int) -> Ints:
        """The images of those training patients whose labels are used."""
        section, seed = self.bench.section, stable_seed(self.bench.settings.seed, "fraction", number) % 2**63
        fit = np.sort(np.concatenate([fit, self.official_val])) if len(self.official_val) else fit
        return labelled_fraction(self.bench.labelled.strata, fit, section.fraction, seed)

    @property
    def official_val(self) -> Ints:
        """Images of the official `val`, which are no test: candidates are chosen on them."""
        official = self.split_name == "official train and test"
        return np.flatnonzero(self.bench.labelled.splits == "val") if official else np.zeros(0, np.int64)

    def place(self, name: str) -> Path:
        """Of an outer fold's trainings."""
        return self.run.folder / "fits" / name

    def joined(self, found: Sequence[Nested]) -> Judged:
        """What all folds say of the images they judged."""
        rests = [rest for _, rest in self.splits]
        return Judged(
            labelled=self.bench.labelled,
            images=np.concatenate(rests),
            logits=np.concatenate([nested.logits for nested in found]),
            fold=np.concatenate([np.full(len(rest), number) for number, rest in enumerate(rests)]),
            temperatures={number: nested.temperature for number, nested in enumerate(found)},
            thresholds={number: nested.thresholds for number, nested in enumerate(found)},
        )

    def keep(self, nested: Nested) -> None:
        """Write the model."""
        bench = self.bench
        if bench.main:
            base, normalise = describe(bench.encoder), normalisation(bench.encoder)
            chosen = nested.temperature, nested.thresholds
            card = card_for(bench.section, bench.labelled, self.everybody, bench.shards, base, normalise, *chosen)
            write_locked(self.folder, bench.teacher.known_to(card) if bench.teacher else card, nested.model)
        bench.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------ telling

    def write(self, judged: Judged, found: Sequence[Nested]) -> None:
        """Figures, predictions, search, pictures."""
        bench, run = self.bench, self.run
        content = figures_of(judged, bench.shards.rows, bench.section, bench.settings.seed)
        split = bench.settings.data.split
        within = f", within split {split!r}" if split and split in bench.labelled.splits else ""
        content |= {"split": self.split_name + within, "cost": cost(found)}
        judges = [int(row) for row in bench.rows(judged.images)]
        saw = seen(bench.shards, bench.settings.data, bench.section.encoder, judges)
        parts = [self.labelled_part(fit, number) for number, (fit, _) in enumerate(self.splits)]
        content["notes"] = [saw, *content["notes"], *notes(bench, approach_of(bench), parts, found)]
        content["notes"] += taught(bench, judged, parts)
        write_predictions(run.folder / "predictions.csv", judged, bench.section.separator)
        write_atomic(run.folder / "search.csv", search_table(found))
        figures = run.folder / "figures"
        captions = draw_figures(figures, judged, bench.section, bench.settings.seed)
        run.caption(captions | self.maps(judged, figures))
        run.result(content)

    def maps(self, judged: Judged, figures: Path) -> dict[str, str]:
        """Pictures of what counted, by the kept model; captions by file name."""
        section = self.bench.section
        if not section.explain or not self.folder.exists():
            return {}
        note = "" if self.alone else " The map is of the last model, which was trained on this image, too."
        locked = read_model(self.folder)
        return explained(locked, self.bench.shards, judged, figures, section.explain, section.batch_size, note)
