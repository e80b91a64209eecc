"""The segmentation stage: masks in, figures of unseen patients and a locked model out.

    RUN/result.json      the figure that leads, every metric with its interval, what it cost
    RUN/cases.csv        one row a judged image and class; lesions.csv, candidates.csv one a lesion and a mark
    RUN/masks/           what was said of every judged image
    RUN/figures/         overlays, FROC, strata
    RUN/model/           what `miram predict` takes (locked.py)
    RUN/fits/            the trainings; a start that was stopped goes on from them (fits.py)
    RUN/../surveys/      what the data's masks hold, looked at once for the runs beside this one

Where the data has train and test patients, the test is judged once, and the model that judged it is the one that is
kept. Else folds of patients judge the procedure, and the kept model is what the same procedure makes of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from ...data.opening import open_shards
from ...data.shards import ShardDataset
from ...engine.config import load
from ...engine.errors import UserError
from ...engine.files import read_json
from ...engine.launch import make_accelerator, together
from ...engine.metrics import Ints
from ...engine.run import RESULT, Run, open_run
from ...engine.seeding import stable_seed
from ...engine.signals import StopSignals
from ...pretrain.encoder import Encoder
from ...pretrain.weights.loading import encoder_digest, random_like, read_encoder
from ..classify.cards import TrainedOn, preprocessing_of
from ..classify.telling import say
from ..features import check_channels
from ..peft.files import Base
from ..peft.registry import describe
from ..seen import seen
from ..task import Fold
from .bench import Bench
from .casefile import write_cases
from .cases import Case
from .config import SegmentConfig, SegmentSection
from .figures import draw_figures
from .fits import MASKS, Fit, Fits, rules_of
from .judging import figures_of
from .locked import SegmentCard, write_segmenter
from .models import NEEDS_ENCODER, read_model
from .splits import outer
from .survey import survey
from .sweep import sweep
from .target import Asked, read_target

PATIENCE = timedelta(hours=24)  # ranks wait while one judges or draws


def segment(
    config: str, arguments: Sequence[str] = (), *, sweeps: bool = False, signals: StopSignals | None = None
) -> Run:
    """`miram segment CONFIG --a.b=value …`, as the only rank or as one of many.

    Args:
        sweeps: models side by side, as the `sweep` section says (sweep.py).
        signals: those that came before this was called.

    Raises:
        UserError: configuration, encoder, data or run folder are not usable.
        Preempted: stopped on a signal; what was trained is kept.
        RunFailed: a training failed, or the disk is full.
    """
    settings = load(SegmentConfig, config, arguments)
    accelerator = make_accelerator(settings.train.deterministic, PATIENCE)
    out = Path(settings.out)
    cache = (out if sweeps else out.parent) / "surveys"
    one = partial(run_one, accelerator=accelerator, signals=signals or StopSignals(), cache=cache)
    return sweep(settings, one, open_shards(settings.data).inputs) if sweeps else one(settings)


def run_one(settings: SegmentConfig, accelerator: Accelerator, signals: StopSignals, cache: Path) -> Run:
    """One model; `cache` is the folder of what the masks hold.

    Raises:
        UserError, Preempted, RunFailed: as `segment`.
    """
    bench, splits, split_name = prepare(settings, accelerator, signals, cache)
    run = Run(Path(settings.out), "segment")
    inputs = inputs_of(settings)
    together(accelerator, lambda: open_run(settings, settings.out, "segment", inputs) if bench.main else None)
    if run.finished:
        accelerator.print(f"{run.folder} is finished; nothing to do")
    else:
        with run.recorded(writes=bench.main):
            Stage(bench, run, splits, split_name).run_through()
        accelerator.wait_for_everyone()
    if bench.main:
        say(read_json(run.folder / "result.json", RESULT))
    return run


def inputs_of(settings: SegmentConfig) -> dict[str, str]:
    """Digests of what a run reads."""
    encoder = settings.segment.encoder
    return open_shards(settings.data).inputs | ({"encoder": encoder_digest(encoder)} if encoder else {})


def prepare(
    settings: SegmentConfig, accelerator: Accelerator, signals: StopSignals, cache: Path
) -> tuple[Bench, list[Fold], str]:
    """All that can be refused before anything is written.

    Raises:
        UserError: data, encoder, model or method do not fit each other.
    """
    section = settings.segment
    read_model(section.model, section.model_options)
    if (section.model in NEEDS_ENCODER) != (section.encoder is not None):
        how = "needs an encoder; name it" if section.model in NEEDS_ENCODER else "stands on no encoder; set it to null"
        raise UserError(f"segment.encoder: {section.model} {how}")
    if section.control and section.encoder is None:
        raise UserError(f"segment.control: {section.model} stands on no encoder to be a control of; set it to null")
    if (section.options or section.drop_path) and section.encoder is None:
        raise UserError(
            f"segment.options and drop_path are of an encoder, and {section.model} has none; leave them out"
        )
    shards = open_shards(settings.data)
    asked = read_asked(shards, section, accelerator, cache)
    splits, name = outer(asked.task, section.folds, settings.seed)
    vit, said = None, list[str]()
    if section.encoder is not None:
        vit, said = encoder_of(section, shards.channels, control_seed(settings))
        check_channels(vit, shards)
    bench = Bench(settings, shards, asked, vit, accelerator, signals)
    bench.fresh(0)  # whatever does not fit is found now, and not in a run folder that is then in the way
    bench.check_resolution()
    for line in (*(f"encoder {section.encoder}: {line}" for line in said[-1:]), *asked.notes):
        accelerator.print(f"miram: {line}")
    return bench, splits, name


def encoder_of(section: SegmentSection, channels: int, seed: int) -> tuple[Encoder, list[str]]:
    """The encoder, or one of its shape that saw nothing; and what became of every key of its file."""
    assert section.encoder is not None
    if section.control == "untrained":
        return random_like(section.encoder, seed, section.image_size, channels), []
    return read_encoder(section.encoder, section.image_size, channels)


def control_seed(settings: SegmentConfig) -> int:
    """Of an untrained encoder's weights."""
    return stable_seed(settings.seed, "control") % 2**63


def read_asked(shards: ShardDataset, section: SegmentSection, accelerator: Accelerator, cache: Path) -> Asked:
    """What the masks ask for; the main process looks first."""
    together(accelerator, lambda: survey(shards, cache) if accelerator.is_main_process else None)
    return read_target(shards, survey(shards, cache), section)


@dataclass(frozen=True)
class Stage:
    """One run: every outer fold, the last model, and what is written of them."""

    bench: Bench
    run: Run
    splits: Sequence[Fold]
    split_name: str

    def run_through(self) -> None:
        """Judge, keep, tell."""
        wanted = not self.model.exists() and (self.official or self.bench.section.final)
        self.bench.accelerator.wait_for_everyone()  # before any rank makes the folder, all have looked for it
        fits = Fits(self.bench, self.run.folder)
        found = [self.fold(fits, number, keep=wanted and self.official) for number in range(len(self.splits))]
        if wanted:
            everybody = self.everybody
            self.keep(found[0] if self.official else fits.fit(everybody, everybody[:0], "final", 0, keep=True))
        together(self.bench.accelerator, lambda: self.write(found) if self.bench.main else None)

    @property
    def official(self) -> bool:
        """Whether one model judges all: that of an official split."""
        return len(self.splits) == 1

    @property
    def model(self) -> Path:
        """Folder of the model."""
        return self.run.folder / "model"

    @property
    def everybody(self) -> Ints:
        """All images that the kept model may learn from."""
        return self.training(0) if self.official else np.arange(len(self.bench.asked.keys))

    def training(self, number: int) -> Ints:
        """Images of an outer fold's training patients, the official `val` among them."""
        fit, splits = self.splits[number][0], self.bench.asked.task.splits
        val = np.flatnonzero(splits == "val") if self.official else fit[:0]
        return np.union1d(fit, val)

    def fold(self, fits: Fits, number: int, *, keep: bool) -> Fit:
        """What came of one outer fold."""
        return fits.fit(self.training(number), self.splits[number][1], f"outer-{number}", number, keep=keep)

    def keep(self, fit: Fit) -> None:
        """Write the model."""

        def write() -> None:
            if self.bench.main:
                assert fit.model is not None
                write_segmenter(self.model, card_for(self.bench, self.everybody, fit.thresholds), fit.model)

        together(self.bench.accelerator, write)

    # ------------------------------------------------------------------------------------------ telling

    def write(self, found: Sequence[Fit]) -> None:
        """Figures, cases, pictures."""
        bench, run = self.bench, self.run
        section, target, cases = bench.section, bench.asked.target, [case for fit in found for case in fit.cases]
        write_cases(run.folder, cases, target.classes)
        content = figures_of(cases, target.classes, rules_of(section), section.replicates, bench.settings.seed)
        split = bench.settings.data.split
        within = f", within split {split!r}" if split and split in bench.asked.task.splits else ""
        content |= {"split": self.split_name + within, "cost": cost(found), "rules": asdict(rules_of(section))}
        content["notes"] = [*self.notes(cases, found), *content["notes"]]
        masks, figures = run.folder / MASKS, run.folder / "figures"
        run.caption(draw_figures(figures, cases, bench.shards, self.rows, masks, target, bench.settings.seed))
        run.result(content)

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the data set by key."""
        return dict(zip(self.bench.asked.keys.tolist(), self.bench.asked.task.chosen.tolist(), strict=True))

    def notes(self, cases: Sequence[Case], found: Sequence[Fit]) -> list[str]:
        """What a reader of the figures has to know."""
        rows = self.rows
        told = [*self.pretrained([rows[case.key] for case in cases]), *self.bench.asked.notes]
        if self.bench.asked.target.lesions:
            told += chosen(self.bench.section.threshold, found)
        learn, total = (found[0].cost[name] for name in ("trainable", "parameters"))
        return [*told, f"{learn:,} of {total:,} parameters learnt."]

    def pretrained(self, judged: Sequence[int]) -> list[str]:
        """What the encoder saw."""
        section = self.bench.section
        if section.encoder is None:
            return []
        if section.control == "untrained":
            return ["A control: an encoder of the same shape with random weights."]
        saw = [seen(self.bench.shards, self.bench.settings.data, section.encoder, judged)]
        return [*saw, *(["A control: the decoder is given zeros for what the encoder sees."] * bool(section.control))]


def chosen(configured: float | None, found: Sequence[Fit]) -> Iterator[str]:
    """How it came that a lesion is said from a probability on."""
    if configured is not None:
        yield f"A lesion is said from probability {configured:g} on, as configured."
        return
    thresholds = ", ".join(f"{t:g}" for fit in found for t in fit.thresholds or ())
    how = "; ".join(dict.fromkeys(fit.inner for fit in found))
    yield f"Thresholds {thresholds}, by pooled Dice of {how}; 0.5 where that could not be chosen."


def card_for(bench: Bench, fit: Ints, thresholds: tuple[float, ...] | None) -> SegmentCard:
    """The card of a model that learnt from, or chose by, these images."""
    section, reading, shards = bench.section, bench.reading, bench.shards
    same = ("model", "model_options", "control", "encoder", "options", "mm_per_pixel", "long_side", "smallest")
    patients = bench.asked.task.patients[fit]
    records = tuple((manifest["dataset"], manifest["records"]) for manifest in shards.manifests)
    of = tuple(sorted({patient.rpartition("/")[2] for patient in patients.tolist()}))
    return SegmentCard(
        classes=bench.asked.target.classes,
        kind=bench.asked.target.kind,
        base=None if bench.encoder is None else Base(**describe(bench.encoder)),
        channels=shards.channels,
        control_seed=control_seed(bench.settings),
        image_size=bench.size,
        mean=bench.normalise.mean,
        std=bench.normalise.std,
        thresholds=thresholds,
        rasters=(min(sides := bench.longer_sides(fit)), max(sides)),
        overlap=reading.overlap,
        flips=reading.flips,
        preprocessing=preprocessing_of(shards),
        trained_on=TrainedOn(images=len(fit), patients=len(np.unique(patients)), records=records, of=of),
        method=section.method if bench.encoder is not None else None,
        **{name: getattr(section, name) for name in same},
    )


def cost(found: Sequence[Fit]) -> dict[str, Any]:
    """What the trainings took: the largest of sizes and memory, the mean of pace, all the time."""
    costs: list[Mapping[str, Any]] = [fit.cost for fit in found]
    return {
        "trainable": max(one["trainable"] for one in costs),
        "parameters": max(one["parameters"] for one in costs),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in costs),
        "images_per_s": float(np.mean([one["images_per_s"] for one in costs])),
        "seconds": float(sum(one["seconds"] for one in costs)),
        "trainings": len(costs),
    }
