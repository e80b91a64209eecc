"""The probability from which on a lesion is said, chosen on images that the model was not trained on.

It is the one with the best pooled Dice of the held-out images, 2 both / (truth + said) with pixels counted over all of
them: images with nothing on them count by what is said there falsely. Probabilities are counted in bins, so that the
images need not be in memory together.

Legend: K classes, T bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...data.findings import IGNORED

BINS = 200
EDGES = np.arange(1, BINS) / BINS  # the thresholds that may be chosen

Probabilities = NDArray[np.float32]
Ints = NDArray[np.int64]


def histograms(truth: NDArray[np.uint8], probabilities: Probabilities) -> Ints:
    """(K - 1, 2, T) how many pixels off and on each class have a probability in each bin.

    Args:
        truth: (H, W) class numbers.
        probabilities: (K, H, W).
    """
    counted = truth != IGNORED
    found = np.zeros((len(probabilities) - 1, 2, BINS), np.int64)
    for number, (said, bins) in enumerate(zip(probabilities[1:], found, strict=True), 1):
        here = np.minimum((said * BINS).astype(np.int64), BINS - 1)
        on = truth == number
        bins[0] = np.bincount(here[counted & ~on], minlength=BINS)
        bins[1] = np.bincount(here[on], minlength=BINS)
    return found


def choose_thresholds(held: Ints) -> tuple[float, ...]:
    """The best threshold of each class, by (K - 1, 2, T) histograms of all held-out images; 0.5 where none has it.

    Of equal ones the middle is taken.
    """
    above = held[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]  # (K - 1, 2, T - 1) pixels from each threshold on
    both, said, truth = above[:, 1], above.sum(1), held[:, 1].sum(-1, keepdims=True)
    dice = 2 * both / np.maximum(said + truth, 1)
    best = [np.flatnonzero(row == row.max()) for row in dice]
    return tuple(
        float(EDGES[places[len(places) // 2]]) if there else 0.5
        for places, there in zip(best, truth[:, 0], strict=True)
    )
