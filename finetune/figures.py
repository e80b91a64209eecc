"""Pictures of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

from ..engine.metrics import chance
from .style import ACCENT, BESIDE, FAINT, PALE, fitted, save
from .task import Task
from .trial import Contestant, Probed

CAPTION = (
    "Left: how the first probe classified the judged images; a ROC curve pools the folds, while an AUC counts pairs of "
    "images within folds only. Right: an encoder's figure over all of them as a bar, its "
    "95 % interval as a line, a dot for every fold; dotted, what the majority class scores."
)


def draw_probe(path: Path, task: Task, probed: Sequence[Probed]) -> None:
    """ROC curves or the confusion matrix of the first method, and every method's folds beside them."""
    height = max(3.6, 0.9 + 0.22 * len(probed))
    figure = Figure(figsize=(9.5, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    headline = [p for p in probed if p.method == probed[0].method]
    if task.metric == "AUC":
        draw_roc(left, task, headline)
    else:
        draw_confusion(left, task, headline[0])
    draw_folds(right, task, probed)
    save(figure, path)


def colours(probed: Sequence[Probed]) -> dict[Contestant, str]:
    """A colour for every encoder: the first one's, one each beside it, and pale for random weights."""
    of = {p.encoder: PALE if p.encoder.role == "control" else ACCENT for p in probed}
    beside = dict.fromkeys(p.encoder for p in probed if p.encoder.role == "beside")
    return of | {encoder: BESIDE[i % len(BESIDE)] for i, encoder in enumerate(beside)}


def draw_roc(axis: Axes, task: Task, probed: Sequence[Probed]) -> None:
    """One curve an encoder, all folds pooled; random weights share a line of the legend."""
    colour, controls = colours(probed), [p for p in probed if p.encoder.role == "control"]
    drawn = [p for p in probed if len(np.unique(task.truth[p.judgement.images])) == 2]  # no curve of a single class
    for p in reversed(drawn):
        fpr, tpr, _ = roc_curve(task.truth[p.judgement.images], p.judgement.probabilities[:, 1])
        name = "random weights" if p in controls[:1] else "" if p in controls else p.encoder.name
        width = 2 if p.encoder.role == "first" else 1
        axis.plot(fpr, tpr, color=colour[p.encoder], linewidth=width, label=name or None)
    axis.plot([0, 1], [0, 1], color=FAINT, linestyle=":")
    of = fitted(f"sensitivity for {task.name} = {task.classes[1]}", 2.4, 10)
    axis.set(xlabel="1 - specificity", ylabel=of, aspect="equal")
    folds = len(np.unique(probed[0].judgement.fold))
    axis.set_title(probed[0].method + f", {folds} folds pooled" * (folds > 1), fontsize=9)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="lower right")


def draw_confusion(axis: Axes, task: Task, probed: Probed) -> None:
    """Rows: truth; columns: the most probable class; shares of the row."""
    judgement, ticks = probed.judgement, range(len(task.classes))
    counts = confusion_matrix(task.truth[judgement.images], judgement.probabilities.argmax(1), labels=ticks)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.55 else "black"
        axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour)
    axis.set(xticks=ticks, yticks=ticks, xticklabels=task.classes, yticklabels=task.classes)
    axis.set(xlabel="judged", ylabel=fitted(f"true {task.name}", 2.4, 10))
    axis.set_title(f"{probed.method}, {probed.encoder.name} encoder", fontsize=9)


def draw_folds(axis: Axes, task: Task, probed: Sequence[Probed]) -> None:
    """A row for every encoder, method after method: its figure with its interval, and a dot for every fold."""
    colour, methods = colours(probed), list(dict.fromkeys(p.method for p in probed))
    ordered = sorted(probed, key=lambda p: methods.index(p.method))
    places = [row + methods.index(p.method) for row, p in enumerate(ordered)]  # an empty row before each method
    for place, p in zip(places, ordered, strict=True):
        axis.plot(p.folds, [place] * len(p.folds), "o", color=colour[p.encoder], alpha=0.6, markersize=4)
        axis.vlines(p.value, place - 0.35, place + 0.35, color=colour[p.encoder], linewidth=2.5)
        axis.hlines(place, *p.estimate.interval, color=colour[p.encoder], linewidth=1)
    axis.axvline(chance(task.metric, len(task.classes)), color=FAINT, linestyle=":")
    axis.set_yticks(places, [p.encoder.name for p in ordered], fontsize=8)
    axis.set(ylim=(max(places) + 0.7, -0.7 - (len(methods) > 1)), xlabel=fitted(f"{task.metric}, {task.name}", 3, 10))
    axis.spines[["top", "right"]].set_visible(False)
    for method in methods if len(methods) > 1 else []:
        row = places[[p.method for p in ordered].index(method)] - 0.75
        axis.text(0.01, row, method, transform=axis.get_yaxis_transform(), fontsize=8, weight="bold", va="center")
