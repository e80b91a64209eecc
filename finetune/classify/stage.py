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
from ..task import Fold, outer_folds
from .account import cost, notes, search_table
from .bench import Approach, Bench
from .cards import card_for
from .config import FinetuneConfig
from .figures import draw_figures
from .fraction import labelled_fraction
from .judging import Judged, check_subgroups, figures_of, write_predictions
from .labels import read_labels
from .locked import read_model, write_locked
from .probing import Probing
from .search import Nested, Search
from .sweep import sweep
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
    if bench.main:
        say(read_json(run.folder / "result.json", RESULT))
    return run


def inputs_of(settings: FinetuneConfig) -> dict[str, str]:
    """Digests of what a run reads."""
    return open_shards(settings.data).inputs | {"encoder": encoder_digest(settings.finetune.encoder)}


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
    splits, name = outer_folds(labelled.strata, section.folds, settings.seed, "finetune.folds")
    vit, said = read_encoder(section.encoder, section.image_size, shards.channels)
    check_channels(vit, shards)
    check_subgroups(shards.rows, section.subgroups)
    if section.input == "tiles":
        spacings(shards, section.tiles)
    bench = Bench(settings, shards, labelled, vit, accelerator, signals, cache)
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
        with Meter("trainings", self.trainings) as meter:
            search = Search(self.bench, approach_of(self.bench), meter)
            found = [self.fold(search, number) for number in range(len(self.splits))]
            self.keep(search, found)
        if self.bench.main:
            self.write(self.joined(found), found)

    @property
    def trainings(self) -> int:
        """At most so many: candidates on inner folds and the chosen one, for every outer fold and the last model."""
        section, last = self.bench.section, len(self.splits) > 1 and self.bench.section.final
        return (len(self.splits) + last) * (len(approach_of(self.bench).values) * section.search.folds + 1)

    # ------------------------------------------------------------------------------------------ training

    def fold(self, search: Search, number: int) -> Nested:
        """What came of one outer fold; of an official split the model is kept at once."""
        fit, rest = self.splits[number]
        known = self.labelled_part(fit, number)
        return search.nested(known, rest, self.place(f"outer-{number}"))

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

    def keep(self, search: Search, found: Sequence[Nested]) -> None:
        """Write the model, unless an earlier start did or nobody wants it."""
        bench, folder = self.bench, self.run.folder / "model"
        one = len(self.splits) == 1
        if folder.exists() or not (one or bench.section.final):
            return
        fit = self.splits[0][0] if one else np.arange(len(bench.labelled.rows))
        known = self.labelled_part(fit, 0)
        place = self.place("outer-0" if one else "final")
        nested = search.nested(known, known[:0], place, keep=True) if not one or found[0].model is None else found[0]
        if bench.main:
            base, normalise = describe(bench.encoder), normalisation(bench.encoder)
            chosen = nested.temperature, nested.thresholds
            card = card_for(bench.section, bench.labelled, known, bench.shards, base, normalise, *chosen)
            write_locked(folder, card, nested.model)
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
        write_predictions(run.folder / "predictions.csv", judged, bench.section.separator)
        write_atomic(run.folder / "search.csv", search_table(found))
        figures = run.folder / "figures"
        captions = draw_figures(figures, judged, bench.section, bench.settings.seed)
        run.caption(captions | self.maps(judged, figures))
        run.result(content)

    def maps(self, judged: Judged, figures: Path) -> dict[str, str]:
        """Pictures of what counted, by the kept model; captions by file name."""
        folder, section, trained = self.run.folder / "model", self.bench.section, len(self.splits) > 1
        if not section.explain or not folder.exists():
            return {}
        note = " The map is of the last model, which was trained on this image, too." * trained
        locked = read_model(folder)
        return explained(locked, self.bench.shards, judged, figures, section.explain, section.batch_size, note)


def say(result: Mapping[str, Any]) -> None:
    """The figures as a few lines."""
    print(f"{result['metric']} of {result['task']}, {result['n_images']} images of {result['n_patients']} patients:")
    width = max(len(row["name"]) for row in result["rows"]) + 2
    for row in result["rows"]:
        interval = "" if row["interval"] is None else "  [{:.3f}, {:.3f}]".format(*row["interval"])
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        print(f"  {row['name']:<{width}}{value}{interval}")
