"""Near-duplicates: a hash of how an image looks, and pairs of images that a split or a data set should not share.

Measured on 313 real and simulated films (100 mini-MIAS, 100 M-SYNTH, 63 CDD-CESM, 44 DDSM, 4 NYU, 2 DICOM samples):
- images of different patients differ in 83 bits or more (mean 118, sd 6.5, 48,750 pairs), left and right breasts or CC
  and MLO views of one patient in 88 or more: with a threshold of 64, none of them is taken for a copy;
- copies of the isolated breast: 8 bits, JPEG 50, half and quarter size, mirrored either way 17 at most; gamma 0.7 to
  1.4, windowed, rotated by 1 degree, 1.5 % cut off all around 98.7 % or more found; rotated by 2 degrees 94 to 97 %;
  3 % cut off all around 86 %;
- copies of the whole film, from which the breast is then isolated anew: 8 bits, JPEG, smaller, mirrored 99.4 % or more;
  windowed 99.4 %; rotated by 1 degree 97 %, by 2 degrees 91 to 93 %; gamma 83 to 89 %; 3 % cut off all around 62 %; the
  background raised to grey 75 %. Those missed (up to 135 bits) are films on which another outline was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy import fft
from scipy import ndimage as ndi

from ..engine.errors import UserError
from .splits import patient_of
from .table import Row

Words = NDArray[np.uint64]  # (n, 4)
Array = NDArray[np.float64]

WORK = 256  # longest side, in pixels and up to twice that, of the copy on which the hash is made
GRID = 64  # the copy of the breast is stretched to a square of this side
TRIM = 0.05  # of all light: what is cut off at each side, as the faint rim differs between copies
BLUR = 4.0  # pixels of the grid over which brightness and contrast are evened out
FLAT = 0.02  # of the brightest pixel: contrast that is not blown up
FREQUENCIES = slice(1, 17)  # the lowest that change both along rows and along columns
NO_HASH = "0" * 64

THRESHOLD = 64  # bits; see above
BLOCK = 1024  # images compared at a time with as many others: some tens of megabytes


# ---------------------------------------------------------------------------------------------- the hash


def phash(pixels: NDArray[Any]) -> str:
    """256 bits of how an image (H, W) or (H, W, C) looks, as 64 hex digits; zeros for one without any structure.

    The signs of the low frequencies (DCT-II) of a small copy, its contrast evened out. Mirroring an image flips the
    signs of all odd frequencies along that axis; the bits are ordered in four words of 64 by odd and even, so that it
    flips whole words.
    """
    small = _framed(_reduced(pixels))
    if small is None:
        return NO_HASH
    bits = fft.dctn(_evened(*small))[FREQUENCIES, FREQUENCIES] > 0
    words = [bits[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return np.packbits(words).tobytes().hex()


def _reduced(pixels: NDArray[Any]) -> Array:
    """Means of blocks that leave about WORK pixels; what does not fill a block is cut off on both sides."""
    factor = max(1, min(max(pixels.shape[:2]) // WORK, *pixels.shape[:2]))
    rows, columns = (side // factor for side in pixels.shape[:2])
    top, left = ((side % factor) // 2 for side in pixels.shape[:2])
    part = pixels[top : top + rows * factor, left : left + columns * factor]
    # Rows first, in whole numbers: one pass over the large image at the speed of memory.
    sums = part.reshape(rows, factor, *part.shape[1:]).sum(axis=1, dtype=np.uint32)
    means: Array = sums.reshape(rows, columns, -1).mean(axis=2) / factor
    return means


def _framed(image: Array) -> tuple[Array, Array] | None:
    """The image and its nonzero part, stretched to the grid; None for an image that is black or flat."""
    if image.min() == image.max():
        return None
    light = np.sqrt(image)  # the root, so that a brighter copy has nearly the same frame
    down, across = _areas(light.sum(axis=1)), _areas(light.sum(axis=0))
    return down @ image @ across.T, down @ (image > 0).astype(np.float64) @ across.T


def _areas(light: Array) -> Array:
    """(GRID, n) weights that average n rows, of which each has that much light, over equal parts of the frame.

    The frame is where the light is, not where it begins: a crop, a darker skin or a speck hardly move it.
    """
    total = np.concatenate([[0], np.cumsum(light)]) / light.sum()
    start, end = np.interp([TRIM, 1 - TRIM], total, np.arange(len(total)))
    edges = np.linspace(start, end, GRID + 1)
    rows = np.arange(len(light))
    common = np.minimum(edges[1:, None], rows + 1) - np.maximum(edges[:-1, None], rows)
    weights: Array = np.clip(common, 0, None) / (edges[1] - edges[0])
    return weights


def _evened(small: Array, inside: Array) -> Array:
    """Brightness relative to the surroundings in the breast, in their standard deviations; zero outside."""
    weight = ndi.gaussian_filter(inside, BLUR) + 1e-6
    difference = small - ndi.gaussian_filter(small, BLUR) / weight * inside
    spread = np.sqrt(ndi.gaussian_filter(difference**2, BLUR) / weight)
    evened: Array = difference * inside / (spread + FLAT * small.max())
    return evened


def words_of(hashes: Sequence[str]) -> Words:
    """(n, 4) words of n hashes.

    Raises:
        ValueError: one is not 64 hex digits.
    """
    if any(len(text) != 64 for text in hashes):
        raise ValueError("a hash has 64 hex digits")
    return np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64).reshape(-1, 4)


def distance(a: Words, b: Words) -> NDArray[np.int16]:
    """(n, m) differing bits between n and m hashes, the fewest over the four mirrorings; 0 to 128."""
    # Mirroring left to right flips the words that are odd along rows, upside down the others; see `phash`.
    both, rows, columns, neither = (np.bitwise_count(a[:, None, k] ^ b[None, :, k]).astype(np.int16) for k in range(4))
    straight = np.minimum(both + rows + columns, 128 + both - rows - columns)
    mirrored = 128 - both - np.abs(rows - columns)
    nearest: NDArray[np.int16] = neither + np.minimum(straight, mirrored)
    return nearest


# ---------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True, order=True)
class Pair:
    """Two rows that look alike but should not: their distance in bits, what they cross, their numbers."""

    distance: int
    across: str  # "data sets", "splits" or "patients"
    first: int
    second: int


def near_duplicates(rows: Sequence[Row], threshold: int = THRESHOLD, splits: Sequence[str] | None = None) -> list[Pair]:
    """Pairs of images that look alike across data sets, splits or patients, nearest first.

    Two images of one patient in one split are no finding. Rows of several data sets are given as one list; images
    without a hash are passed over.

    Args:
        rows: of the index, with `key`, `dataset`, `patient`, `split` and `phash`.
        threshold: bits in which a pair may differ, mirrored or not.
        splits: the split of each row, instead of the archive's own.

    Raises:
        UserError: a hash is damaged.
    """
    rows = list(rows)
    splits = [row["split"] for row in rows] if splits is None else splits
    numbers = [i for i, row in enumerate(rows) if row.get("phash", "") not in ("", NO_HASH)]
    try:
        words = words_of([rows[i]["phash"] for i in numbers])
    except ValueError as error:
        raise UserError("the index holds a damaged perceptual hash; ingest the data set again") from error
    found = ((d, numbers[i], numbers[j]) for d, i, j in close_pairs(words, threshold))
    crossing = ((d, _across(rows, splits, i, j), i, j) for d, i, j in found)
    return sorted(Pair(d, across, i, j) for d, across, i, j in crossing if across)


def close_pairs(words: Words, threshold: int) -> Iterator[tuple[int, int, int]]:
    """(distance, i, j) with i < j for all hashes that differ in at most `threshold` bits."""
    for top in range(0, len(words), BLOCK):
        for left in range(top, len(words), BLOCK):
            near = distance(words[top : top + BLOCK], words[left : left + BLOCK])
            for i, j in zip(*np.nonzero(near <= threshold), strict=True):
                if top + i < left + j:
                    yield int(near[i, j]), int(top + i), int(left + j)


def _across(rows: Sequence[Row], splits: Sequence[str], i: int, j: int) -> str:
    """What lies between two images that should not look alike; empty where they may."""
    if rows[i]["dataset"] != rows[j]["dataset"]:
        return "data sets"
    if splits[i] and splits[j] and splits[i] != splits[j]:
        return "splits"
    return "patients" if patient_of(rows[i]) != patient_of(rows[j]) else ""


# ---------------------------------------------------------------------------------------------- telling


def summary(rows: Sequence[Row], pairs: Sequence[Pair], threshold: int = THRESHOLD) -> list[str]:
    """What was compared and found, line by line."""
    hashed = sum(row.get("phash", "") not in ("", NO_HASH) for row in rows)
    without = f"; {len(rows) - hashed} have no hash (ingest them again)" if hashed < len(rows) else ""
    lines = [f"{hashed} images compared, mirrored or not, at {threshold} of 256 bits{without}"]
    counts = Counter(pair.across for pair in pairs)
    for across in ("data sets", "splits", "patients"):
        if counts[across]:
            lines.append(f"{counts[across]} near-duplicate pair{'s' * (counts[across] > 1)} across {across}")
    return lines if pairs else [*lines, "no near-duplicates across data sets, splits or patients"]


def table(rows: Sequence[Row], pairs: Sequence[Pair], limit: int = 50) -> Table:
    """The nearest pairs, for looking at them."""
    title = f"the nearest {limit} of {len(pairs)} pairs" if len(pairs) > limit else None
    shown = Table("bits", "across", title=title, title_justify="left")
    for column in ("image", "split") * 2:
        shown.add_column(column, overflow="fold")
    for pair in pairs[:limit]:
        a, b = rows[pair.first], rows[pair.second]
        shown.add_row(str(pair.distance), pair.across, a["key"], a["split"] or "-", b["key"], b["split"] or "-")
    return shown
