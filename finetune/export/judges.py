"""Who judges an export: labelled images, and the figure of whatever network looks at them.

    classifier    the figure that leads, at the level that leads, of patients that the model did not learn from
    segmenter     mean Dice of such patients' images
    encoder       a linear probe of its features, fitted to them anew, by folds of patients (finetune/probes/linear.py)

Temperature and thresholds stay as they were locked. Legend: n images, j judged ones, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ...data.config import DataSection
from ...data.opening import open_shards
from ...data.shards import ShardDataset
from ...data.views import Normalisation, windows
from ...engine.config import check, read_tree
from ...engine.errors import UserError
from ...engine.metrics import Floats, Ints, bootstrap_scores, headline, patient_bootstrap
from ...pretrain.features import batched, image_means
from ..change import hashed, leading
from ..classify.bootstrap import Draws
from ..classify.cards import ModelCard
from ..classify.config import FinetuneConfig
from ..classify.labels import Labelled
from ..classify.reading import frame_logits
from ..classify.units import cases, counted
from ..config import ProbeSection
from ..evaluate import labels_for
from ..probes.linear import fit_linear
from ..sealed import CARD, CLASSIFIER, SEGMENTER, read_card
from ..segment.cases import Case, score_case
from ..segment.config import SegmentConfig, SegmentSection
from ..segment.fits import rules_of
from ..segment.inference import masked, probabilities
from ..segment.judging import METRIC, draws_of
from ..segment.locked import SegmentCard
from ..segment.measures import of_images
from ..segment.survey import survey
from ..segment.tables import owners
from ..segment.target import Asked, read_target
from ..task import Fold, Task, grouped_folds, judge_folds, outer_folds, read_task
from .parity import Runner
from .source import Source

Strings = NDArray[np.str_]
Settings = TypeVar("Settings", FinetuneConfig, SegmentConfig)
SEED = 0


class NotMeasured(UserError):
    """There are no images to measure a change on; an export that may go without says so in its card."""


@dataclass(frozen=True)
class Asking:
    """The images that were named, if any."""

    data: str | list[str] | None
    split: str | None
    task: str | None

    @property
    def part(self) -> bool:
        """Whether a split or task is named: then a measurement is wanted, and none must not pass in silence."""
        return self.split is not None or self.task is not None

    def opened(self, own: DataSection | None) -> ShardDataset:
        """Those, or a run's own, of all splits.

        Raises:
            NotMeasured: none are named, and the run's cannot be read.
            UserError: those that are named, if only by split or task, cannot be read.
        """
        if self.data is not None:
            return open_shards(DataSection(shards=self.data, split=self.split))
        if own is None:
            raise NotMeasured("no images are named to measure the change on; name them with --data")
        try:
            return open_shards(own.model_copy(update={"split": self.split}))
        except UserError as error:
            if self.part:
                raise
            raise NotMeasured(f"the run's own data cannot be read ({error}); name where it lies with --data") from error

    def unseen(self, shards: ShardDataset, patients: Strings, splits: Strings, of: Sequence[str]) -> Ints:
        """(j,) those of (n,) images whose patients a model did not learn from; of a run's own the test, if it has one.

        Raises:
            NotMeasured: it learnt from all of the run's own.
            UserError: it learnt from some that were named.
        """
        known = np.isin(hashed(patients), of)
        if self.data is not None and known.any():
            count = counted(len(np.unique(patients[known])), "patient")
            raise UserError(
                f"{', '.join(shards.roots)}: the model learnt from {count} of these; name other images, or with "
                "--split a part of them that it did not learn from"
            )
        if known.all():
            raise NotMeasured("the model learnt from all patients of its run's data; name others with --data")
        tested = ~known & (splits == "test")
        return np.flatnonzero(tested if self.data is None and tested.any() else ~known)

    def name(self, splits: Strings) -> str:
        """What the judged images are called, from the (j,) splits that they are of."""
        whose = (
            "the images named" if self.data is not None else "the run's own data, patients whose labels it never saw"
        )
        found = np.unique(splits).tolist()
        return f"{whose}, split {found[0]!r}" if len(found) == 1 and found[0] else whose


class Judge(Protocol):
    """Images, and the figure of whatever looks at them."""

    metric: str
    task: str
    split: str
    n_images: int
    n_patients: int
    drawn: bool  # whether bootstrap samples differ

    def __init__(self, source: Source, run: Path, asked: Asking, batch_size: int, replicates: int): ...

    def figures(self, runner: Runner) -> Floats:
        """(1 + R,) the figure, then its bootstrap samples."""
        ...


class Called(nn.Module):
    """A runner on the CPU as a module; moved elsewhere, it leaves the runner where it is."""

    def __init__(self, runner: Runner):
        super().__init__()
        self.held = (runner,)  # a module by itself would be moved, too

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> what the runner gives."""
        (runner,) = self.held
        return runner(images.cpu()).to(images.device)


def read_settings(run: Path, schema: type[Settings]) -> Settings:
    """The configuration that a run was made by.

    Raises:
        NotMeasured: this is a model without its run, or the run is of another stage.
    """
    path = next((p for p in (run / "config.yaml", run.parent / "config.yaml") if p.is_file()), None)
    if path is None:
        raise NotMeasured(f"{run} is a model without its run, which knows what it was judged on; name its run")
    try:
        tree = read_tree(str(path))
        tree.pop("federate", None)  # of a federation the rest is as `miram finetune` has it
        return check(schema, tree, str(path))
    except UserError as error:
        raise NotMeasured(
            f"{path} does not say what the model is judged on; name labelled images with --data"
        ) from error


def model_of(run: Path) -> Path:
    """Folder of a run's model."""
    return run if (run / CARD).is_file() else run / "model"


# ---------------------------------------------------------------------------------------------- classifier


class OfClassifier:
    """The figure that leads, of unseen patients."""

    metric: str

    def __init__(self, source: Source, run: Path, asked: Asking, batch_size: int, replicates: int):
        self.card = card = read_card(model_of(run), CLASSIFIER, ModelCard)
        own = None if asked.data is not None else read_settings(run, FinetuneConfig).data
        self.shards, self.batch_size = asked.opened(own), batch_size
        self.labelled: Labelled = labels_for(card, self.shards, asked.task)
        patients, splits = self.labelled.patients, self.labelled.splits
        self.images = asked.unseen(self.shards, patients, splits, card.trained_on.of)
        patients = patients[self.images]
        self.draws = Draws.of(self.labelled.truth[self.images], patients, replicates, SEED)
        self.metric, self.task = headline(card.target.kind), f"{self.labelled.target.name} by {card.headline}"
        self.split, self.drawn = asked.name(splits[self.images]), self.draws.differ(patients)
        self.n_images, self.n_patients = len(self.images), len(np.unique(patients))

    def figures(self, runner: Runner) -> Floats:
        """(1 + R,) the figure that leads, then its bootstrap samples."""
        card, target = self.card, self.labelled.target
        assert card.input != "tiles"
        rows, how = self.labelled.rows[self.images], (card.input, card.image_size, card.normalise, self.batch_size)
        logits = frame_logits(Called(runner), self.shards, rows, *how)
        said = target.probabilities(logits, card.temperature)
        fold = np.zeros(len(self.images), np.int64)
        of = cases(self.labelled, self.images, said, fold, card.headline, card.readout)
        return leading(target, of, self.draws, card, card.headline)


# ---------------------------------------------------------------------------------------------- segmenter


def section_of(run: Path, card: SegmentCard, asked: Asking) -> tuple[SegmentSection, DataSection | None]:
    """How a run reads masks, and its data; of a model without its run what the card says, if images are named.

    Raises:
        NotMeasured: there is no run, and no images are named.
    """
    try:
        settings = read_settings(run, SegmentConfig)
    except NotMeasured:
        if asked.data is None:
            raise
        tissues = card.kind == "classes" and card.thresholds is None
        return SegmentSection(task="tissues" if tissues else "lesions"), None
    return settings.segment, settings.data


class OfSegmenter:
    """Mean Dice of unseen patients' images with something on them."""

    metric, task = METRIC, ""

    def __init__(self, source: Source, run: Path, asked: Asking, batch_size: int, replicates: int):
        self.card = card = read_card(model_of(run), SEGMENTER, SegmentCard)
        self.section, own = section_of(run, card, asked)
        self.replicates = replicates
        self.shards, self.batch_size = asked.opened(own), batch_size
        self.asked = self.wanted(run)
        of: Task = self.asked.task
        with_findings = np.flatnonzero(of.truth == 1)
        patients, splits = of.patients[with_findings], of.splits[with_findings]
        self.images = with_findings[asked.unseen(self.shards, patients, splits, card.trained_on.of)]
        self.task, self.split = ", ".join(card.classes[1:]), asked.name(of.splits[self.images])
        self.n_images, self.n_patients = len(self.images), len(np.unique(of.patients[self.images]))
        self.drawn = self.n_patients > 1

    def wanted(self, run: Path) -> Asked:
        """What the masks ask for, as the run read them.

        Raises:
            UserError: they hold other classes.
        """
        kept = run.parent / "surveys"
        with TemporaryDirectory(prefix="miram-masks-") as folder:
            held = survey(self.shards, kept if kept.is_dir() else Path(folder))
        found = read_target(self.shards, held, self.section)
        if found.target.classes != self.card.classes:
            here, there = (", ".join(names) for names in (found.target.classes, self.card.classes))
            raise UserError(f"{', '.join(self.shards.roots)}: its masks hold {here}, and the model says {there}")
        return found

    def figures(self, runner: Runner) -> Floats:
        """(1 + R,) mean Dice, then its bootstrap samples."""
        found = [self.case(Called(runner), image) for image in self.images.tolist()]
        draws, once = draws_of(found, self.replicates, SEED), np.ones((1, len(found)))
        weights = [once, *draws.weights(owners(found))]
        return np.concatenate([of_images(found, part)[METRIC] for part in weights])

    def case(self, model: nn.Module, image: int) -> Case:
        """One image's scores.

        Raises:
            UserError: it cannot be brought to the model's resolution.
        """
        sample, card = self.shards[int(self.asked.task.chosen[image])], self.card
        try:
            told = probabilities(model, sample, card.reading(self.batch_size))
        except ValueError as error:
            raise UserError(f"sample {sample.key}: {error}; leave it out of --data") from error
        truth, rules = self.asked.target.truth(sample), rules_of(self.section, card.thresholds)
        patient, mask = str(self.asked.task.patients[image]), masked(told, card.thresholds, card.smallest)
        return score_case(sample.key, patient, 0, None, truth, None, mask, told, rules)


# ---------------------------------------------------------------------------------------------- encoder


class OfEncoder:
    """A linear probe of what the encoder gives, by folds of patients."""

    metric: str

    def __init__(self, source: Source, run: Path, asked: Asking, batch_size: int, replicates: int):
        self.source, self.shards, self.batch_size = source, asked.opened(None), batch_size
        if self.shards.channels != source.channels:
            raise UserError(
                f"{', '.join(self.shards.roots)}: images of {self.shards.channels} channels, and the encoder takes "
                f"{source.channels}; ingest them again with --channels {source.channels}"
            )
        self.of: Task = read_task(self.shards, asked.task)
        self.settings = ProbeSection(encoder="here")
        self.folds, self.split = self.divided()
        judged = np.concatenate([rest for _, rest in self.folds])
        patients = self.of.patients[judged]
        self.weights = patient_bootstrap(self.of.truth[judged], patients, replicates, SEED)
        self.metric, self.task, self.drawn = self.of.metric, f"{self.of.name}, linear probe", True
        self.n_images, self.n_patients = len(judged), len(np.unique(patients))

    def divided(self) -> tuple[list[Fold], str]:
        """Folds of patients that can be divided once more, and what they are called.

        Raises:
            UserError: there are too few patients.
        """
        of, inner = self.of, self.settings.inner_folds
        try:
            folds, name = outer_folds(of, self.settings.folds, SEED)
            for fit, _ in folds:
                list(grouped_folds(of.truth[fit], of.patients[fit], inner, SEED, of))
        except UserError as error:
            raise UserError(f"{error}: a probe measures the change; name other images with --data") from error
        return folds, name

    def figures(self, runner: Runner) -> Floats:
        """(1 + R,) the probe's figure, then its bootstrap samples."""
        x, settings = self.features(runner), self.settings

        def fit_and_judge(fit: Ints, rest: Ints) -> tuple[Floats, str]:
            search = fit_linear(x[fit], self.of, fit, settings.c_grid, settings.inner_folds, SEED)
            return search.predict_proba(x[rest]), ""

        judged = judge_folds(self.of, self.folds, fit_and_judge)
        truth, weights = self.of.truth[judged.images], np.concatenate([np.ones((1, self.n_images)), self.weights])
        return bootstrap_scores(self.of.metric, truth, judged.probabilities, weights, judged.fold)

    def features(self, runner: Runner) -> NDArray[np.float32]:
        """(n, D) of every image: the mean over the windows that cover it."""
        source, rows = self.source, self.of.chosen.tolist()
        normalise = Normalisation(source.mean, source.std)
        cut = ((i, windows(self.shards[row], source.image_size, normalise)) for i, row in enumerate(rows))
        parts = (("windows", i, window) for i, several in cut for window in several)
        found = [(of, runner(batch).float().numpy()) for _, of, batch in batched(parts, self.batch_size)]
        return image_means(found, len(rows), found[0][1].shape[1])


JUDGES: Mapping[str, type[Judge]] = {"classifier": OfClassifier, "segmenter": OfSegmenter, "encoder": OfEncoder}
