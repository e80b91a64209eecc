"""Pictures of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

from ..engine.metrics import chance
from .linear import Judgement, Task

CAPTION = "Left: how the judged images were classified. Right: the metric in each fold; a line joins an encoder's mean."
ACCENT, PALE = "#2f6f9f", "#9aa5b1"


def draw_probe(path: Path, task: Task, probed: Sequence[tuple[str, Judgement, list[float]]]) -> None:
    """ROC curves or the confusion matrix, and the folds' figures beside them."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    if task.metric == "AUC":
        draw_roc(left, task, probed)
    else:
        draw_confusion(left, task, probed[0][1])
    draw_folds(right, task, [(name, folds) for name, _, folds in probed])
    figure.savefig(path, dpi=130)


def draw_roc(axis: Axes, task: Task, probed: Sequence[tuple[str, Judgement, list[float]]]) -> None:
    """One curve an encoder."""
    for i, (name, judgement, _) in reversed(list(enumerate(probed))):
        fpr, tpr, _ = roc_curve(task.truth[judgement.images], judgement.probabilities[:, 1])
        axis.plot(fpr, tpr, color=PALE if i else ACCENT, linewidth=1 if i else 2, label=name)
    axis.plot([0, 1], [0, 1], color="#d0d5da", linestyle=":")
    axis.set(xlabel="1 - specificity", ylabel=f"sensitivity for {task.name} = {task.classes[1]}", aspect="equal")
    axis.legend(frameon=False, fontsize=8)


def draw_confusion(axis: Axes, task: Task, judgement: Judgement) -> None:
    """Rows: truth; columns: the most probable class; shares of the row."""
    counts = confusion_matrix(
        task.truth[judgement.images], judgement.probabilities.argmax(1), labels=range(len(task.classes))
    )
    shares = counts / counts.sum(1, keepdims=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        axis.text(
            column, row, f"{counts[row, column]}", ha="center", va="center", color="white" if share > 0.55 else "black"
        )
    ticks = range(len(task.classes))
    axis.set(xticks=ticks, yticks=ticks, xticklabels=task.classes, yticklabels=task.classes)
    axis.set(xlabel="judged", ylabel=f"true {task.name}", title="pretrained encoder")


def draw_folds(axis: Axes, task: Task, probed: Sequence[tuple[str, list[float]]]) -> None:
    """Every fold's figure as a dot, encoder by encoder, over what the majority class scores."""
    for i, (_, folds) in enumerate(probed):
        colour = PALE if i else ACCENT
        axis.plot([i] * len(folds), folds, "o", color=colour, alpha=0.8, markersize=5)
        axis.hlines(np.mean(folds), i - 0.25, i + 0.25, color=colour, linewidth=2)
    axis.axhline(chance(task.metric, len(task.classes)), color="#d0d5da", linestyle=":")
    axis.set(xticks=range(len(probed)), xticklabels=[name for name, _ in probed], ylabel=f"{task.metric}, {task.name}")
    axis.spines[["top", "right"]].set_visible(False)
