"""Exact attention: its backends agree with the formula; where xformers cannot run it is refused, never replaced."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from miram.engine.errors import UserError
from miram.pretrain.attention import build_attention, softmax
from miram.pretrain.config import ScaleSection

DIM, HEADS, GRID = 32, 4, (6, 4)
d = DIM // HEADS
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers runs on CUDA only, and MIRAM_GPU=1")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="here xformers may run")


def tokens() -> Tensor:
    return torch.randn(3, 25, DIM, generator=torch.Generator().manual_seed(0))


def by_hand(module: nn.Module, x: Tensor) -> Tensor:
    B, N, D = x.shape
    Q, K, V = (part.reshape(B, N, HEADS, d) for part in module.qkv(x).chunk(3, dim=-1))  # type: ignore[operator]
    weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", Q, K) / d**0.5, dim=-1)
    return module.proj(torch.einsum("bhnm,bmhd->bnhd", weights, V).reshape(B, N, D))  # type: ignore[operator]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_every_backend_is_attention_by_hand(backend: str) -> None:
    module = build_attention("softmax", DIM, HEADS, GRID, 1, backend=backend)
    torch.testing.assert_close(module(tokens()), by_hand(module, tokens()))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_agrees_with_sdpa(dtype: torch.dtype) -> None:
    pytest.importorskip("xformers")
    torch.manual_seed(0)
    ours, theirs = (
        build_attention("softmax", DIM, HEADS, GRID, 1, backend=backend).to("cuda", dtype)
        for backend in ("sdpa", "xformers")
    )
    theirs.load_state_dict(ours.state_dict())
    x = tokens().to("cuda", dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(theirs(x), ours(x), atol=tolerance, rtol=tolerance)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that says it is xformers and computes attention of (B, N, H, d) by the formula."""

    def attention(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", Q, K) / Q.shape[-1] ** 0.5, dim=-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, V)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_xformers_is_given_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    Q, K, V = torch.randn(3, 2, HEADS, 25, d)
    expected = torch.nn.functional.scaled_dot_product_attention(Q, K, V)
    torch.testing.assert_close(softmax.xformers_attention(Q, K, V), expected)


@without_cuda
def test_xformers_without_cuda_is_refused() -> None:
    with pytest.raises(UserError, match=r"attention_backend: xformers cannot run here: .*CUDA.*choose auto or sdpa"):
        build_attention("softmax", DIM, HEADS, GRID, backend="xformers")


def test_xformers_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kind: torch.ones(*shape, **kind))
    with pytest.raises(UserError, match="xformers cannot run here: it is not installed; choose auto or sdpa"):
        build_attention("softmax", DIM, HEADS, GRID, backend="xformers")


def test_xformers_without_an_operator_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_fits(*_: Tensor) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n  fa2F: not built\n")

    stand_in(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kind: torch.ones(*shape, **kind))
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", nothing_fits)
    with pytest.raises(UserError, match="No operator found") as refusal:
        build_attention("softmax", DIM, HEADS, GRID, backend="xformers")
    assert "\n" not in str(refusal.value)


def test_tokens_on_the_cpu_are_refused_when_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "why_not_xformers", lambda head_dim: None)
    module = build_attention("softmax", DIM, HEADS, GRID, 1, backend="xformers")
    with pytest.raises(UserError, match="the tokens are on cpu"):
        module(tokens())


@pytest.mark.slow
@without_cuda
def test_trying_xformers_out_prints_nothing() -> None:
    """As on a machine with a GPU and a torch that xformers was not built for: it logs warnings when imported."""
    pytest.importorskip("xformers")
    script = (
        "import torch; torch.cuda.is_available = lambda: True; zeros = torch.zeros\n"
        "torch.zeros = lambda *shape, device=None, **kind: zeros(*shape, **kind)\n"
        "from miram.pretrain.attention.softmax import why_not_xformers\n"
        "assert why_not_xformers(32)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_backend_is_checked_by_type_in_a_scales_options() -> None:
    assert ScaleSection(scale=1, options={"backend": "xformers"}).options == {"backend": "xformers"}
    with pytest.raises(ValueError, match="backend"):
        ScaleSection(scale=1, options={"backend": "flash"})
    with pytest.raises(ValueError, match="flash"):
        build_attention("softmax", DIM, HEADS, GRID, backend="flash")
