"""A contact sheet of a data set: samples side by side at one scale, findings drawn where the index says they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle as Ring

from ..engine.seeding import generator
from .shards import LABEL, Sample, ShardDataset


def contact_sheet(shards: ShardDataset, out: Path, count: int, columns: int = 8, seed: int = 0) -> None:
    """Write a PNG of `count` samples drawn evenly at random."""
    chosen = np.sort(generator(seed, "gallery").permutation(len(shards))[:count])
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.7 * min(columns, len(chosen)), 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, min(columns, len(chosen)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, axis in zip(chosen, axes.flat, strict=False):
        draw(axis, shards[int(i)], caption(shards.rows[int(i)]))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def caption(row: dict[str, str]) -> str:
    """Side, view and labels of a sample."""
    labels = [
        f"{column.removeprefix(LABEL)} {value}" for column, value in row.items() if column.startswith(LABEL) and value
    ]
    return "\n".join(
        [
            f"{row['laterality']} {row['view']}".strip(),
            *(", ".join(labels[i : i + 2]) for i in range(0, len(labels), 2)),
        ]
    )


def draw(axis: Axes, sample: Sample, title: str) -> None:
    """One sample, with its circles and the outline of its mask."""
    axis.imshow(sample.pixels, cmap="gray", vmin=0, vmax=max(1, int(np.percentile(sample.pixels, 99.8))))
    for circle in sample.meta["circles"]:
        axis.add_patch(Ring((circle["x"], circle["y"]), circle["radius"], fill=False, color="#e8a33d", linewidth=1))
    if sample.mask is not None and sample.mask.any():
        axis.contour(sample.mask > 0, levels=[0.5], colors="#4fb3d9", linewidths=0.6)
    axis.set_title(title, fontsize=6)
