"""One training of a run, from its patients to its judged images.

PLACE/metrics.jsonl     of the training (and checkpoints/ while it lasts)
PLACE/judged/           cases.csv, lesions.csv, candidates.csv of its judged images (casefile.py)
PLACE/fit.json          {"schema", "thresholds", "inner", "learnt_from", "chosen_on", "cost": {…}}; written last
RUN/masks/KEY.png       (H, W) class numbers that were said of a judged image, in its stored geometry

A fit whose fit.json is there is not run again, unless its model is wanted and was not kept.
Legend: K classes, H W of an image.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...data.image import encode_png
from ...data.shards import Sample
from ...engine.errors import RunFailed
from ...engine.files import make_folder, read_json, write_atomic, write_json
from ...engine.metrics import Ints
from ...engine.run import Run
from ...engine.seeding import stable_seed
from ...engine.track import Meter, reset_peak_memory
from ..classify.search import spending
from .bench import Bench, parameters
from .casefile import read_cases, write_cases
from .cases import Case, Rules, score_case
from .config import SegmentSection
from .inference import masked, probabilities
from .splits import inner
from .thresholds import BINS, choose_thresholds, histograms

FIT = "miram.fit/1"
MASKS = "masks"
Floats = NDArray[np.float32]
Thresholds = tuple[float, ...] | None  # of every class but the background; None: the likeliest class is said


@dataclass(frozen=True)
class Fit:
    """What came of one training."""

    cases: tuple[Case, ...]  # of the judged images
    thresholds: Thresholds
    inner: str  # how they were chosen, for people
    cost: Mapping[str, Any]
    model: nn.Module | None  # None where it was not trained in this start


@dataclass(frozen=True)
class Fits:
    """The trainings of one run."""

    bench: Bench
    folder: Path  # of the run

    def fit(self, images: Ints, rest: Ints, name: str, number: int, *, keep: bool = False) -> Fit:
        """Train on patients, choose a threshold on others of them, judge the rest once.

        Args:
            images: of the training patients.
            rest: images to judge.
            name: of the folder, which seeds the training: the same for every model.
            number: of the fold, as cases say it.
            keep: the model is wanted, too, and trained again if need be.
        """
        place, bench = self.folder / "fits" / name, self.bench
        known, held, how = inner(bench.asked.task, images, self.holdout, bench.settings.seed)
        there = (place / "fit.json").is_file()
        bench.accelerator.wait_for_everyone()  # before any rank writes, all have looked
        if there and not keep:
            return self.read(place, None)
        if bench.main:
            make_folder(place)
        bench.accelerator.wait_for_everyone()
        reset_peak_memory()
        began = time.monotonic()
        model = bench.make(known, place, stable_seed(bench.settings.seed, "training", name) % 2**63)
        cost = spending(place, time.monotonic() - began) | parameters(model)
        thresholds = self.thresholds(model, held)
        self.judge(model, rest, thresholds, number, place)
        if bench.main:
            facts = {"learnt_from": len(known), "chosen_on": len(held)}
            chosen = {"thresholds": thresholds, "inner": how, **facts, "cost": cost}
            write_json(place / "fit.json", FIT, chosen)
            shutil.rmtree(
                Run(place, "segment").checkpoints, ignore_errors=True
            )  # not before: judging may be stopped, too
        bench.accelerator.wait_for_everyone()
        return self.read(place, model)

    def read(self, place: Path, model: nn.Module | None) -> Fit:
        """A fit that is there."""
        content = read_json(place / "fit.json", FIT)
        thresholds = None if content["thresholds"] is None else tuple(content["thresholds"])
        return Fit(tuple(read_cases(place / "judged")), thresholds, content["inner"], content["cost"], model)

    @property
    def holdout(self) -> float | None:
        """Share of the training patients that chooses a threshold; None where none is to be chosen."""
        section = self.bench.section
        return section.holdout if self.bench.asked.target.lesions and section.threshold is None else None

    # ------------------------------------------------------------------------------------------ judging

    def thresholds(self, model: nn.Module, held: Ints) -> Thresholds:
        """Chosen on held-out images, or as configured."""
        bench, foreground = self.bench, len(self.bench.asked.target.classes) - 1
        if not bench.asked.target.lesions:
            return None
        if bench.section.threshold is not None:
            return (bench.section.threshold,) * foreground
        counted = np.zeros((foreground, 2, BINS), np.int64)
        for _, sample, said in self.said(model, held, "held-out images"):
            counted += histograms(bench.asked.target.truth(sample), said)
        return choose_thresholds(bench.total(counted))

    def judge(self, model: nn.Module, images: Ints, thresholds: Thresholds, fold: int, place: Path) -> None:
        """Write masks and cases of images; each rank its share."""
        bench, found = self.bench, []
        make_folder(self.folder / MASKS)
        for i, sample, said in self.said(model, images, "judged images"):
            mask = masked(said, thresholds, bench.section.smallest)
            write_atomic(self.folder / MASKS / f"{sample.key}.png", encode_png(mask))
            found.append(self.case(i, sample, said, mask, fold))
        rank, world = bench.accelerator.process_index, bench.accelerator.num_processes
        classes = bench.asked.target.classes
        write_cases(place / f"judged-{rank}", found, classes)
        bench.accelerator.wait_for_everyone()
        if bench.main:
            every = [case for r in range(world) for case in read_cases(place / f"judged-{r}")]
            write_cases(place / "judged", sorted(every, key=lambda case: case.key), classes)
            for r in range(world):
                shutil.rmtree(place / f"judged-{r}")

    def said(self, model: nn.Module, images: Ints, name: str) -> Iterator[tuple[int, Sample, Floats]]:
        """Images of this rank's share, one at a time: number, sample, (K, H, W) probabilities.

        Raises:
            RunFailed: a model gives some that are no numbers.
        """
        bench = self.bench
        rank, world = bench.accelerator.process_index, bench.accelerator.num_processes
        share = images[rank::world] if not bench.alone else images if bench.main else images[:0]
        with Meter(name, len(share)) as meter:
            for i in share.tolist():
                sample = bench.shards[int(bench.asked.task.chosen[i])]
                said = probabilities(model, sample, bench.reading, bench.accelerator.device)
                if not np.isfinite(said).all():
                    raise RunFailed(f"sample {sample.key}: the model gives no finite numbers; lower train.blr")
                yield i, sample, said
                meter.advance()

    def case(self, i: int, sample: Sample, said: Floats, mask: NDArray[np.uint8], fold: int) -> Case:
        """An image's scores."""
        section, asked = self.bench.section, self.bench.asked
        findings = asked.target.findings(sample) if asked.target.lesions else None
        rules = rules_of(section)
        spacing = float(sample.meta["spacing_mm"]) if sample.meta.get("spacing_mm") else None
        patient, truth = str(asked.task.patients[i]), asked.target.truth(sample)
        return score_case(sample.key, patient, fold, spacing, truth, findings, mask, said, rules)


def rules_of(section: SegmentSection) -> Rules:
    """By what a lesion counts as found, and a border as right."""
    return Rules(iou=section.hit_iou, tolerance_mm=section.tolerance_mm, tolerance_px=section.tolerance_px)
