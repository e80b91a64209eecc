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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...data.image import encode_png
from ...data.shards import Sample
from ...engine.errors import RunFailed
from ...engine.files import make_folder, read_json, write_atomic, write_json
from ...engine.launch import together
from ...engine.metrics import Ints
from ...engine.run import Run
from ...engine.seeding import stable_seed
from ...engine.track import Meter, reset_peak_memory
from ..classify.search import spending
from .bench import Bench, parameters
from .casefile import read_cases, write_cases
from .cases import Case, Rules, score_case
from .config import SegmentSection
from .inference import masked
from .inference import probabilities as read_image
from .splits import inner
from .thresholds import BINS, choose_thresholds, histograms

FIT = "miram.fit/1"
MASKS = "masks"
Probabilities = NDArray[np.float32]
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
            self.tidy(place)
            return self.read(place, None)
        if bench.main:
            make_folder(place)
        bench.accelerator.wait_for_everyone()
        reset_peak_memory()
        began = time.monotonic()
        model = bench.make(known, place, stable_seed(bench.settings.seed, "training", name) % 2**63)
        cost = spending(place, time.monotonic() - began) | parameters(model)
        thresholds = self.thresholds(model, held)
        together(bench.accelerator, lambda: self.judge(model, rest, thresholds, number, place))
        together(bench.accelerator, lambda: self.join(place) if bench.main else None)
        if bench.main:
            facts = {"learnt_from": len(known), "chosen_on": len(held), "cost": cost}
            write_json(place / "fit.json", FIT, {"thresholds": thresholds, "inner": how, **facts})
            self.tidy(place)
        bench.accelerator.wait_for_everyone()
        return self.read(place, model)

    def tidy(self, place: Path) -> None:
        """Remove what a finished fit needs no longer: not before, as judging may be stopped, too."""
        if self.bench.main:
            for folder in (Run(place, "segment").checkpoints, *place.glob("judged-*")):
                shutil.rmtree(folder, ignore_errors=True)

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

        def count() -> None:
            for _, sample, probabilities in self.read_off(model, held, "held-out images"):
                counted[:] += histograms(bench.asked.target.truth(sample), probabilities)

        together(bench.accelerator, count)
        return choose_thresholds(bench.total(counted))

    def judge(self, model: nn.Module, images: Ints, thresholds: Thresholds, fold: int, place: Path) -> None:
        """Write masks and cases of this rank's share of the images."""
        bench, found = self.bench, []
        make_folder(self.folder / MASKS)
        for i, sample, probabilities in self.read_off(model, images, "judged images"):
            said = masked(probabilities, thresholds, bench.section.smallest)
            write_atomic(self.folder / MASKS / f"{sample.key}.png", encode_png(said))
            found.append(self.case(i, sample, said=said, probabilities=probabilities, thresholds=thresholds, fold=fold))
        write_cases(place / f"judged-{bench.accelerator.process_index}", found, bench.asked.target.classes)

    def join(self, place: Path) -> None:
        """Write the cases of all ranks as one."""
        ranks = [place / f"judged-{rank}" for rank in range(self.bench.accelerator.num_processes)]
        every = [case for folder in ranks for case in read_cases(folder)]
        write_cases(place / "judged", sorted(every, key=lambda case: case.key), self.bench.asked.target.classes)

    def read_off(self, model: nn.Module, images: Ints, name: str) -> Iterator[tuple[int, Sample, Probabilities]]:
        """Images of this rank's share, one at a time: number, sample, (K, H, W) probabilities.

        Raises:
            RunFailed: a model gives some that are no numbers.
        """
        bench = self.bench
        rank, world = bench.accelerator.process_index, bench.accelerator.num_processes
        share = images[rank::world] if not bench.only_main else images if bench.main else images[:0]
        with Meter(name, len(share)) as meter:
            for i in share.tolist():
                sample = bench.shards[int(bench.asked.task.chosen[i])]
                found = read_image(model, sample, bench.reading, bench.accelerator.device)
                if not np.isfinite(found).all():
                    raise RunFailed(f"sample {sample.key}: the model gives no finite numbers; lower train.blr")
                yield i, sample, found
                meter.advance()

    def case(
        self,
        i: int,
        sample: Sample,
        *,
        said: NDArray[np.uint8],
        probabilities: Probabilities,
        thresholds: Thresholds,
        fold: int,
    ) -> Case:
        """An image's scores."""
        asked, rules = self.bench.asked, rules_of(self.bench.section, thresholds)
        return score_case(
            sample.key,
            str(asked.task.patients[i]),
            fold,
            float(sample.meta["spacing_mm"]) if sample.meta.get("spacing_mm") else None,
            asked.target.truth(sample),
            asked.target.findings(sample) if asked.target.lesions else None,
            said,
            probabilities,
            rules,
        )


def rules_of(section: SegmentSection, thresholds: Thresholds = None) -> Rules:
    """By what a lesion counts as found, and a border as right.

    Marks begin at half the threshold of masks, if that is low: else a model that is sure of nothing would have masks
    and no marks.
    """
    rules = Rules(iou=section.hit_iou, tolerance_mm=section.tolerance_mm, tolerance_px=section.tolerance_px)
    return replace(rules, floor=min(rules.floor, min(thresholds) / 2)) if thresholds else rules
