"""Performer: its estimate against the exponential it stands for, its chunks against the formula written out."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miram.pretrain.attention import build_attention, performer
from miram.pretrain.attention.performer import PerformerAttention, Read, Summarise, directions

DIM, HEADS, GRID = 32, 4, (6, 4)


def build(prefix: int = 0, seed: int = 0, **options: int) -> PerformerAttention:
    torch.manual_seed(seed)
    module = build_attention("performer", DIM, HEADS, GRID, prefix, **options)
    assert isinstance(module, PerformerAttention)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def phi(X: Tensor, W: Tensor) -> Tensor:
    """Lemma 1 of the paper for exp(q.k / sqrt(d)), in float64."""
    X = X / X.shape[-1] ** 0.25
    return torch.exp(torch.einsum("...nd,md->...nm", X, W) - (X**2).sum(-1, keepdim=True) / 2) / math.sqrt(len(W))


def plain(Q: Tensor, K: Tensor, V: Tensor, W: Tensor) -> Tensor:
    """Eq. 4 of the paper, through the whole N x N matrix."""
    A = phi(Q, W) @ phi(K, W).mT
    return A @ V / A.sum(-1, keepdim=True)


def favor(Q: Tensor, K: Tensor, V: Tensor, W: Tensor) -> Tensor:
    return Read.apply(Q, *Summarise.apply(K, V, W), W)


def log_phi_of(x: Tensor, W: Tensor) -> Tensor:
    """What the module holds as log phi (but for sqrt(m)): with a single key, the largest exponents are that key's."""
    return Summarise.apply(x[None, None, None], x[None, None, None], W)[1].flatten()


@pytest.fixture(scope="module")
def draws() -> Tensor:
    """2000 independent draws of 24 directions in three blocks of 8."""
    return torch.stack([directions(0, draw, 24, 8) for draw in range(2000)]).double()


def test_kernel_estimate_is_unbiased(draws: Tensor) -> None:
    """Mean over the draws within four standard errors (each under 3 % of the truth), for five pairs of vectors.

    The directions of a draw depend on each other, the draws do not: their spread gives the standard error.
    """
    for q, k in 0.4 * normal(5, 2, 8, seed=3):
        logs = log_phi_of(q, draws.flatten(0, 1)) + log_phi_of(k, draws.flatten(0, 1))
        estimates = logs.exp().reshape(2000, 24).mean(1)
        error = estimates.std() / math.sqrt(2000)
        exact = math.exp(q @ k / math.sqrt(8))
        assert error < 0.03 * exact
        assert abs(estimates.mean() - exact) < 4 * error


def test_each_direction_alone_is_unbiased(draws: Tensor) -> None:
    """The first row of a bare QR would lie in one half of space, and be off by far more than four standard errors."""
    x = 0.6 * normal(8, seed=3)
    found = (2 * log_phi_of(x, draws.flatten(0, 1))).exp().reshape(2000, 24)
    error = found.std(0) / math.sqrt(2000)
    assert ((found.mean(0) - math.exp(x @ x / math.sqrt(8))).abs() / error).max() < 4
    positive = (draws > 0).double().mean(0)
    assert (positive - 0.5).abs().max() < 5 * 0.5 / math.sqrt(2000)


def test_directions_are_orthogonal_in_blocks_and_normal_one_by_one() -> None:
    W = directions(5, 2, 20, 8).double()
    for block in W.split(8):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)
    many = np.concatenate([directions(seed, 0, 16, 8).numpy() for seed in range(200)])
    assert stats.kstest((many**2).sum(1), stats.chi2(8).cdf).pvalue > 1e-3
    assert stats.kstest(many[:, 0], stats.norm.cdf).pvalue > 1e-3


def test_error_falls_as_one_over_the_root_of_the_features() -> None:
    Q, K, V = normal(3, 1, 2, 48, 8, seed=1) * torch.tensor([0.5, 0.5, 1.0])[:, None, None, None, None]
    exact = torch.softmax(Q @ K.mT / math.sqrt(8), -1) @ V
    sizes, errors = [64, 128, 256, 512, 1024, 2048, 4096], []
    for m in sizes:
        outputs = torch.stack([favor(Q, K, V, directions(7, draw, m, 8).double()) for draw in range(12)])
        errors.append(float((outputs - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4
    assert errors[-1] < 0.05


@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
def test_chunks_equal_the_formula_in_values_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 tokens: chunks of 1, of 7 with 4 left over, of 24 with one left over, and one chunk for all."""
    monkeypatch.setitem(performer.CHUNK, "cpu", chunk * 2 * 3 * 20)
    assert len(next(performer.chunks(20, normal(2, 3, 25, 8)))[0][0, 0]) == min(chunk, 25)
    inputs = [normal(2, 3, 25, 8, seed=seed).requires_grad_() for seed in range(3)]
    W, weights = directions(0, 0, 20, 8).double(), normal(2, 3, 25, 8, seed=9)
    ours, theirs = favor(*inputs, W), plain(*inputs, W)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, inputs, weights), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-9)


def test_huge_logits_stay_finite_where_the_formula_overflows() -> None:
    Q, K, V = 60 * normal(3, 1, 2, 20, 8)
    W = directions(0, 0, 64, 8)
    assert not plain(Q.float(), K.float(), V.float(), W).isfinite().all()
    inputs = [x.float().requires_grad_() for x in (Q, K, V)]
    out = favor(*inputs, W)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
    # The same sums in float64, by their logarithms.
    X = K / 8**0.25
    log_K = X @ W.double().T - (X**2).sum(-1, keepdim=True) / 2
    log_Q = (Q / 8**0.25) @ W.double().T
    A = torch.softmax(torch.logsumexp(log_Q[..., :, None, :] + log_K[..., None, :, :], -1), -1)
    torch.testing.assert_close(out.double(), A @ V, atol=1e-3 * float(V.abs().max()), rtol=1e-3)


def test_gradient_of_the_module_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(performer.CHUNK, "cpu", 3 * 2 * 12)
    torch.manual_seed(0)
    module = build_attention("performer", 8, 2, (3, 2), 1, num_features=12).double()
    assert torch.autograd.gradcheck(module, (normal(1, 7, 8).requires_grad_(),))


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_sample_never_depends_on_its_batch(prefix: int) -> None:
    module, x = build(prefix), normal(3, prefix + 24, DIM).float()
    loud = x.clone()
    loud[1] *= 60
    torch.testing.assert_close(module(loud)[0], module(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(module(x[:1])[0], module(x)[0])


def test_bf16_autocast_stays_close_because_exponents_are_fp32() -> None:
    module, x = build(), normal(3, 24, DIM).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
        half.float().square().mean().backward()
    gradient = module.qkv.weight.grad.clone()
    module.zero_grad()
    full = module(x)
    full.square().mean().backward()
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.02
    assert (gradient - module.qkv.weight.grad).norm() / gradient.norm() < 0.02


def test_exponents_are_fp32_in_forward_and_backward_under_autocast() -> None:
    """The same bf16 Q, K, V give the same sums inside and outside of autocast."""
    inputs = [normal(1, 2, 24, 8, seed=seed).bfloat16().requires_grad_() for seed in range(3)]
    W = directions(0, 0, 64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = favor(*inputs, W)
        inside_grads = torch.autograd.grad(inside.float().square().sum(), inputs)
    outside = favor(*inputs, W)
    outside_grads = torch.autograd.grad(outside.float().square().sum(), inputs)
    assert inside.dtype == torch.bfloat16
    torch.testing.assert_close((inside, *inside_grads), (outside, *outside_grads), rtol=0, atol=0)


def test_directions_are_a_function_of_seed_and_step() -> None:
    """Two generators in different states, one restart, one jump: the same directions wherever the seed is the same."""
    first, second = build(seed=1, redraw_every=10), build(seed=2, redraw_every=10)
    assert not torch.equal(first.features, second.features)
    second.load_state_dict(first.state_dict())
    seen = []
    for step in range(25):
        torch.manual_seed(step)
        first.begin_step(step)
        seen.append(first.features.clone())
    assert [not torch.equal(a, b) for a, b in pairwise(seen)] == [s in (9, 19) for s in range(24)]
    torch.rand(7)
    second.begin_step(24)
    torch.testing.assert_close(second.features, seen[24], rtol=0, atol=0)
    second.begin_step(3)
    torch.testing.assert_close(second.features, seen[3], rtol=0, atol=0)


def test_drawing_leaves_the_global_generator_alone() -> None:
    module = build(redraw_every=1)
    state = torch.get_rng_state()
    module.begin_step(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_redraws_the_directions_stay() -> None:
    module = build(redraw_every=0)
    before = module.features.clone()
    for step in (0, 1, 1000, 10**6):
        module.begin_step(step)
    assert torch.equal(module.features, before)


def test_two_layers_of_a_model_differ() -> None:
    torch.manual_seed(0)
    first, second = (build_attention("performer", DIM, HEADS, GRID) for _ in range(2))
    assert not torch.equal(first.features, second.features)


def test_only_begin_step_draws_and_recomputation_sees_the_same_directions() -> None:
    module, x = build(redraw_every=1), normal(2, 24, DIM).float().requires_grad_()
    module.begin_step(3)
    before = module.features.clone()
    module(x).square().sum().backward()
    plain_grad, x.grad = x.grad, None
    checkpoint(module, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, plain_grad, rtol=0, atol=0)
    module.eval()(x)
    assert torch.equal(module.features, before)


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path: Path) -> None:
    module, x = build(seed=1), normal(2, 24, DIM).float()
    module.begin_step(1000)
    assert {name: (value.dtype, value.ndim) for name, value in module.named_buffers()} == {
        "seed": (torch.int64, 1),
        "features": (torch.float32, 2),
    }
    save_file(module.state_dict(), tmp_path / "module.safetensors")
    other = build(seed=2)
    other.load_state_dict(load_file(tmp_path / "module.safetensors"))
    assert torch.equal(other(x), module(x))
    for either in (module, other):
        either.begin_step(2000)
    assert torch.equal(other(x), module(x))


def test_it_compiles_into_one_graph() -> None:
    module, x = build(1), normal(2, 25, DIM).float().requires_grad_()
    expected = module(x)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], grad)
    module.begin_step(1000)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("tokens", [(28, 28), (56, 56)])
def test_nothing_of_tokens_times_features_is_kept(tokens: tuple[int, int]) -> None:
    """What fused exact attention keeps (Q, K, V, out, one number a query), and m (d + 2) numbers a head."""
    H, d, m, N = 4, 8, 64, tokens[0] * tokens[1]
    qkv = torch.randn(3, 1, H, N, d, requires_grad=True)
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = favor(*qkv.unbind(0), directions(0, 0, m, d))
    assert out.requires_grad
    assert sum(kept.values()) <= 4 * (H * N * (4 * d + 1) + H * m * (d + 2) + m * d)


@pytest.mark.parametrize("options", [{"num_features": 0}, {"redraw_every": -1}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        build(**options)
