"""Batch norm and keys of the whole global batch, on any device and with or without `torch.distributed`.

torch's SyncBatchNorm refuses CPU tensors, and `torch.distributed.nn.all_reduce` is on its way out, so both are here.
Every rank must hold equally many samples, as the training stream gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


def world_size() -> int:
    """Ranks; 1 where nobody started any."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """(B, …) on every rank -> (world * B, …) in the order of ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def upcast(x: Tensor) -> Tensor:
    """At least fp32: sums over a batch lose too much in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _SumOverRanks(torch.autograd.Function):
    """y = sum over ranks of x. The loss is a sum over ranks too, and so is its gradient: dL/dx = sum of dL_rank/dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


class GlobalBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of (B, D) whose statistics are those of the global batch, in fp32 or finer under autocast.

    Gradients are exact once they are summed over ranks (Ioffe and Szegedy 2015, algorithm 1, over all ranks' rows).
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) -> (B, D), not in half precision."""
        x = upcast(input)
        if world_size() == 1 or not self.training:
            return super().forward(x)
        n = len(x) * world_size()
        mean = self._total(x) / n
        centred = x - mean
        var = self._total(centred.square()) / n  # in a second pass: E[x^2] - E[x]^2 cancels
        self._track(mean.detach(), var.detach() * n / (n - 1))
        y = centred * torch.rsqrt(var + self.eps)
        return y * self.weight + self.bias if self.affine else y

    def _total(self, x: Tensor) -> Tensor:
        summed: Tensor = _SumOverRanks.apply(x.sum(0))
        return summed

    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
