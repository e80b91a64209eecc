"""Pictures of images in rows: a row an image, a column a way of looking at it. Legend: B images, C channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

WIDTH, GAP, HEADER, DPI = 2.4, 0.03, 0.3, 120  # inches of a column, around an image, of the titles; pixels an inch
PAPER = "#c9d3de"  # where there is nothing to show

Range = tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """A figure of RUN/figures, without its ending, and what its reader is told."""

    name: str
    figure: Figure
    caption: str

    def png(self) -> bytes:
        """The file's content."""
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


@dataclass(frozen=True)
class Panel:
    """A column: its title, (B, C, height, width) images, NaN where nothing is to be shown, and each one's range."""

    title: str
    images: Tensor
    ranges: Sequence[Range]
    colours: str = "gray"


def grey_range(images: Tensor, share: float = 0.999) -> list[Range]:
    """For each image what is drawn black and white; single bright pixels (markers, clips) do not dim the rest."""
    pixels = images.detach().float().cpu().flatten(1).numpy()
    bounds = zip(np.nanmin(pixels, axis=1), np.nanquantile(pixels, share, axis=1), strict=True)
    return [(float(low), float(max(high, low + 1e-6))) for low, high in bounds]


def draw(panels: Sequence[Panel]) -> Figure:
    """All panels beside each other, placed by hand: a layout engine takes seconds over so many axes."""
    rows, (height, width) = len(panels[0].images), panels[0].images.shape[-2:]
    tall, total = WIDTH * height / width, WIDTH * len(panels)
    figure = Figure(figsize=(total, HEADER + tall * rows))
    for column, panel in enumerate(panels):
        for row, (image, limits) in enumerate(zip(panel.images, panel.ranges, strict=True)):
            bottom = (rows - 1 - row) * tall
            place = (column * WIDTH + GAP, bottom + GAP, WIDTH - 2 * GAP, tall - 2 * GAP)
            axis = figure.add_axes(
                tuple(x / side for x, side in zip(place, 2 * figure.get_size_inches().tolist(), strict=True))
            )
            axis.imshow(pixels_of(image, limits), cmap=panel.colours, vmin=0, vmax=1, aspect="auto")
            axis.set(xticks=[], yticks=[], facecolor=PAPER)
            axis.set_title(panel.title if row == 0 else "", fontsize=9)
    return figure


def pixels_of(image: Tensor, limits: Range) -> NDArray[np.float32]:
    """(C, height, width) -> (height, width), or (height, width, 4) of colour; transparent where it is NaN."""
    low, high = limits
    values = ((image.detach().float().cpu().numpy() - low) / (high - low)).clip(0, 1)
    if len(values) != 3:
        return values[0]
    shown = np.isfinite(values).all(0, keepdims=True)
    return np.concatenate([np.nan_to_num(values), shown.astype(np.float32)]).transpose(1, 2, 0)
