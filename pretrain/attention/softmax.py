"""Exact softmax attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...engine.errors import UserError, one_line
from .base import Attention, Grid


class SoftmaxAttention(Attention):
    """softmax(Q K^T / sqrt(d)) V.

    Args:
        backend: `auto` and `sdpa` are torch's fused kernel, whose memory grows with N; `eager` keeps the N x N map, for
            checking; `xformers` is that library's memory_efficient_attention, on CUDA only.

    Raises:
        UserError: xformers was asked for and cannot run here; nothing else is taken in its place.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        prefix_tokens: int = 0,
        *,
        backend: Literal["auto", "sdpa", "eager", "xformers"] = "auto",
    ):
        super().__init__(dim, num_heads, grid, prefix_tokens)
        if backend not in ("auto", "sdpa", "eager", "xformers"):
            raise ValueError(f"unknown backend {backend!r}; known: auto, sdpa, eager, xformers")
        if backend == "xformers" and (reason := why_not_xformers(dim // num_heads)):
            raise cannot_run(reason)
        self.backend = backend

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        if self.backend == "eager":
            return (Q @ K.transpose(-1, -2) * Q.shape[-1] ** -0.5).softmax(-1) @ V
        if self.backend == "xformers":
            if not Q.is_cuda:
                raise cannot_run(f"its kernels are for CUDA and the tokens are on {Q.device.type}")
            return xformers_attention(Q, K, V)
        return F.scaled_dot_product_attention(Q, K, V)


def xformers_attention(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, H, N, d), by way of the (B, N, H, d) that xformers asks for."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (Q, K, V))).transpose(1, 2)


def why_not_xformers(head_dim: int) -> str | None:
    """Why xformers cannot run here, tried out with a tiny call and its gradient; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        with quiet_import():
            x = torch.zeros(1, 1, 8, head_dim, device="cuda", requires_grad=True)
            xformers_attention(x, x, x).sum().backward()
    except ImportError as error:
        return "it is not installed" if (error.name or "").startswith("xformers") else one_line(str(error))
    except Exception as error:  # whatever a library built for another torch comes up with is a reason
        return one_line(str(error).partition("\n")[0])
    return None


def cannot_run(reason: str) -> UserError:
    """The one sentence for it."""
    return UserError(
        f"model.attention_backend: xformers cannot run here: {reason}; choose auto or sdpa, torch's own fused kernel"
    )


@contextmanager
def quiet_import() -> Iterator[None]:
    """Without the warnings of importing xformers: what matters of them becomes our error."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
