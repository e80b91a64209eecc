"""The picture of a mask: an image with the outlines of what is there and of what was said, and the finding enlarged.

    large finding                    small finding
    +---------+---------+            +---------+-------+
    |         |         |            |  whole, | part  |   What is there has solid outlines, what was said dashed
    |  bare   | marked  |            |  marked +-------+   ones: so they are told apart without colours.
    |         |         |            |         | marked|
    +---------+---------+            +---------+-------+

Legend: H W of an image, K classes with background as class 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy import ndimage

from ...data.findings import IGNORED, TOUCHING
from ...data.record import Pixels, Region
from ..style import ACCENT, BESIDE, fitted, reduced, save, wrapped

Mask = NDArray[np.bool_]
Classes = NDArray[np.uint8]
Colour = tuple[float, float, float]
Style = Literal["-"] | tuple[float, tuple[float, float]]

SOLID: Style = "-"
DASHED: Style = (0, (3.5, 2.0))
DOTTED: Style = (0, (1.0, 1.5))
GREY = "#c9ced4"  # of outlines in a legend that stand for every class, and of what is not judged
AROUND = 2.5  # sides of a finding along its enlarged part
LEAST = 48  # pixels of an enlarged part: of less one sees no surroundings
SMALL = 0.4  # of the image's longest side: a larger part is not shown enlarged


def lit(colour: str) -> Colour:
    """A colour of the house, made for white paper, as it shows on a film: the same hue, as light as it gets."""
    hue, saturation, _ = rgb_to_hsv(to_rgb(colour))
    return cast(Colour, tuple(hsv_to_rgb((hue, saturation, 1.0))))


TRUTH, SAID = lit(ACCENT), lit(BESIDE[0])  # of a single class
OF_CLASS = tuple(map(lit, (ACCENT, *BESIDE)))  # of several; from the seventh on they come again


def draw_overlay(
    path: Path,
    pixels: Pixels,
    max_value: int,
    truth: Classes | None,
    said: Classes,
    classes: Sequence[str],
    title: str,
    *,
    focus: Mask | None = None,
    probabilities: NDArray[np.float32] | None = None,
) -> None:
    """Write a PNG of an image with outlines.

    Args:
        path: the PNG.
        pixels: (H, W) or (H, W, 3).
        max_value: the largest that the format of the pixels allows.
        truth: (H, W) class numbers, IGNORED where nobody knows; None: there is none to show.
        said: (H, W) class numbers.
        classes: their names, background first.
        title: what the image is called.
        focus: (H, W) what is to be seen enlarged; None: the largest finding that is there, or else that was said.
        probabilities: (K, H, W); shades what is no background, the more the surer.
    """
    where = enlarged(largest(truth, said) if focus is None else focus)
    whole = Region(top=0, left=0, bottom=said.shape[0], right=said.shape[1])
    figure, (bare, marked, small) = panels(said.shape, where is not None)
    white = max(1.0, max_value / 255, float(np.percentile(reduced(pixels), 99.8)))
    for axis, region, lines in ((bare, where or whole, False), (marked, whole, True), (small, where or whole, True)):
        if axis is not None:
            show(axis, pixels, region, white)
            if lines and probabilities is not None:
                shade(axis, probabilities, region)
            if lines:
                outlines(axis, truth, said, len(classes), region)
    if where is not None:
        frame(marked, where)
    figure.suptitle(fitted(title, figure.get_figwidth() - 0.4, 9), fontsize=9)
    key = legend(classes, truth, said)
    figure.legend(handles=key, loc="outside lower center", ncols=min(4, len(key)), frameon=False, fontsize=8)
    save(figure, path)


def panels(shape: tuple[int, ...], zoomed: bool) -> tuple[Figure, tuple[Axes, Axes, Axes | None]]:
    """Axes of the bare image or part, of the whole with outlines, and of the part with outlines."""
    tall = 3.6 * min(max(shape[0] / shape[1], 0.8), 1.6)
    figure = Figure(figsize=(7.2, tall + 0.8), layout="constrained")
    if not zoomed:
        left, right = figure.subplots(1, 2)
        return figure, (left, right, None)
    axes = figure.subplot_mosaic([["whole", "bare"], ["whole", "part"]], width_ratios=[1.5, 1])
    return figure, (axes["bare"], axes["whole"], axes["part"])


# ---------------------------------------------------------------------------------------------- where to look


def largest(truth: Classes | None, said: Classes) -> Mask:
    """The largest connected part of what is there, or where nothing is, of what was said."""
    there = present(said if truth is None else truth)
    number, count = ndimage.label(there if there.any() else present(said), TOUCHING)
    return cast(Mask, number == 1 + np.argmax(np.bincount(number.ravel())[1:])) if count else there


def present(mask: Classes) -> Mask:
    """Where there is anything but background, as far as somebody knows."""
    return (mask > 0) & (mask != IGNORED)


def enlarged(focus: Mask) -> Region | None:
    """A square around what is to be seen; None where there is nothing, or it is large enough as it is."""
    if not focus.any():
        return None
    box = ndimage.find_objects(focus.astype(np.uint8))[0]
    side = round(max(LEAST, AROUND * max(part.stop - part.start for part in box)))
    if side > SMALL * max(focus.shape):
        return None
    middles = [(part.start + part.stop) // 2 for part in box]
    starts = [max(0, min(m - side // 2, n - side)) for m, n in zip(middles, focus.shape, strict=True)]
    ends = [min(start + side, n) for start, n in zip(starts, focus.shape, strict=True)]
    return Region(top=starts[0], left=starts[1], bottom=ends[0], right=ends[1])


# ---------------------------------------------------------------------------------------------- what is drawn


def show(axis: Axes, pixels: Pixels, region: Region, white: float) -> None:
    """A part of an image in the coordinates of the whole, made small where it is large."""
    part = pixels[region.top : region.bottom, region.left : region.right]
    axis.imshow(np.clip(reduced(part) / white, 0, 1), cmap="gray", vmin=0, vmax=1, extent=place(region))
    axis.autoscale(False)
    axis.set_axis_off()


def shade(axis: Axes, probabilities: NDArray[np.float32], region: Region) -> None:
    """The probability that a pixel is no background, as a veil."""
    sure = 1 - probabilities[0, region.top : region.bottom, region.left : region.right]
    veil = reduced(np.rint(255 * np.clip(sure, 0, 1)).astype(np.uint8)) / 255
    colours = np.broadcast_to([*SAID, 0.0], (*veil.shape, 4)).copy()
    colours[..., 3] = 0.5 * veil
    axis.imshow(colours, extent=place(region))


def outlines(axis: Axes, truth: Classes | None, said: Classes, classes: int, region: Region) -> None:
    """Of every class what is there and what was said, and of what is not judged; of a part of the image."""
    start = max(0, region.top - 2), max(0, region.left - 2)  # where masks are cut, the edge lies beyond what is shown
    said = said[start[0] : region.bottom + 2, start[1] : region.right + 2]
    truth = None if truth is None else truth[start[0] : region.bottom + 2, start[1] : region.right + 2]
    for number in range(1, classes):
        solid, dashed = colours_of(number, classes)
        if truth is not None:
            outline(axis, truth == number, solid, SOLID, start)
        outline(axis, said == number, dashed, DASHED, start)
    if truth is not None:
        outline(axis, truth == IGNORED, to_rgb(GREY), DOTTED, start)


def outline(axis: Axes, mask: Mask, colour: Colour, style: Style, start: tuple[int, int] = (0, 0)) -> None:
    """The edge of a mask that begins at a row and a column of the image, closed at its own edge too."""
    if not mask.any():
        return
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    y, x = (at + np.arange(part.start - 1, part.stop + 1) for at, part in zip(start, (rows, columns), strict=True))
    height = np.pad(mask[rows, columns].astype(np.uint8), 1)
    drawn = axis.contour(x, y, height, [0.5], colors=[colour], linewidths=1.4, linestyles=[style])
    drawn.set(path_effects=[withStroke(linewidth=2.2, foreground="black", alpha=0.4)])


def frame(axis: Axes, region: Region) -> None:
    """Where the enlarged part lies."""
    left, right, bottom, top = place(region)
    box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=0.8, alpha=0.8)
    axis.add_patch(box)


def legend(classes: Sequence[str], truth: Classes | None, said: Classes) -> list[Line2D]:
    """What an outline means: of one class its two lines, of several a line a class and the two styles."""
    nothing = [" (nothing)" * (not present(mask).any()) for mask in (said if truth is None else truth, said)]
    several = len(classes) > 2
    solid, dashed = (to_rgb("#57606a"),) * 2 if several else colours_of(1, len(classes))
    lines = [(solid, SOLID, f"truth{nothing[0]}"), (dashed, DASHED, f"prediction{nothing[1]}")][truth is None :]
    if several:
        names = enumerate(classes[1:], 1)
        lines += [(colours_of(number, len(classes))[0], SOLID, wrapped(name, 24)) for number, name in names]
    if truth is not None and (truth == IGNORED).any():
        lines.append((to_rgb(GREY), DOTTED, "not judged"))
    edge = [withStroke(linewidth=2.6, foreground="#57606a")]
    return [Line2D([], [], color=c, linestyle=s, linewidth=1.8, label=n, path_effects=edge) for c, s, n in lines]


def colours_of(number: int, classes: int) -> tuple[Colour, Colour]:
    """Colours of a class's truth and prediction: two where it is the only one, else its own for both."""
    return (TRUTH, SAID) if classes == 2 else (OF_CLASS[(number - 1) % len(OF_CLASS)],) * 2


def place(region: Region) -> tuple[float, float, float, float]:
    """Edges of a part for an axis: left, right, bottom, top."""
    return region.left - 0.5, region.right - 0.5, region.bottom - 0.5, region.top - 0.5
