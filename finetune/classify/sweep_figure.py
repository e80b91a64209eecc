"""The picture of a sweep: figures against label fractions, a line a method."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ..style import ACCENT, BESIDE, PALE, save
from .sweep_table import Standings

CAPTION = (
    "Every method's figure, the mean over seeds, with its 95 % interval over patients and seeds; small dots are the "
    "seeds. Intervals of two methods may overlap where their paired difference is clear: see the tables."
)
STYLES = [(colour, dash) for dash in ("-", "--", ":") for colour in (ACCENT, *BESIDE, PALE)]
Curve = dict[float, tuple[float, tuple[float, float], list[float]]]  # by fraction: value, interval, seeds


def draw_sweep(path: Path, found: Standings, metric: str) -> None:
    """Lines over fractions; where there is one fraction, a row a method."""
    methods = list(dict.fromkeys(method for of in found.values() for method in of))
    curves = {m: curve(found, m) for m in methods}
    tall = 4.2 if len(found) > 1 else 1.2 + 0.42 * len(methods)
    figure = Figure(figsize=(7.5, tall), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eceef0")
    axes.set_axisbelow(True)
    (draw_lines if len(found) > 1 else draw_rows)(axes, curves, metric)
    save(figure, path)


def curve(found: Standings, method: str) -> Curve:
    """A method at the fractions where it has a figure."""
    of = {fraction: standings[method] for fraction, standings in sorted(found.items()) if method in standings}
    return {f: (s.value.value, s.value.interval, [*s.by_seed.values()]) for f, s in of.items()}


def draw_lines(axes: Axes, curves: dict[str, Curve], metric: str) -> None:
    """On a logarithmic scale, methods a little apart."""
    fractions = sorted({fraction for points in curves.values() for fraction in points})
    gaps = np.diff(np.log(fractions)) if len(fractions) > 1 else np.ones(1)
    step = min(0.06, 0.5 * float(gaps.min()) / max(1, len(curves)))
    for number, ((method, points), (colour, dash)) in enumerate(zip(curves.items(), cycle(STYLES), strict=False)):
        places = np.array([*points]) * np.exp(step * (number - (len(curves) - 1) / 2))
        values, intervals, seeds = zip(*points.values(), strict=True)
        axes.plot(places, values, color=colour, ls=dash, lw=1.5, marker="o", ms=5, label=method)
        axes.vlines(places, *np.transpose(intervals), color=colour, lw=1)
        for place, dots in zip(places, seeds, strict=True):
            axes.plot([place] * len(dots), dots, ".", color=colour, alpha=0.5, ms=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(fractions))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{100 * fraction:.4g} %" for fraction in fractions])
    axes.set(xlabel="training patients whose labels are used", ylabel=metric)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_rows(axes: Axes, curves: dict[str, Curve], metric: str) -> None:
    """The first method on top."""
    for row, (points, (colour, _)) in enumerate(zip(curves.values(), cycle(STYLES), strict=False)):
        for value, interval, seeds in points.values():
            axes.hlines(row, *interval, color=colour, lw=1.5)
            axes.plot(seeds, [row] * len(seeds), ".", color=colour, alpha=0.5, ms=5)
            axes.plot(value, row, "o", color=colour, ms=7)
    axes.set_yticks(range(len(curves)), [*curves])
    axes.set(ylim=(len(curves) - 0.4, -0.6), xlabel=metric)
