"""What a linear attention costs grows with the number of tokens, and exact attention's grows faster.

Costs are counted on tensors without contents, through the CPU's kernels; no clock is read.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from miram.pretrain.attention import ATTENTIONS, build_attention

SIDES = (32, 64, 128)
WIDTH, HEADS = 64, 2
LINEAR = [name for name in ATTENTIONS if name != "softmax"]


class Cost(NamedTuple):
    forward: int
    """FLOPs"""
    training: int
    """FLOPs, forward and backward"""
    saved: int
    """bytes that autograd keeps in between, weights not counted"""


class Pass(nn.Module):
    """Forward and backward in one call, so that what is computed again in backward sees the same weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Cost:
        own = {t.untyped_storage()._cdata for t in (*self.parameters(), *self.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return saved

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                out = self.module(x)
            forward, saved = counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())
            out.backward(torch.ones_like(out))
        return Cost(forward, counter.get_total_flops(), saved)


@cache
def cost(name: str, side: int, backend: str = "", fake: bool = True) -> Cost:
    module = Pass(build_attention(name, WIDTH, HEADS, (side, side), 1, **({"backend": backend} if backend else {})))
    shape = (1, 1 + side * side, WIDTH)
    if not fake:
        return module(torch.randn(shape, requires_grad=True))
    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    with FakeTensorMode() as mode:
        empty = {key: mode.from_tensor(weight) for key, weight in weights.items()}
        return functional_call(module, empty, (torch.empty(shape, requires_grad=True),))


def exponents(name: str, backend: str = "") -> list[Cost]:
    """Slopes of log cost over log N: fitted, and of the last step alone, which a constant at small N cannot hide."""
    log_n = np.log([1 + side * side for side in SIDES])
    log_cost = np.log([cost(name, side, backend) for side in SIDES])
    fitted = np.polyfit(log_n, log_cost, 1)[0]
    last = (log_cost[-1] - log_cost[-2]) / (log_n[-1] - log_n[-2])
    return [Cost(*fitted), Cost(*last)]


@pytest.mark.parametrize("name", LINEAR)
def test_flops_of_a_linear_attention_grow_with_the_tokens(name: str) -> None:
    for slope in exponents(name):
        assert slope.forward <= 1.05
        assert slope.training <= 1.05


@pytest.mark.parametrize("name", LINEAR)
def test_memory_of_a_linear_attention_grows_with_the_tokens(name: str) -> None:
    for slope in exponents(name):
        assert slope.saved <= 1.05


def test_exact_attention_needs_quadratic_time_and_only_unfused_quadratic_memory() -> None:
    fused, eager = exponents("softmax", "sdpa")[0], exponents("softmax", "eager")[0]
    assert min(fused.forward, fused.training, eager.forward, eager.training) > 1.5
    assert eager.saved > 1.5
    assert fused.saved <= 1.05


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_attention_needs_fewer_flops_than_exact_attention(name: str) -> None:
    assert cost(name, 128).training < cost("softmax", 128).training / 4


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_count_without_contents_is_that_of_a_real_pass(name: str) -> None:
    assert cost(name, 16) == cost(name, 16, fake=False)


def test_counts_are_those_of_the_closed_form() -> None:
    """Projections 8 N D^2, two products 4 N^2 D; kept: x, Q, K, V and the mixed values, and a number a row and head."""
    N, D = 1 + 32 * 32, WIDTH
    found = cost("softmax", 32, "sdpa")
    assert found.forward == 8 * N * D * D + 4 * N * N * D
    assert found.saved == 4 * (5 * N * D + N * HEADS)
    assert math.isclose(cost("softmax", 32, "eager").saved, 4 * (HEADS * N * N + 5 * N * D), rel_tol=0.01)
