"""Performer attention, FAVOR+ (Choromanski et al. 2021): positive orthogonal random features.

    exp(q.k / sqrt(d)) = E_w [phi_w(q) phi_w(k)],    phi_w(x) = exp(w.x' - |x'|^2 / 2),  x' = x / d^(1/4)     (lemma 1)
    out = phi(Q) (phi(K)^T V) / phi(Q) (phi(K)^T 1),    w one of the m rows of W                               (eq. 4)

Here T = (phi(K) / e^c)^T [V, 1] and out = (phi(Q) e^c) T, its first d columns divided by the last. c has one number a
direction, the largest exponent of the keys; each query is shifted by its own. Both cancel in the quotient.

What differs from Google's code, and why:
 - its c is one number for all directions (so that many may underflow) and its eps keeps the quotient finite, by adding
   a little of the mean of V to every output. With a c for each sample, head and direction the denominator is at least
   one, eps is 0, and a sample cannot depend on its batch;
 - W's orthogonal blocks are uniform over all rotations. A bare QR is not (its first row always has a coordinate of
   one sign), and the exponential, not being even, is then biased;
 - W is a function of (seed, step), both in the checkpoint, so that ranks and restarts agree.
Exponents and sums are fp32 whatever the autocast (fp64 stays). Both steps run over chunks of tokens, again in
backward: nothing of size N x m is kept, only what exact fused attention keeps (Q, K, V, out, one number a query).

Legend: B batch, H heads, N tokens, d width of a head, m directions, C tokens of a chunk, dX the gradient of X.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ...engine.seeding import generator
from .base import Attention, Grid

# Numbers in one (B, H, C, m) map: within a cache on a CPU; on a GPU few kernels, yet small beside the activations.
CHUNK = {"cpu": 2**19, "other": 2**26}


class PerformerAttention(Attention):
    """Attention by positive orthogonal random features, linear in N.

    An unbiased kernel is no close approximation: the error falls as 1 / sqrt(m) and grows with the exponential of the
    logits. Treat it as a kernel of its own that is trained, not as softmax made cheap.

    Args:
        num_features: m. The libraries' d log(d), 110 for a head of 32, has a larger error (0.38) than simply the mean
            of V (0.26), on random Q and K and 785 tokens; 256 is the authors' own default.
        redraw_every: steps between new directions; 0: never.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        prefix_tokens: int = 0,
        *,
        num_features: int = 256,
        redraw_every: int = 1000,
    ):
        super().__init__(dim, num_heads, grid, prefix_tokens)
        if num_features < 1 or redraw_every < 0:
            raise ValueError("num_features must be at least 1, redraw_every at least 0")
        self.redraw_every = redraw_every
        seed = int(torch.randint(2**62, (1,), device="cpu"))
        self.register_buffer("seed", torch.tensor([seed]))
        self.register_buffer("features", directions(seed, 0, num_features, dim // num_heads))
        self.seed: Tensor
        self.features: Tensor
        self.drawn: int | None = 0  # the draw that `features` holds; None: unknown, because it was loaded

    def begin_step(self, step: int) -> None:
        """Put the directions of this step into the buffer: a function of (seed, step), whatever happened before."""
        draw = step // self.redraw_every if self.redraw_every else 0
        if draw != self.drawn:
            self.features.copy_(directions(int(self.seed), draw, *self.features.shape))
            self.drawn = draw

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        return Read.apply(Q, *Summarise.apply(K, V, self.features), self.features)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.drawn = None


class Summarise(torch.autograd.Function):
    """T = (phi(K) / e^c)^T [V, 1] and c, the largest exponents: (B, H, m, d + 1), (B, H, 1, m)."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """Sums against a running maximum, shrunk whenever a chunk raises it."""
        exact = torch.promote_types(K.dtype, torch.float32)
        c = K.new_full((*K.shape[:2], 1, len(W)), -torch.inf, dtype=exact)
        T = K.new_zeros((*K.shape[:2], len(W), K.shape[-1] + 1), dtype=exact)
        with torch.autocast(K.device.type, enabled=False):
            for Kc, Vc in chunks(len(W), K, V):
                scaled = scale(Kc, exact)
                exponents = (scaled @ W.to(exact).T).sub_(half_norm(scaled))
                higher = torch.maximum(c, exponents.amax(-2, keepdim=True))
                P = exponents.sub_(higher).exp_()
                T = T * (c - higher).exp_().mT + P.mT @ with_ones(Vc, exact)
                c = higher
        ctx.save_for_backward(K, V, W, c)
        ctx.mark_non_differentiable(c)
        return T, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dT: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        """With P = phi(K) / e^c: d[V, 1] = P dT, d exponents = P * [V, 1] dT^T, whose rows sum to [V, 1] . d[V, 1]."""
        K, V, W, c = ctx.saved_tensors
        dK, dV = torch.empty_like(K), torch.empty_like(V)
        with torch.autocast(K.device.type, enabled=False):
            for Kc, Vc, dKc, dVc in chunks(len(W), K, V, dK, dV):
                scaled, V1 = scale(Kc, dT.dtype), with_ones(Vc, dT.dtype)
                P = (scaled @ W.to(dT.dtype).T).sub_(half_norm(scaled)).sub_(c).exp_()
                dV1 = P @ dT
                dexponents = (V1 @ dT.mT).mul_(P)
                rows = (V1 * dV1).sum(-1, keepdim=True)
                dKc.copy_((dexponents @ W.to(dT.dtype) - rows * scaled) * K.shape[-1] ** -0.25)
                dVc.copy_(dV1[..., :-1])
        return dK, dV, None


class Read(torch.autograd.Function):
    """out = (phi(Q) e^c) T, divided by its last column, (B, H, N, d)."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, T: Tensor, c: Tensor, W: Tensor) -> Tensor:
        """|q'|^2 / 2 is left out: it cancels. `total` is the logarithm of the denominator."""
        out = torch.empty_like(Q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        total = T.new_empty((*Q.shape[:3], 1))
        with torch.autocast(Q.device.type, enabled=False):
            for Qc, outc, totalc in chunks(len(W), Q, out, total):
                exponents = (scale(Qc, T.dtype) @ W.to(T.dtype).T).add_(c)
                highest = exponents.amax(-1, keepdim=True)
                sums = exponents.sub_(highest).exp_() @ T
                above, below = sums[..., :-1], sums[..., -1:]
                outc.copy_(above / below)
                totalc.copy_(highest + below.log())
        ctx.save_for_backward(Q, T, c, W, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With P = phi(Q) e^c / denominator and G = [dout, -dout . out]: dT = P^T G, d exponents = P * G T^T."""
        Q, T, c, W, out, total = ctx.saved_tensors
        dQ, dT = torch.empty_like(Q), torch.zeros_like(T)
        with torch.autocast(Q.device.type, enabled=False):
            for Qc, outc, totalc, doutc, dQc in chunks(len(W), Q, out, total, dout, dQ):
                P = (scale(Qc, T.dtype) @ W.to(T.dtype).T).add_(c).sub_(totalc).exp_()
                doutc = doutc.to(T.dtype)
                G = torch.cat([doutc, -(doutc * outc).sum(-1, keepdim=True)], dim=-1)
                dT += P.mT @ G
                dexponents = (G @ T.mT).mul_(P)
                dQc.copy_(dexponents @ W.to(T.dtype) * Q.shape[-1] ** -0.25)
        return dQ, dT, None, None


def scale(X: Tensor, dtype: torch.dtype) -> Tensor:
    """x' = x / d^(1/4)."""
    return X.to(dtype) * X.shape[-1] ** -0.25


def half_norm(scaled: Tensor) -> Tensor:
    """|x'|^2 / 2, (…, C, 1)."""
    return scaled.square().sum(-1, keepdim=True) / 2


def with_ones(V: Tensor, dtype: torch.dtype) -> Tensor:
    """[V, 1], (…, C, d + 1)."""
    return functional.pad(V.to(dtype), (0, 1), value=1.0)


def chunks(m: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same tokens of several (B, H, N, d)."""
    B, H = tensors[0].shape[:2]
    size = max(1, CHUNK.get(tensors[0].device.type, CHUNK["other"]) // (B * H * m))
    return zip(*(torch.split(x, size, dim=2) for x in tensors), strict=True)


def directions(seed: int, draw: int, m: int, d: int) -> Tensor:
    """(m, d) fp32: each row a standard normal vector, the rows of every block of d orthogonal (section 2.4 there)."""
    rng = generator(seed, "performer", draw)
    blocks = [rotation(rng, d) for _ in range(-(-m // d))]
    norms = np.linalg.norm(rng.standard_normal((m, d)), axis=1, keepdims=True)
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(blocks)[:m] * norms)).float()


def rotation(rng: np.random.Generator, d: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(d, d) orthogonal, uniform (Mezzadri 2007: QR is so only with R's diagonal made positive)."""
    Q, R = np.linalg.qr(rng.standard_normal((d, d)))
    return (Q * np.sign(np.diagonal(R))).T
