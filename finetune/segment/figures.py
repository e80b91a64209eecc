"""Pictures of segmented images: examples with outlines, FROC, lesions by size, Dice image by image.

Legend: R bootstrap samples, f rates of false marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ...data.shards import ShardDataset
from ...engine.metrics import Estimate, Floats
from ..classify.bootstrap import Draws, estimated
from ..classify.figures import DRAWN, interval
from ..style import ACCENT, BESIDE, PALE, save, wrapped
from .cases import Case
from .examples import draw_examples
from .judging import draws_of
from .measures import BY, RATES, RULES, Rule, dice_of, of_class, sensitivities, strata
from .tables import counted, owners
from .target import Target

GRID = np.geomspace(RATES[0], RATES[-1], 145)  # 24 steps a doubling: the rates are among them
COLOUR: dict[Rule, str] = {"iou": ACCENT, "point": BESIDE[0]}
DASH: dict[Rule, str] = {"iou": "-", "point": "--"}
BINS = 20
ROWS = 6  # classes that the picture of Dice has room for


def draw_figures(
    folder: Path,
    cases: Sequence[Case],
    shards: ShardDataset,
    rows: Mapping[str, int],
    masks: Path,
    target: Target,
    seed: int = 0,
) -> dict[str, str]:
    """Draw what there is a picture of; the captions by file name.

    Args:
        folder: where they go; made if it is not there.
        cases: the judged images.
        shards: that they are from.
        rows: row of the data set by key.
        masks: folder with what was said of each, KEY.png of class numbers in stored geometry.
        target: what is segmented.
        seed: of the intervals.
    """
    folder.mkdir(parents=True, exist_ok=True)
    captions, draws = {}, draws_of(cases, DRAWN, seed)
    if any(case.positive for case in cases):
        captions["dice.png"] = draw_dice(folder / "dice.png", cases, target.classes)
    if any(case.lesions for case in cases):
        captions["froc.png"] = draw_froc(folder / "froc.png", cases, draws)
        captions["lesions-by-size.png"] = draw_sizes(folder / "lesions-by-size.png", cases, draws)
    return captions | draw_examples(folder, cases, shards, rows, masks, target)


# ---------------------------------------------------------------------------------------------- FROC


def draw_froc(path: Path, cases: Sequence[Case], draws: Draws) -> str:
    """Share of the lesions that are found against false marks per image, by both rules."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axis, banded = figure.add_subplot(), draws.differ(owners(cases))
    for rule in RULES:
        curve, cpm = froc(cases, rule), froc(cases, rule, RATES).mean()
        if banded:
            low, high = band(cases, rule, draws)
            axis.fill_between(GRID, low, high, color=COLOUR[rule], alpha=0.15, linewidth=0, step="post")
        told = f"{BY[rule]}, mean of the dots {cpm:.3f}"
        axis.step(GRID, curve, where="post", color=COLOUR[rule], linestyle=DASH[rule], linewidth=2, label=told)
        axis.plot(RATES, froc(cases, rule, RATES), "o", color=COLOUR[rule], markersize=5, markeredgecolor="white")
    axis.set_xscale("log", base=2)
    axis.set_xticks(RATES, [f"1/{round(1 / rate)}" if rate < 1 else f"{rate:g}" for rate in RATES])
    axis.set(ylim=(-0.02, 1.02), xlabel="false marks per image", ylabel="share of the lesions that are found")
    axis.legend(frameon=False, fontsize=8, loc="upper left" if curve[0] < 0.4 else "lower right")
    bare(axis)
    save(figure, path)
    lesions = counted(sum(len(case.lesions) for case in cases), "lesion")
    shown = f" The bands: 95 % intervals by {DRAWN} bootstrap samples of patients." * banded
    return (
        f"FROC: share of {lesions} that marks from some score on find, against the false marks per image that these "
        f"bring, over all {counted(len(cases), 'image')}; by two rules of what a hit is. The mean of the dots is the "
        f"CPM.{shown}"
    )


def froc(cases: Sequence[Case], rule: Rule, rates: Sequence[float] | Floats = GRID) -> Floats:
    """(f,) sensitivity at false marks per image."""
    return np.asarray(sensitivities(cases, rule, np.ones((1, len(cases))), [*rates])[0])


def band(cases: Sequence[Case], rule: Rule, draws: Draws) -> Floats:
    """(2, f) the 95 % interval of the sensitivity at each rate of the grid."""
    drawn = [sensitivities(cases, rule, weights, GRID.tolist()) for weights in draws.weights(owners(cases))]
    return interval(np.concatenate(drawn))


# ---------------------------------------------------------------------------------------------- sizes


SIZE_FIGURES = {
    f"lesion sensitivity, {BY['iou']}": ("found, IoU rule", COLOUR["iou"], "o"),
    f"lesion sensitivity, {BY['point']}": ("found, point rule", COLOUR["point"], "s"),
    "lesion Dice, missed as 0": ("Dice, missed as 0", PALE, "D"),
}


def draw_sizes(path: Path, cases: Sequence[Case], draws: Draws) -> str:
    """Sensitivity by both rules, and Dice, of lesions of like size."""
    some = [stratum for stratum in strata(cases) if len(stratum.lesions)]
    found = [estimated(stratum.lesions.figures, owners(cases), draws) for stratum in some]
    figure = Figure(figsize=(5.6, 1.3 + 0.75 * len(some)), layout="constrained")
    axis = figure.add_subplot()
    for place, (name, (told, colour, marker)) in enumerate(SIZE_FIGURES.items()):
        heights = np.arange(len(some)) + 0.22 * (place - 1)
        values = [of[name] for of in found]
        whiskers(axis, values, heights, colour)
        axis.plot([of.value for of in values], heights, marker, color=colour, markersize=6, label=told)
    names = [f"{stratum.name}\n{counted(len(stratum.lesions), 'lesion')}" for stratum in some]
    axis.set_yticks(range(len(some)), names)
    axis.set(xlim=(-0.02, 1.02), ylim=(len(some) - 0.5, -0.5), xlabel="share found, and Dice")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    bare(axis)
    save(figure, path)
    unit = "mm" if some[0].lesions.unit == "mm" else "pixels of the stored image, in thirds"
    shown = " The lines: 95 % intervals by bootstrap samples of patients." * draws.differ(owners(cases))
    return (
        f"Lesions by size, the diameter of a disc of their area in {unit}: share found by the mask that was said, by "
        f"two rules of what a hit is, and mean Dice, in which missed lesions count as 0.{shown}"
    )


def whiskers(axis: Axes, values: Sequence[Estimate], heights: NDArray[Any], colour: str) -> None:
    """Intervals as lines; of none nothing."""
    low, high = np.array([of.interval for of in values]).T
    axis.hlines(heights, low, high, color=colour, linewidth=1.6, alpha=0.7)


# ---------------------------------------------------------------------------------------------- Dice


def draw_dice(path: Path, cases: Sequence[Case], classes: Sequence[str]) -> str:
    """How many images have which Dice, a row a class."""
    of = {name: of_class(cases, number) for number, name in enumerate(classes[1:], 1)}
    found = {name: np.array([dice_of(case) for case in each if case.positive]) for name, each in of.items()}
    shown = {name: dice for name, dice in found.items() if len(dice)}
    shown = dict(sorted(shown.items(), key=lambda one: -len(one[1]))[:ROWS])
    figure = Figure(figsize=(5.6, 1.2 + 1.5 * len(shown)), layout="constrained")
    for axis, (name, dice) in zip(figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0], shown.items(),
                                  strict=True):  # fmt: skip
        histogram(axis, dice)
        told = f"{name}: {counted(len(dice), 'image')}, mean {dice.mean():.3f}, median {np.median(dice):.3f}"
        axis.set_title(wrapped(told, 70), fontsize=9, loc="left")
    axis.set_xlabel("Dice of an image")
    save(figure, path)
    left_out = f" Of {len(found)} classes the {len(shown)} on most images." * (len(shown) < len(classes) - 1)
    return (
        "Dice of every image with something on it. Orange: nothing of it was found, Dice 0. The line is the mean, the "
        f"dotted one the median.{left_out}"
    )


def histogram(axis: Axes, dice: Floats) -> None:
    """Images by their Dice; those with 0 told apart from those with little."""
    parts = [dice[dice == 0], dice[dice > 0]]
    axis.hist(parts, BINS, range=(0, 1), stacked=True, color=[BESIDE[0], ACCENT], rwidth=0.92)
    axis.axvline(dice.mean(), color="black", linewidth=1.2)
    axis.axvline(float(np.median(dice)), color="black", linewidth=1.2, linestyle=":")
    axis.set(xlim=(0, 1), ylabel="images")
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    bare(axis)


def bare(axis: Axes) -> None:
    """Without a frame above and at the right."""
    axis.spines[["top", "right"]].set_visible(False)
