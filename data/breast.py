"""Find the breast on a film, cut it out and put the chest wall on the left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi

from .geometry import Geometry
from .record import Film, Pixels, Region

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

# The search runs on a copy whose longest side is about WORK pixels; the lengths below are in its pixels.
WORK = 256
BLUR = 0.8  # against noise, and against gaps in fat that processing made dark
FAR = 12  # beyond this distance from bright tissue lies background, not the dark rim under the skin
OPENING = 10  # film edges, labels and letters are thinner than twice this, a breast is not
REGROWTH = 14  # OPENING times the square root of two: back into the corners of the frame, and the nipple
SKIN = 1.0  # the darkest skin is kept too
EDGE = 6  # so far from the frame's border a film's white edge may reach: brightness is measured inside of it

# Brightness is in parts of the image's own bright end, as formats say little about the range in use.
DARKEST_TISSUE = 0.04  # no breast is darker than this
ABOVE_BACKGROUND = 0.025  # what tissue exceeds the film's own grey by
FEW = 0.01  # of the frame: so little grey beside a black background is dark tissue
SECOND_GREY = 1 / 3  # of what is far from bright tissue: so much of a brighter, even grey is background, too
EMPTY = 1e-3  # of the largest value allowed: a frame that never exceeds it is blank
FLAT = 0.2  # a frame whose coarse brightness varies less than this holds nothing

SMALLEST = 0.02  # of the frame: less than this is a marker or a speck, not a breast
GAP = 0.02  # of the frame: a larger hole may be the background that edges and labels close in


def isolate(film: Film, *, margin: float = 0.01) -> tuple[Film, Geometry]:
    """The breast alone: all else zero, cropped with a margin (a part of the longest side), chest wall left.

    Values inside the breast stay as they are. Marks and mask follow; the crop holds the whole mask.
    Raises ValueError where there is no breast to see.
    """
    breast = find_breast(film.pixels, film.max_value)
    if breast.mean() < SMALLEST:
        raise ValueError(f"No breast found: what looks like tissue covers {breast.mean():.1%} of the frame.")
    # Pixels of a finding outside the breast are zeroed all the same: left there, they would give it away.
    findings = film.mask if film.mask_kind == "instances" else None  # classes may number the background, too
    keep = breast if findings is None else breast | (findings > 0)
    region = _region(keep, round(margin * max(breast.shape)))
    geometry = Geometry.crop((breast.shape[0], breast.shape[1]), region, flipped=_wall_is_right(breast))
    pixels: Pixels = film.pixels * breast
    return geometry.apply_film(replace(film, pixels=pixels)), geometry


def find_breast(pixels: Pixels, max_value: int) -> Mask:
    """Where the breast is, pectoral muscle included: (H, W) -> (H, W), all False where there is none.

    The frame must be dark outside the breast. Values may fill any part of 0..max_value.
    """
    factor = max(1, round(max(pixels.shape) / WORK))
    small = ndi.gaussian_filter(_shrink(pixels, factor), BLUR)
    inner = _inside_edge(small)
    if _is_blank(inner, max_value):
        return np.zeros(pixels.shape, np.bool_)
    breast = _largest_body(small > _threshold(inner))
    # Enlarging the distance instead of the mask gives a smooth outline and room for the skin at once.
    return _within(SKIN, _distance_to(breast), pixels.shape, factor)


def _shrink(pixels: Pixels, factor: int) -> Floats:
    """Means of factor x factor blocks, the last ones filled up by repetition."""
    height, width = (-(-side // factor) for side in pixels.shape)
    rest = [(0, height * factor - pixels.shape[0]), (0, width * factor - pixels.shape[1])]
    padded = np.pad(pixels, rest, mode="edge")
    rows = padded.reshape(height, factor, -1).sum(axis=1, dtype=np.float32)
    small: Floats = rows.reshape(height, width, factor).mean(axis=2) / np.float32(factor)
    return small


def _inside_edge(small: Floats) -> Floats:
    height, width = small.shape
    edge = min(EDGE, height // 8, width // 8)
    return small[edge : height - edge, edge : width - edge]


def _is_blank(small: Floats, max_value: int) -> bool:
    low, high = np.percentile(ndi.gaussian_filter(small, 2), (1, 99))
    return bool(high <= EMPTY * max_value or high - low < FLAT * high)


def _threshold(small: Floats) -> float:
    """The brightness between background and skin.

    Otsu's threshold parts gland from fat and background, so half of it is surely inside the breast. Well away
    from there is the background, be it zero or a film's grey, and tissue begins just above that.
    """
    top = float(np.percentile(small[small > small.min()], 99))
    bright = _otsu(np.minimum(small, top)) / 2
    # The frame's minimum is left out: scans are padded with it, and the film's grey is brighter.
    quiet = small[(_distance_to(small > bright) > FAR) & (small > small.min())]
    background = _grey(quiet, ABOVE_BACKGROUND * top) if quiet.size > FEW * small.size else 0.0
    return min(max(background + ABOVE_BACKGROUND * top, DARKEST_TISSUE * top), bright)


def _grey(quiet: Floats, step: float) -> float:
    """The background's grey; of two, the brighter one."""
    grey = float(np.median(quiet))
    brighter = quiet[quiet > grey + step]
    if brighter.size < SECOND_GREY * quiet.size:
        return grey
    low, middle, high = np.percentile(brighter, (10, 50, 90))
    return float(middle) if high - low < step else grey  # dark tissue is not even


def _otsu(values: Floats) -> float:
    """The threshold with the largest variance between what is below and what is above it."""
    counts, edges = np.histogram(values, 256)
    sums = np.cumsum(counts * (edges[1:] + edges[:-1]) / 2)
    below = np.cumsum(counts)[:-1]
    above = values.size - below
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    return float(edges[1:-1][np.argmax(below * above * gap**2)])


def _largest_body(tissue: Mask) -> Mask:
    """The largest piece of tissue that is not thin, nor joined to the rest by a thin bridge, holes filled."""
    # Dark fat must not make tissue thin, but with every hole filled a film with four white edges were solid.
    # The frame is padded so that a strip along its edge is thin, too.
    solid = _fill_gaps(tissue)
    depth: NDArray[np.float64] = ndi.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1]
    core = _largest_piece(depth > OPENING)
    body: Mask = ndi.binary_fill_holes(_largest_piece(solid & (_distance_to(core) <= REGROWTH)))
    return body


def _fill_gaps(tissue: Mask) -> Mask:
    """The holes filled that are too small to be background."""
    holes: Mask = ndi.binary_fill_holes(tissue) & ~tissue
    pieces, _ = ndi.label(holes)
    filled: Mask = tissue | (holes & (np.bincount(pieces.ravel()) <= GAP * tissue.size)[pieces])
    return filled


def _largest_piece(mask: Mask) -> Mask:
    pieces, count = ndi.label(mask)
    sizes = np.bincount(pieces.ravel())
    return np.asarray(pieces == 1 + np.argmax(sizes[1:])) if count else mask


def _distance_to(mask: Mask) -> Floats:
    """Distance of each pixel to the mask, zero inside, beyond every pixel where the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, sum(mask.shape), np.float32)
    distance: NDArray[np.float64] = ndi.distance_transform_edt(~mask)
    return distance.astype(np.float32)


def _within(limit: float, small: Floats, shape: tuple[int, ...], factor: int) -> Mask:
    """Where a map that `_shrink` made small, interpolated back to the first shape, is at most the limit."""
    start, end, part = _neighbours(small.shape[1], shape[1], factor)
    wide = small[:, start] * (1 - part) + small[:, end] * part
    inside = np.empty(shape, np.bool_)
    # Row by row the work stays in the cache: twice as fast on a large film.
    for row, above, below, weight in zip(inside, *_neighbours(len(small), shape[0], factor), strict=True):
        np.less_equal(wide[above] * (1 - weight) + wide[below] * weight, limit, out=row)
    return inside


def _neighbours(count: int, length: int, factor: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """For each of `length` pixels: the two of `count` blocks it lies between, the weight of the second."""
    place = np.clip((np.arange(length, dtype=np.float32) + 0.5) / factor - 0.5, 0, count - 1)
    start = place.astype(np.intp)
    return start, np.minimum(start + 1, count - 1), (place - start).astype(np.float32)


def _region(keep: Mask, margin: int) -> Region:
    """The box around what is kept, widened by the margin as far as the frame goes."""
    height, width = keep.shape
    rows, columns = np.flatnonzero(keep.any(axis=1)), np.flatnonzero(keep.any(axis=0))
    return Region(
        top=max(int(rows[0]) - margin, 0),
        left=max(int(columns[0]) - margin, 0),
        bottom=min(int(rows[-1]) + 1 + margin, height),
        right=min(int(columns[-1]) + 1 + margin, width),
    )


def _wall_is_right(breast: Mask) -> bool:
    """Whether the chest wall is on the right: the breast is tallest there, and tapers towards the nipple."""
    heights = np.trim_zeros(np.count_nonzero(breast, axis=0))
    half = heights.size // 2
    return bool(heights[-half:].sum() > heights[:half].sum())
