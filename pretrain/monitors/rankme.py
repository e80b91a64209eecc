"""RankMe: how many dimensions features use (Garrido et al. 2023, arXiv 2210.02885)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-7  # the paper's, for single precision


def rankme(features: NDArray[np.floating]) -> float:
    """Effective rank of (n, D) features: exp(-sum_k p_k log p_k), p_k = sigma_k / |sigma|_1 + epsilon (eq. 1 there).

    Between 1 and min(n, D): of few images it says how few they are, so only figures of equal n compare. Features are
    not centred, as in the paper. Those of a masked autoencoder share a large mean that one singular value takes: a
    figure of 2 to 5 is common, and a slow fall no alarm. A fall to 1 is a collapse.
    """
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))
