"""A contact sheet of a data set: samples side by side at one scale, findings drawn where the index says they are."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle as Ring
from matplotlib.patches import Polygon as Outline
from matplotlib.patches import Rectangle

from ..engine.seeding import generator
from .geometry import area_resize, nearest
from .layout import LABEL, SAMPLE
from .shards import Sample, ShardDataset
from .table import Row

MARK, MASK = "#e8a33d", "#4fb3d9"
DARK = 0.25  # of the range: an image that stays below is shown brighter than it is, and marked
CELL = 4.5  # square inches of a picture
LONGEST = 500  # pixels of a picture's longest side on the sheet


def contact_sheet(shards: ShardDataset, out: Path, count: int, columns: int = 8, seed: int = 0) -> None:
    """Write a PNG of `count` samples drawn evenly at random."""
    chosen = np.sort(generator(seed, "gallery").permutation(len(shards))[:count])
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    tall = np.median([int(shards.rows[int(i)]["height"]) / int(shards.rows[int(i)]["width"]) for i in chosen])
    width = float(np.clip(np.sqrt(CELL / tall), 1.2, 3.5))
    titles = [caption(shards.rows[int(i)], round(15 * width)) for i in chosen]
    lines = max(title.count("\n") + 2 for title in titles)
    figure = Figure(figsize=(width * columns, (width * tall + 0.13 * lines + 0.1) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, axis, title in zip(chosen, axes.flat, titles, strict=False):
        draw(axis, shards[int(i)], title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def caption(row: Row, letters: int) -> str:
    """Side, view, split and labels of a sample, in lines of so many letters."""
    labels = [
        f"{column.removeprefix(LABEL)} {value}" for column, value in row.items() if column.startswith(LABEL) and value
    ]
    first = " ".join(filter(None, (row["laterality"], row["view"], row["split"])))
    pairs = (", ".join(labels[i : i + 2]) for i in range(0, min(len(labels), 8), 2))
    return "\n".join(shorten(line, letters, placeholder=" …") for line in (first, *pairs) if line)


def draw(axis: Axes, sample: Sample, title: str) -> None:
    """One sample, with its marks and the outlines in its mask."""
    pixels = np.asarray(sample.pixels)
    height, width = pixels.shape[:2]
    factor = max(1.0, max(height, width) / LONGEST)
    small = area_resize(pixels, (max(1, round(height / factor)), max(1, round(width / factor))))
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    brightest = max(1, int(np.percentile(small, 99.8)))
    axis.imshow(small, cmap="gray", vmin=0, vmax=brightest, extent=extent)
    if DARK * sample.max_value > brightest:  # wrong bits or a wrong window would not show in a stretched picture
        title += f"\n{sample.max_value / brightest:.0f} x too dark"
    marks = sample.meta if sample.meta.get("schema") == SAMPLE else {}  # foreign JSON may mean anything by the names
    for circle in marks.get("circles", ()):
        axis.add_patch(Ring((circle["x"], circle["y"]), circle["radius"], fill=False, color=MARK, linewidth=1))
    for box in marks.get("boxes", ()):
        corner, size = (box["left"], box["top"]), (box["right"] - box["left"], box["bottom"] - box["top"])
        axis.add_patch(Rectangle(corner, *size, fill=False, color=MARK, linewidth=1))
    for polygon in marks.get("polygons", ()):
        axis.add_patch(Outline(polygon["points"], fill=False, color=MARK, linewidth=0.6))
    if sample.mask is not None:
        mask = nearest(sample.mask, small.shape[:2])
        for value in [value for value in np.unique(mask) if value > 0][:20]:
            axis.contour(mask == value, levels=[0.5], colors=MASK, linewidths=0.6, extent=extent, origin="upper")
    axis.set_title(title, fontsize=6)
