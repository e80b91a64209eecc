"""The picture of a map: an image, and beside it the image with the map over its tissue.

Legend: r and c rows and columns of a map, R and C those of what is painted of it.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage

from ...data.geometry import Geometry, area_resize
from ...data.record import Pixels
from ...engine.metrics import Floats
from ..style import ACCENT, BESIDE, fitted, reduced, save
from .worth import Map

FINE = 512  # at least so many cells along a painted map, that it ends where the tissue ends
TITLE = 3.1  # inches above a picture
COLOURS = LinearSegmentedColormap.from_list("for and against", [ACCENT, "#f4f4f4", BESIDE[0]])


def draw(path: Path, pixels: Pixels, found: Map, title: str, stored: Pixels, geometry: Geometry | None = None) -> None:
    """The image, and beside it the image with the map over it.

    Args:
        path: PNG to write.
        pixels: what is shown: the film, or the stored image itself.
        found: the map.
        title: what the image is called.
        stored: what the map is of; where it is 0 there is no tissue.
        geometry: how it came out of the film; None: it is what is shown.
    """
    height, width = pixels.shape[:2]
    tall = 3.3 * min(max(height / width, 0.5), 2.5)
    figure = Figure(figsize=(7.6, tall + 0.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, above in ((left, title), (right, found.said.title)):
        show(axis, pixels)
        axis.set_title(fitted(above, TITLE, 8), fontsize=8)
    most = max(found.faintest, float(np.abs(found.values).max()))
    if not found.empty:
        lay(right, painted(found.values, most, stored), geometry)
    bar = figure.colorbar(ScalarMappable(Normalize(-most, most), COLOURS), ax=right, shrink=0.6, pad=0.02)
    bar.ax.set_ylim(-most if found.values.min() < 0 else 0, most)
    bar.set_label(fitted(found.scale, 0.55 * tall, 7), fontsize=7)
    bar.ax.tick_params(labelsize=7)
    save(figure, path)


def show(axis: Axes, pixels: Pixels) -> None:
    """An image in its own coordinates, made small."""
    height, width = pixels.shape[:2]
    small = reduced(pixels)
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(small, cmap="gray", vmin=0, vmax=max(1, int(np.percentile(small, 99.8))), extent=whole)
    axis.set_axis_off()


def lay(axis: Axes, colours: Floats, geometry: Geometry | None) -> None:
    """Put the (R, C, 4) colours of a stored image over what an axis shows, in their place there."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    where = (left, right, bottom, top)
    if geometry is not None:
        colours = colours[:, ::-1] if geometry.flipped else colours
        where = (geometry.left - 0.5, geometry.right - 0.5, geometry.bottom - 0.5, geometry.top - 0.5)
    axis.imshow(colours, extent=where, interpolation="bilinear")
    axis.set(xlim=(left, right), ylim=(bottom, top))


def painted(values: Floats, most: float, stored: Pixels) -> NDArray[np.float64]:
    """(R, C, 4) colours of a map, the clearer the more a place is worth; of places without tissue none.

    Args:
        values: (r, c)
        most: the value of the full colour.
        stored: what the map is of.
    """
    fine = ndimage.zoom(values, max(1, ceil(FINE / max(values.shape))), order=1, mode="nearest", grid_mode=True)
    tissue = stored > 0 if stored.ndim == 2 else (stored > 0).any(2)
    covered = area_resize(np.where(tissue, 255, 0).astype(np.uint8), fine.shape) / 255
    colours = COLOURS(Normalize(-most, most)(fine))
    colours[..., 3] = 0.75 * np.clip(np.abs(fine) / most, 0, 1) * covered
    return cast(NDArray[np.float64], colours)
