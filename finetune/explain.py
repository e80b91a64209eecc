"""Where a model looks: what changes when a part of the image is hidden, drawn over the image.

Occlusion (Zeiler and Fergus 2014): a square of tissue is replaced by the tissue's mean around it, with soft edges so
that nothing new is drawn, and the drop of the decided class's probability is what the square was worth. Of tiles, the
attention that the model itself gave them is shown.

Legend: K frames of an image, C channels, H and W of a frame, r and c rows and columns of a map, n squares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..data.frames import frames
from ..data.geometry import Geometry, area_resize
from ..data.record import Film, Pixels
from ..data.shards import Sample, ShardDataset
from ..data.tiles import Boxes
from ..data.views import Normalisation
from ..engine.metrics import Floats
from .classify.locked import Locked, unlabelled
from .classify.mil import MilModel, attention, logits
from .classify.reading import mean_logits

STRIDE, SIDE = 2, 3  # of the squares, in patches: neighbours overlap a little
FEWEST = 0.02  # a square with less tissue is not worth hiding
FAINTEST = 0.02  # a change of the probability below which colours stay pale
CELLS = 8  # of a map along a tile
LONGEST = 900  # pixels of a picture's longest side
AGAINST, FOR = "#2f6f9f", "#c8561b"
COLOURS = LinearSegmentedColormap.from_list("for and against", [AGAINST, "#f4f4f4", FOR])
AS_STORED = Normalisation(0.0, 1.0)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Map:
    """What parts of a stored image are worth.

    Attributes:
        values: (r, c) of a grid that divides the image evenly.
        of: the class it is about.
        probability: of that class.
        said: what was decided.
        scale: what the values are.
        faintest: values below it stay pale.
        how: how to read them.
        task: what the class is a value of.
    """

    values: Floats
    of: str
    probability: float
    said: str
    scale: str
    faintest: float
    how: str
    task: str

    @property
    def title(self) -> str:
        """What is drawn above it."""
        return f"{self.task} = {self.of}: {self.probability:.3f}, decided: {self.said or 'none'}"


# ---------------------------------------------------------------------------------------------- occlusion


def occlusion(locked: Locked, sample: Sample, batch_size: int = 64, stride: int = STRIDE, side: int = SIDE) -> Map:
    """How much the decided class's probability drops where a square of tissue is hidden.

    Args:
        locked: a model of frames.
        sample: the image.
        batch_size: frames at once.
        stride: patches from one square to the next.
        side: patches along a square.
    """
    card, target = locked.card, locked.target
    assert card.input != "tiles", "of tiles the attention is shown"
    raw = frames(sample, card.image_size, AS_STORED, card.input).numpy()
    y, x, inside = places(sample, card.image_size, card.input)
    step = patch_of(locked) * stored_per_frame(y, inside)
    height, width = sample.pixels.shape[:2]
    shape = (max(1, round(height / (stride * step))), max(1, round(width / (stride * step))))
    filling, tissue = surroundings(raw, patch_of(locked) * side)
    least = FEWEST * (side * patch_of(locked)) ** 2

    def hidden(i: int, j: int) -> Array:
        middle = ((i + 0.5) * height / shape[0] - 0.5, (j + 0.5) * width / shape[1] - 0.5)
        return tissue * inside * square(y, x, middle, side * step, step / 2)

    squares = [place for place in np.ndindex(shape) if hidden(*place).sum() >= least]
    masks = chain([0 * inside], (hidden(*place) for place in squares))
    seen = (normalised(raw + mask[:, None] * (filling - raw), card.normalise) for mask in masks)
    told = mean_logits(cast(torch.nn.Module, locked.model), seen, 1 + len(squares), batch_size)
    probabilities = target.probabilities(told, card.temperature)
    chosen = decided_class(locked, probabilities[:1])
    values = np.zeros(shape)
    for place, now in zip(squares, probabilities[1:, chosen], strict=True):
        values[place] = probabilities[0, chosen] - now
    of = target.classes[chosen]
    return Map(
        values,
        of,
        float(probabilities[0, chosen]),
        decision(locked, probabilities[:1])[0],
        f"what hiding it takes off the probability of {of}",
        FAINTEST,
        f"Orange: hiding this place lowers it, so it speaks for {of}; blue: it speaks against. Squares of {side} "
        f"patches, {stride} apart, each replaced by the mean of the tissue around it.",
        target.name,
    )


def places(sample: Sample, size: tuple[int, int], input: str) -> tuple[Array, Array, Array]:
    """(K, H, W) row and column of the stored image that each pixel of its frames shows, and whether it shows one.

    The frames of pictures whose pixels are their own places: true of whatever `frames` does.
    """
    shape = sample.pixels.shape[:2]
    assert max(shape) < 2**16
    rows, columns = np.indices(shape, np.uint16)
    ramps = (rows, columns, np.full(shape, 2**16 - 1, np.uint16))
    of = (replace(sample, pixels=ramp, max_value=2**16 - 1, mask=None) for ramp in ramps)
    y, x, inside = (frames(ramp, size, AS_STORED, cast(Any, input)).numpy()[:, 0] for ramp in of)
    return y * (2**16 - 1), x * (2**16 - 1), (inside > 0.5).astype(np.float32)


def stored_per_frame(y: Array, inside: Array) -> float:
    """Stored pixels a pixel of the frame, down."""
    steps = np.diff(y, axis=1)[(inside[:, 1:] * inside[:, :-1]) > 0]
    return float(np.median(steps)) if steps.size else 1.0


def surroundings(raw: Array, reach: float) -> tuple[Array, Array]:
    """(K, C, H, W) mean of the tissue around each pixel, within about `reach` pixels; and (K, H, W) tissue."""
    tissue = (raw != 0).any(1).astype(np.float32)
    sigma = (0, 0, reach / 2, reach / 2)
    weight = ndimage.gaussian_filter(tissue[:, None], sigma, mode="constant")
    mean = ndimage.gaussian_filter(raw * tissue[:, None], sigma, mode="constant") / np.maximum(weight, 1e-6)
    return mean.astype(np.float32), tissue


def square(y: Array, x: Array, middle: tuple[float, float], side: float, soft: float) -> Array:
    """1 in a square of the stored image, 0 outside, over an edge of `soft` stored pixels in between."""
    along = (
        np.clip((side / 2 - np.abs(at - centre)) / soft + 0.5, 0, 1) for at, centre in zip((y, x), middle, strict=True)
    )
    return np.prod(list(along), axis=0)


def normalised(raw: Array, normalise: Normalisation) -> Tensor:
    """Frames of grey levels from 0 to 1 as the model wants them."""
    return torch.from_numpy(np.stack([normalise(frame.copy()) for frame in raw.astype(np.float32)]))


def patch_of(locked: Locked) -> int:
    """Pixels along a patch of the encoder."""
    embeds = (m for m in cast(torch.nn.Module, locked.model).modules() if hasattr(m, "grid_size"))
    return int(cast(Any, next(embeds)).patch_size[0])


# ---------------------------------------------------------------------------------------------- attention


def attended(locked: Locked, shards: ShardDataset, row: int, batch_size: int = 64) -> Map:
    """How much a model of tiles looked at each part of an image, among all images of its bag.

    Args:
        locked: a model of tiles.
        shards: where the image lies, and the others of its breast.
        row: which it is.
        batch_size: tiles at once.
    """
    assert isinstance(locked.model, MilModel)
    breasts = unlabelled(locked.target, shards, np.arange(len(shards))).breasts
    rows = np.flatnonzero(breasts == breasts[row]) if locked.model.bag == "breast" else np.array([row])
    here = int(np.flatnonzero(rows == row)[0])
    with locked.tiles(shards, rows, batch_size) as (features, of):
        worth = attention(locked.model, features, of, here)
        boxes = features.boxes(int(of.rows[here]))
        said = logits(locked.model, features, of, np.array([here]))
    probabilities = locked.target.probabilities(said, locked.card.temperature)
    chosen = decided_class(locked, probabilities)
    return Map(
        rastered(worth, boxes, shards[row].pixels.shape[:2]),
        locked.target.classes[chosen],
        float(probabilities[0, chosen]),
        decision(locked, probabilities)[0],
        "share of the attention",
        1e-6,
        "Orange: tiles that the decision rests on, for or against; their shares add up to 1 over all images of the "
        f"{locked.model.bag}.",
        locked.target.name,
    )


def rastered(worth: Floats, boxes: Boxes, shape: tuple[int, ...]) -> Floats:
    """(r, c) values of an image of this shape from (T,) values of its (T, 4) boxes; where they overlap the mean."""
    cell = float(boxes[:, 2:].min()) / CELLS
    rows, columns = (max(1, round(length / cell)) for length in shape[:2])
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    y, x = (np.arange(rows) + 0.5) * shape[0] / rows, (np.arange(columns) + 0.5) * shape[1] / columns
    for value, (top, left, height, width) in zip(worth, boxes, strict=True):
        inside = ((y >= top) & (y < top + height))[:, None] & ((x >= left) & (x < left + width))
        total += value * inside
        count += inside
    return np.asarray(total / np.maximum(count, 1))


# ---------------------------------------------------------------------------------------------- what was decided


def decided_class(locked: Locked, probabilities: Floats) -> int:
    """Number of the class that was decided on, of (1, k) probabilities; of several labels the surest."""
    decided = locked.decide(probabilities)[0]
    if locked.target.kind != "multilabel":
        return int(decided)
    return int((probabilities[0] - np.array(locked.card.thresholds["image"])).argmax())


def decision(locked: Locked, probabilities: Floats, level: Any = "image") -> list[str]:
    """What is decided of each row of (n, k) probabilities: a class, or the labels that are there."""
    classes, decided = locked.target.classes, locked.decide(probabilities, level)
    if locked.target.kind == "multilabel":
        separator = locked.card.target.separator
        return [separator.join(name for name, on in zip(classes, row, strict=True) if on) for row in decided]
    return [classes[k] for k in decided]


# ---------------------------------------------------------------------------------------------- pictures


def explain(
    locked: Locked,
    shards: ShardDataset,
    row: int,
    path: Path,
    title: str,
    film: Film | None = None,
    batch_size: int = 64,
) -> str:
    """Draw what an image's decision rests on, beside the image.

    Args:
        locked: the model.
        shards: the data set.
        row: which of its images.
        path: PNG to write.
        title: what the image is called.
        film: as it was before the breast was cut out; the map is then drawn in its place there.
        batch_size: frames at once.

    Returns:
        A caption.
    """
    sample = shards[row]
    found = (
        attended(locked, shards, row, batch_size)
        if isinstance(locked.model, MilModel)
        else occlusion(locked, sample, batch_size)
    )
    geometry = Geometry.from_dict(sample.meta["geometry"]) if film is not None else None
    draw(path, film.pixels if film is not None else np.asarray(sample.pixels), found, title, geometry)
    return f"{title}: decided {found.said or 'none'}; {found.of} has probability {found.probability:.3f}. {found.how}"


def draw(path: Path, pixels: Pixels, found: Map, title: str, geometry: Geometry | None = None) -> None:
    """The image, and beside it the image with the map over it."""
    height, width = pixels.shape[:2]
    factor = max(1.0, max(height, width) / LONGEST)
    small = area_resize(pixels, (max(1, round(height / factor)), max(1, round(width / factor))))
    tall = min(max(height / width, 0.5), 2.5)
    figure = Figure(figsize=(7.6, 3.3 * tall + 0.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    for axis in (left, right):
        axis.imshow(small, cmap="gray", vmin=0, vmax=max(1, int(np.percentile(small, 99.8))), extent=whole)
        axis.set_axis_off()
    most = max(found.faintest, float(np.abs(found.values).max()))
    values, where = found.values, whole
    if geometry is not None:
        values = values[:, ::-1] if geometry.flipped else values
        where = (geometry.left - 0.5, geometry.right - 0.5, geometry.bottom - 0.5, geometry.top - 0.5)
    right.imshow(painted(values, most), extent=where, interpolation="bilinear")
    right.set(xlim=whole[:2], ylim=whole[2:])
    left.set_title(title, fontsize=8)
    right.set_title(found.title, fontsize=8)
    bar = figure.colorbar(ScalarMappable(Normalize(-most, most), COLOURS), ax=right, shrink=0.6, pad=0.02)
    bar.ax.set_ylim(-most if found.values.min() < 0 else 0, most)
    bar.set_label(found.scale, fontsize=7)
    bar.ax.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def painted(values: Floats, most: float) -> NDArray[np.float64]:
    """(R, C, 4) colours of a map, finer than its grid and the clearer the more a place is worth."""
    fine = ndimage.zoom(values, 16, order=1, mode="nearest", grid_mode=True)
    colours = COLOURS(Normalize(-most, most)(fine))
    colours[..., 3] = 0.75 * np.clip(np.abs(fine) / most, 0, 1)
    return cast(NDArray[np.float64], colours)
