"""Pictures of judged images: ROC, precision against recall, calibration, confusion.

Legend: m cases, k classes, R bootstrap samples, x points of a curve, b bins of probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_curve

from ...engine.metrics import Floats, Ints, Kind, ranking
from ...engine.metrics.calibration import BINS
from ..style import ACCENT, BESIDE, FAINT, PALE, save, wrapped
from .bootstrap import Draws
from .config import FinetuneSection
from .judged import Judged
from .units import LEVELS, PLURAL

Draw = Callable[[Path, Judged, FinetuneSection, int], str]
GRID = np.linspace(0, 1, 501)
DRAWN = 400  # bootstrap samples of patients behind a band
COLOURS = (ACCENT, *BESIDE)  # labels beyond have no curve
AXIS, LEGEND = 52, 36  # characters along an axis, and of a line of a legend


def draw_figures(folder: Path, judged: Judged, section: FinetuneSection, seed: int = 0) -> dict[str, str]:
    """Draw what there is a picture of for the task's kind; the captions by file name.

    Args:
        folder: where they go; made if it is not there.
        judged: the judged images.
        section: read-out and level that leads.
        seed: of the bands.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = judged.labelled.target.kind
    curves: dict[str, Draw] = {"roc": draw_roc, "pr": draw_pr}
    if kind in ("binary", "multilabel") and not lines(judged, section):  # a curve takes both classes
        curves = {}
    confusion: dict[str, Draw] = {"confusion": draw_confusion}
    of_kind: dict[Kind, dict[str, Draw]] = {"binary": curves | confusion, "multilabel": curves}
    pictures = of_kind.get(kind, confusion) | {"calibration": draw_calibration}
    return {f"{name}.png": draw(folder / f"{name}.png", judged, section, seed) for name, draw in pictures.items()}


# ---------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Line:
    """One curve: a level's cases, or a label's at the level that leads."""

    name: str
    colour: str
    leads: bool
    truth: Ints  # (m,) 0 or 1
    score: Floats  # (m,)
    decided: Ints  # (m,) 0 or 1
    patients: NDArray[np.str_]  # (m,)
    folds: Ints | None  # (m,) within which scores are compared

    @property
    def width(self) -> float:
        """Of the line, in points."""
        return 2.2 if self.leads else 1.2

    @property
    def banded(self) -> bool:
        """Whether a band is drawn: for what leads, and not of one patient."""
        return self.leads and len(np.unique(self.patients)) > 1

    @property
    def once(self) -> Floats:
        """(1, m) weights of the cases as they are."""
        return np.ones((1, len(self.truth)))

    def sensitivity(self, weights: Floats) -> Floats:
        """(R, x) at the false positive rates of the grid; nan in a sample without a pair to compare.

        Of several folds it is the mean by their pairs of a positive and a negative, so that its area is the AUC.
        """
        of = ranking.curves(self.truth, self.score, weights, self.folds)
        pairs = np.sum([curve.pairs for curve in of], axis=0)
        found = np.where(pairs > 0, 0.0, np.nan)[:, None] * np.ones(len(GRID))
        for curve in of:
            for r in np.flatnonzero(curve.pairs):
                false, true = (np.append(0, side[r] / side[r, -1]) for side in (curve.negatives, curve.positives))
                found[r] += curve.pairs[r] / pairs[r] * np.interp(GRID, false, true)
        return found

    def band(self, seed: int) -> Floats:
        """(2, x) the 95 % interval of the sensitivity at each false positive rate."""
        draws = Draws.of(self.truth, self.patients, DRAWN, seed)
        drawn = np.concatenate([self.sensitivity(weights) for weights in draws.weights(self.patients)])
        return interval(drawn)


def lines(judged: Judged, section: FinetuneSection) -> list[Line]:
    """A line a level that has both classes to compare; of several labels a line each, the most frequent first."""
    target, found = judged.labelled.target, list[Line]()
    for level in LEVELS if target.kind == "binary" else (section.headline,):
        of = judged.cases(level, section.readout)
        decided, folds = judged.decided(of), of.fold if judged.grouped else None
        answers = [(PLURAL[level], of.truth, of.probabilities[:, 1], decided)]
        if target.kind != "binary":
            labels = zip(target.classes, of.truth.T, of.probabilities.T, decided.T, strict=True)
            answers = sorted(labels, key=lambda label: -label[1].sum())
        for name, truth, score, said in answers:
            if comparable(truth, folds) and len(found) < len(COLOURS):
                leads = target.kind == "binary" and level == section.headline
                found.append(Line(name, COLOURS[len(found)], leads, truth, score, said, of.patients, folds))
    return found


def comparable(truth: Ints, folds: Ints | None) -> bool:
    """Whether there is a positive and a negative, in one fold if scores are compared within folds alone."""
    groups = np.zeros_like(truth) if folds is None else folds
    return any(len(np.unique(truth[groups == group])) == 2 for group in np.unique(groups))


def draw_roc(path: Path, judged: Judged, section: FinetuneSection, seed: int) -> str:
    """Sensitivity against false positive rate, a line a level or label."""
    figure, axis = square()
    drawn = lines(judged, section)
    for line in drawn:
        auc = ranking.auc(line.truth, line.score, line.once, line.folds)[0]
        if line.banded:
            axis.fill_between(GRID, *line.band(seed), color=line.colour, alpha=0.15, linewidth=0)
        curve = line.sensitivity(line.once)[0]
        axis.plot(
            [0, *GRID],
            [0, *curve],
            color=line.colour,
            linewidth=line.width,
            label=wrapped(f"{line.name}, AUC {auc:.3f}", LEGEND),
        )
        dot(axis, line, line.decided[line.truth == 0].mean(), line.decided[line.truth == 1].mean())
    axis.plot([0, 1], [0, 1], color=FAINT, linestyle=":", zorder=0)
    axis.set(xlabel="1 - specificity", ylabel=wrapped(f"sensitivity{positive(judged)}", AXIS))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)
    band = f" The band: 95 % interval for {PLURAL[section.headline]}, by bootstrap samples of patients."
    within = " A curve is the mean over folds, so that its area is the AUC within folds; dots need not lie on it."
    return f"ROC curves {of_what(judged, section, drawn)}{band * any(x.banded for x in drawn)}{within * judged.grouped}"


def draw_pr(path: Path, judged: Judged, section: FinetuneSection, seed: int) -> str:
    """Precision against recall, a line a level or label."""
    figure, axis = square()
    drawn = lines(judged, section)
    for line in drawn:
        precision, recall, _ = precision_recall_curve(line.truth, line.score)
        found = ranking.average_precision(line.truth, line.score, line.once)[0]
        told = wrapped(f"{line.name}, AP {found:.3f}", LEGEND)
        axis.step(recall, precision, where="post", color=line.colour, linewidth=line.width, label=told)
        axis.axhline(line.truth.mean(), color=line.colour, linestyle=":", linewidth=1, alpha=0.6, zorder=0)
        if line.decided.any():
            dot(axis, line, line.decided[line.truth == 1].mean(), line.truth[line.decided == 1].mean())
    axis.set(xlabel=wrapped(f"sensitivity (recall){positive(judged)}", AXIS), ylabel="precision")
    axis.legend(frameon=False, fontsize=8, loc="best")
    save(figure, path)
    pooled = " Folds are pooled." * judged.grouped
    return (
        f"Precision against recall {of_what(judged, section, drawn)} Dotted: the share of positives, which chance "
        f"would give.{pooled}"
    )


def square() -> tuple[Figure, Axes]:
    """A figure with one square axis from 0 to 1."""
    figure = Figure(figsize=(4.8, 4.6), layout="constrained")
    axis = figure.add_subplot()
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def dot(axis: Axes, line: Line, x: float, y: float) -> None:
    """Where the decisions lie."""
    axis.plot(x, y, "o", color=line.colour, markersize=6, markeredgecolor="white", zorder=4, clip_on=False)


def positive(judged: Judged) -> str:
    """What the positive answer of two is, for an axis."""
    target = judged.labelled.target
    return f", {target.name} = {target.classes[1]}" if target.kind == "binary" else ""


def of_what(judged: Judged, section: FinetuneSection, drawn: list[Line]) -> str:
    """What the curves are of, for a caption."""
    target = judged.labelled.target
    if target.kind == "binary":
        return "of images, breasts and patients; a dot is what the threshold gives."
    less = f" ({len(drawn)} of {len(target.classes)}, the most frequent)" * (len(drawn) < len(target.classes))
    return f"of {PLURAL[section.headline]}, a line a label{less}; a dot is what its threshold gives."


# ---------------------------------------------------------------------------------------------- calibration


def draw_calibration(path: Path, judged: Judged, section: FinetuneSection, seed: int) -> str:
    """How often an image is what it was said to be, before and after temperature; below, what was said."""
    kind = judged.labelled.target.kind
    figure = Figure(figsize=(4.8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bins_of(above, below, Claims.of(judged, judged.uncalibrated), "before temperature", PALE)
    after = Claims.of(judged, judged.probabilities)
    bins_of(above, below, after, "after", ACCENT)
    above.vlines(after.mean, *after.interval(judged, seed), color=ACCENT, linewidth=1, alpha=0.5)
    above.plot([0, 1], [0, 1], color=FAINT, linestyle=":", zorder=0)
    above.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02), ylabel=CLAIMS[kind][1])
    above.legend(frameon=False, fontsize=8, loc="upper left", markerscale=0.7)
    below.set(ylabel="images" if kind != "multilabel" else "answers")
    below.set_xlabel(wrapped(CLAIMS[kind][0].format(positive(judged)), AXIS))
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
    return (
        f"Calibration of images, in {BINS} bins of equal width: how often it was so against what was said; on the "
        "dotted line both agree. A dot is the larger the more images its bin has; the upright line is its 95 % "
        "interval by bootstrap samples of patients, where enough of them have such an image. Below: how often each "
        "probability was said."
    )


def bins_of(above: Axes, below: Axes, claims: Claims, name: str, colour: str) -> None:
    """A dot a bin, the larger the more it holds, and below how much that is."""
    many = np.bincount(claims.bins)[claims.held]
    above.plot(claims.mean, claims.share, color=colour, linewidth=0.8)
    above.scatter(claims.mean, claims.share, 12 + 150 * many / many.sum(), color=colour, label=name, zorder=3)
    shape: Literal["stepfilled", "step"] = "stepfilled" if name == "after" else "step"
    below.hist(claims.said, BINS, range=(0, 1), color=colour, histtype=shape, linewidth=1.6)


CLAIMS: dict[Kind, tuple[str, str]] = {
    "binary": ("probability{}", "share of positives"),
    "multilabel": ("probability of a label", "share of images that have it"),
    "multiclass": ("probability of the most probable class", "share that is right"),
    "ordinal": ("probability of the most probable class", "share that is right"),
}


@dataclass(frozen=True)
class Claims:
    """What was said, and whether it was so: one claim an image, of labels one each. c: claims."""

    said: Floats  # (c,) probability
    so: Ints  # (c,) 0 or 1
    owner: Ints  # (c,) which judged image

    @classmethod
    def of(cls, judged: Judged, probabilities: Floats) -> Claims:
        """Those of (j, k) probabilities."""
        truth, kind = judged.labelled.truth[judged.images], judged.labelled.target.kind
        every = np.arange(len(truth))
        if kind == "binary":
            return cls(probabilities[:, 1], truth, every)
        if kind == "multilabel":
            return cls(probabilities.ravel(), truth.ravel(), np.repeat(every, truth.shape[1]))
        return cls(probabilities.max(1), (probabilities.argmax(1) == truth).astype(np.int64), every)

    @property
    def bins(self) -> Ints:
        """(c,) the bin of each."""
        return np.minimum((self.said * BINS).astype(np.int64), BINS - 1)

    @property
    def held(self) -> Ints:
        """(b,) bins that hold something."""
        return np.unique(self.bins)

    @property
    def mean(self) -> Floats:
        """(b,) mean of what was said in each of them."""
        return np.array([self.said[self.bins == b].mean() for b in self.held])

    @property
    def share(self) -> Floats:
        """(b,) share of it that was so."""
        return np.asarray(shares_of(self.so, self.bins, self.held, np.ones((1, len(self.so))))[0])

    def interval(self, judged: Judged, seed: int) -> Floats:
        """(2, b) 95 % interval of the shares, by bootstrap samples of patients."""
        patients = judged.labelled.patients[judged.images]
        draws = Draws.of(judged.labelled.truth[judged.images], patients, DRAWN, seed)
        drawn = [shares_of(self.so, self.bins, self.held, w) for w in draws.weights(patients[self.owner])]
        return interval(np.concatenate(drawn))


def shares_of(so: Ints, bins: Ints, held: Ints, weights: Floats) -> Floats:
    """(R, b) share of what was so in every bin that holds something; nan where a sample has nothing there."""
    inside = (bins[:, None] == held).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray((weights @ (inside * so[:, None])) / (weights @ inside))


def interval(drawn: Floats) -> Floats:
    """(2, b) 2.5 and 97.5 percentiles of (R, b); nan where half of the samples have nothing."""
    known = np.isfinite(drawn).mean(0) > 0.5
    found = np.full((2, drawn.shape[1]), np.nan)
    found[:, known] = np.nanpercentile(drawn[:, known], [2.5, 97.5], axis=0)
    return found


# ---------------------------------------------------------------------------------------------- confusion


def draw_confusion(path: Path, judged: Judged, section: FinetuneSection, seed: int) -> str:
    """Rows: truth; columns: what was decided; numbers of cases on shares of the row."""
    target = judged.labelled.target
    of = judged.cases(section.headline, section.readout)
    ticks = np.arange(len(target.classes))
    counts = confusion_matrix(of.truth, judged.decided(of), labels=ticks)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.4 + 0.75 * len(ticks)
    figure = Figure(figsize=(side, side - 0.4), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        told = f"{counts[row, column]}\n{share:.0%}"
        axis.text(column, row, told, ha="center", va="center", fontsize=9, color="white" if share > 0.55 else "black")
    names = [wrapped(name, 14) for name in target.classes]
    axis.set(xticks=ticks, yticks=ticks, xlabel="decided", ylabel=wrapped(f"true {target.name}", 12 + 10 * len(ticks)))
    steep = len(ticks) > 2 and max(map(len, names)) > 8
    axis.set_xticklabels(names, rotation=40 if steep else 0, ha="right" if steep else "center", rotation_mode="anchor")
    axis.set_yticklabels(names)
    axis.spines[:].set_visible(False)
    save(figure, path)
    by = {"binary": "by the threshold", "ordinal": "the median of the classes"}.get(
        target.kind, "the most probable class"
    )
    return f"What was decided ({by}) on {len(of)} {PLURAL[section.headline]}: numbers, and shares of a true class."
