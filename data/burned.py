"""Text burned into a breast, found by how it is drawn: glyphs of one paint, sharp and thin, in a row.

The heuristic: pieces that stand out from the tissue around them, brighter or darker, are letters if they are small,
mostly of one paint and steep at an edge; four letters of one size, paint and line that follow one another closely,
along rows or columns, are text.

Measured by `python tests/data/test_burned.py` with MIRAM_REAL_DATA set: names, dates and numbers in Pillow's own
font, one word of each size at a random place of each breast. Capitals are 12 px high and more in sizes 16, 24, 40 and
72, 9 px in size 12.

                                   false alarms  white         at 85 %      black         9 px, all three
    40 phantoms                    0 of 40       160 of 160    159 of 160   159 of 160    86 of 120
    284 real or simulated films    0 of 284      1038 of 1046  985 of 1046  1024 of 1046  584 of 852
    27 films never looked at       0 of 27       78 of 79      76 of 79     74 of 79      65 of 81

The 284 (mini-MIAS, DDSM, NYU, CDD-CESM and M-SYNTH's simulations) are those on which its constants were chosen; the 27
are the contrast images of CDD-CESM. With no alarm in 284, at most 1.3 % are to be expected (95 %). It misses text of
fewer than four letters, slanted or joined-up writing, and paint that stands out by less than 12 % of the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi

from .record import Pixels

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

BLOCK = 32  # pixels; paint stands out from the mean of such a square
STANDS_OUT = 0.12  # by this part of the breast's range of grey
GLYPHS = 4  # so many in a row are text
HEIGHT = (7, 160)  # pixels of a glyph
MANY = 3000  # pieces that stand out: texture, not text
PAINT = 0.06  # of its contrast: how far pixels of one paint lie apart
PAINTED = 0.2  # of a glyph's pixels are full paint; of a bright spot, only its top
STEEP = 0.45  # of the contrast is crossed within a pixel, somewhere at a glyph's edge


@dataclass(frozen=True)
class _Glyphs:
    """Boxes of pieces that may be letters, an entry each."""

    top: Floats
    bottom: Floats
    left: Floats
    right: Floats
    paint: Floats
    contrast: Floats

    def turned(self) -> _Glyphs:
        """The same with rows and columns exchanged."""
        return _Glyphs(self.left, self.right, self.top, self.bottom, self.paint, self.contrast)


def text_on(pixels: Pixels, mask: Mask, max_value: int) -> bool:
    """Whether there seems to be text on the breast: (H, W) pixels of 0 … max_value, (H, W) mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return False
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    image, inside = _blocks(pixels[box]), _blocks(mask[box])
    level, spread = _levels(image, inside)
    # Dark text is bright text on the negative.
    return _bright_text(image, inside, level, spread) or _bright_text(
        np.where(inside, max_value - image, 0).astype(image.dtype), inside, max_value - level, spread
    )


def _bright_text(image: Pixels, inside: Mask, level: Floats, spread: float) -> bool:
    image = image * inside
    peak = image.reshape(len(level), BLOCK, -1).max(axis=1).reshape(*level.shape, BLOCK).max(axis=2)
    hot = peak > level + max(STANDS_OUT * spread, 2.0)
    if not hot.any():
        return False
    # Half-way between tissue and paint letters that touch come apart.
    paint = np.where(hot, peak, 0).astype(np.float32)
    limit = np.where(ndi.binary_dilation(hot), level + (ndi.maximum_filter(paint, 3) - level) / 2, np.inf)
    limit = np.maximum(limit, level + max(STANDS_OUT * spread, 2.0))
    found = _above(image, limit)
    glyphs = _glyphs(image, found, level)
    return glyphs is not None and (_has_row(glyphs) or _has_row(glyphs.turned()))


def _blocks(values: NDArray[Any]) -> NDArray[Any]:
    """The array filled up with zeros to whole blocks."""
    return np.pad(values, [(0, -side % BLOCK) for side in values.shape])


def _levels(image: Pixels, inside: Mask) -> tuple[Floats, float]:
    """The breast's mean in each block, and its range of grey."""
    weight = _sums(inside)
    means = _sums(np.where(inside, image, 0)) / np.maximum(weight, 1)
    known = np.where(weight > 0, means, np.median(means[weight > 0]))
    sample = image[::7, ::7][inside[::7, ::7]]
    low, high = np.percentile(sample, (1, 99)) if sample.size else (0.0, 1.0)
    # A line of text is thinner than two blocks: the median of three is of the tissue.
    return ndi.median_filter(known, 3).astype(np.float32), float(high - low)


def _sums(values: NDArray[Any]) -> Floats:
    rows = values.reshape(-1, BLOCK, values.shape[1]).sum(axis=1, dtype=np.float32)
    sums: Floats = rows.reshape(len(rows), -1, BLOCK).sum(axis=2)
    return sums


def _above(image: Pixels, limit: Floats) -> Mask:
    """Pixels beyond their block's limit."""
    found = np.empty(image.shape, np.bool_)
    top = np.iinfo(image.dtype).max
    for row, limits in enumerate(np.repeat(np.minimum(limit, top).astype(image.dtype), BLOCK, axis=1)):
        part = slice(row * BLOCK, (row + 1) * BLOCK)
        np.greater(image[part], limits, out=found[part])
    return found


def _glyphs(image: Pixels, found: Mask, level: Floats) -> _Glyphs | None:
    """The pieces that are drawn like a letter: small, of one paint for the most part, steep at an edge."""
    labels, _ = ndi.label(found, np.ones((3, 3), np.int8))
    boxes = ndi.find_objects(labels)
    sides = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in boxes]
    fitting = [number for number, side in enumerate(sides, 1) if HEIGHT[0] <= max(side) <= HEIGHT[1]]
    if len(fitting) > MANY:
        return None
    glyphs = []
    for number in fitting:
        place = rows, columns = boxes[number - 1]
        values = np.sort(image[place][labels[place] == number].astype(np.float32))
        paint = values[round(0.95 * (values.size - 1))]
        contrast = paint - level[rows.start // BLOCK, columns.start // BLOCK]
        if values[-1 - int(PAINTED * values.size)] < paint - PAINT * contrast:
            continue
        around = image[max(rows.start - 1, 0) : rows.stop + 1, max(columns.start - 1, 0) : columns.stop + 1]
        if (around[:, 1:].astype(np.float32) - around[:, :-1]).max(initial=0) >= STEEP * contrast:
            glyphs.append((rows.start, rows.stop, columns.start, columns.stop, paint, contrast))
    return _Glyphs(*np.array(glyphs, np.float32).T) if len(glyphs) >= GLYPHS else None


def _has_row(glyphs: _Glyphs) -> bool:
    """Whether GLYPHS of them follow one another like letters: on one line, of one size and paint."""

    def pairs(values: Floats) -> tuple[Floats, Floats]:
        return values[:, None], values[None, :]

    (top, top2), (bottom, bottom2) = pairs(glyphs.top), pairs(glyphs.bottom)
    (left, left2), (right, _) = pairs(glyphs.left), pairs(glyphs.right)
    (paint, paint2), (contrast, contrast2) = pairs(glyphs.paint), pairs(glyphs.contrast)
    height = np.maximum(bottom - top, bottom2 - top2)
    near = (left2 > left) & (left2 <= right + height)
    size = (np.minimum(bottom - top, bottom2 - top2) >= 0.6 * height) & (height >= HEIGHT[0])
    line = np.minimum(abs(bottom - bottom2), abs(top - top2)) <= np.maximum(1, 0.12 * height)
    same = abs(paint - paint2) <= 1.5 * PAINT * np.minimum(contrast, contrast2)
    follows = near & size & line & same
    last = np.ones(len(glyphs.top), np.bool_)
    for _ in range(GLYPHS - 1):
        last = follows[last].any(axis=0)
    return bool(last.any())
