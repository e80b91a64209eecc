"""Where attention over tiles looked, drawn on the film."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ...data.packed import Raster
from ...data.resample import resize
from ...data.tiles import Boxes
from ...engine.metrics import Floats

CAPTION = (
    "Left: the film as stored. Right: the share of attention that a tile gets, as multiples of an even share; where "
    "tiles overlap, their mean. Outlined, the tiles with most."
)
LONGEST = 900  # pixels of a picture's longer side
OUTLINED = 3
ACCENT = "#c8561b"


def draw_attention(pixels: Raster, boxes: Boxes, attention: Floats, path: Path) -> None:
    """The film, and beside it the film with its attention.

    Args:
        pixels: (H, W) or (H, W, 3) as stored.
        boxes: (T, 4) top, left, height, width of its tiles in stored pixels.
        attention: (T,) of its tiles; of a breast with several films, this one's part.
        path: of the PNG.
    """
    height, width = pixels.shape[:2]
    heat = heat_of(boxes, len(attention) * attention, (height, width))
    figure = Figure(figsize=(2 * 5.5 * width / height + 1.2, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        draw_film(axis, pixels)
    shown = np.ma.masked_less_equal(heat, 0)
    picture = right.imshow(
        shown, cmap="inferno", alpha=0.5, extent=(0, width, height, 0), vmin=0, interpolation="nearest"
    )
    for tile in np.argsort(-attention, kind="stable")[:OUTLINED]:
        top, start, tall, wide = boxes[tile]
        right.add_patch(Rectangle((start, top), wide, tall, fill=False, edgecolor=ACCENT, linewidth=1.2))
    figure.colorbar(picture, ax=right, fraction=0.05, label="attention, in even shares")
    figure.savefig(path, dpi=130)


def draw_film(axis: Axes, pixels: Raster) -> None:
    """The film in grey, in the coordinates of its stored pixels."""
    height, width = pixels.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    small = resize(pixels, (0, 0, height, width), (max(1, round(height * scale)), max(1, round(width * scale))))
    grey = small.mean(0)
    axis.imshow(grey, cmap="gray", extent=(0, width, height, 0), vmin=0, vmax=max(float(grey.max()), 1e-6))
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def heat_of(boxes: Boxes, values: Floats, image: tuple[int, int]) -> NDArray[np.float64]:
    """A map of the image, its longer side at most LONGEST: the mean of the tiles over each place, 0 where none is."""
    scale = min(1.0, LONGEST / max(image))
    shape = tuple(max(1, round(side * scale)) for side in image)
    total, count = np.zeros(shape), np.zeros(shape)
    for (top, left, height, width), value in zip(boxes * scale, values, strict=True):
        place = slice(round(top), round(top + height)), slice(round(left), round(left + width))
        total[place] += value
        count[place] += 1
    mean: NDArray[np.float64] = total / np.maximum(count, 1)
    return mean
