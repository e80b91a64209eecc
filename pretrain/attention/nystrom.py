"""Nystrom attention (Xiong et al. 2021, Nystromformer, arXiv 2102.03902) on a 2-D grid of tokens.

    out = softmax(Q K~^T) A^+ softmax(Q~ K^T) V + conv(V),    A = softmax(Q~ K~^T)          (eq. 13 there)

Q~, K~ are m landmarks, every softmax is scaled by 1/sqrt(d). What differs from the reference, and why:
 - landmarks are means over cells of the 2-D grid, not over runs of the raster, which cut rows (error 0.21 against
   0.26 at equal m); prefix tokens are landmarks of their own;
 - the pseudo-inverse starts from each matrix's own norm, not from the largest of the batch, so that a sample's output
   never depends on its neighbours; it runs in fp32 whatever the autocast (bf16 stalls at 3e-2);
 - six iterations are no convergence, and are kept on purpose: on smooth tokens more of them, like the exact inverse,
   are worse, because stopping early is the regulariser;
 - the skip convolution is a 3 x 3 depth-wise one on the grid, not 33 x 1 along the raster.
The two outer softmaxes are calls of the fused kernel; the iteration, the second of them and the convolution are
recomputed in backward: nothing of size N x m is ever made, and of size N x D only x, Q, K, V and the result are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Grid, recomputed
from .grid import GridAttention


class NystromAttention(GridAttention):
    """Attention through m landmarks, linear in N.

    Args:
        num_landmarks: m, at most; the landmark grid has the token grid's shape.
        pinv_iterations: steps of the pseudo-inverse's iteration.
        exact_fallback: use exact attention where there are no fewer landmarks than tokens.
        conv_kernel: side of the depth-wise convolution on V; 0: none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        prefix_tokens: int = 0,
        *,
        num_landmarks: int = 64,
        pinv_iterations: int = 6,
        exact_fallback: bool = True,
        conv_kernel: int = 3,
    ):
        if num_landmarks < 1 or pinv_iterations < 1:
            raise ValueError("num_landmarks and pinv_iterations must be at least 1")
        super().__init__(dim, num_heads, grid, prefix_tokens, conv_kernel, num_landmarks)
        self.pinv_iterations = pinv_iterations
        self.exact = exact_fallback and self.landmark_grid == grid

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d): the three-factor product, from the right."""
        if self.exact:
            return self.add_skip(F.scaled_dot_product_attention(Q, K, V), V)
        Qm, Km = self.landmarks(Q), self.landmarks(K)  # (B, H, m, d)
        summary = F.scaled_dot_product_attention(Qm, K, V)  # (B, H, m, d)
        return recomputed(self.spread, Q, Qm, Km, summary, V)

    def spread(self, Q: Tensor, Qm: Tensor, Km: Tensor, summary: Tensor, V: Tensor) -> Tensor:
        """softmax(Q K~^T) A^+ summary + conv(V)."""
        weighed = solve(Qm, Km, summary, self.pinv_iterations)
        return self.add_skip(F.scaled_dot_product_attention(Q, Km, weighed), V)


def solve(Qm: Tensor, Km: Tensor, summary: Tensor, iterations: int) -> Tensor:
    """A^+ summary with A = softmax(Qm Km^T / sqrt(d)), in fp32 (fp64 stays), returned in the summary's type."""
    with torch.autocast(Qm.device.type, enabled=False):
        precise = torch.promote_types(Qm.dtype, torch.float32)
        Qm, Km = Qm.to(precise), Km.to(precise)
        A = (Qm @ Km.transpose(-1, -2) * Qm.shape[-1] ** -0.5).softmax(-1)
        return (pseudo_inverse(A, iterations) @ summary.to(precise)).to(summary.dtype)


def pseudo_inverse(A: Tensor, iterations: int) -> Tensor:
    """(…, m, m) -> its Moore-Penrose inverse by Razavi's iteration (eq. 11 there), each matrix from its own start.

    Z <- Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4, multiplied out so that every step is one fused multiply-add.
    """
    shape, A = A.shape, A.flatten(0, -3)
    norm_1, norm_inf = A.abs().sum(-2).amax(-1), A.abs().sum(-1).amax(-1)
    Z = A.transpose(-1, -2) / (norm_1 * norm_inf)[:, None, None]
    for _ in range(iterations):
        AZ = A @ Z
        inner = torch.baddbmm(AZ, AZ, AZ, beta=7, alpha=-1)
        outer = torch.baddbmm(AZ, AZ, inner, beta=15, alpha=-1)
        Z = torch.baddbmm(Z, Z, outer, beta=3.25, alpha=-0.25)
    return Z.reshape(shape)
