"""Nystrom attention against softmax where they must agree, and against its formula written out where they must not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from miram.pretrain.attention import build_attention, nystrom
from miram.pretrain.attention.grid import cells_of, landmark_grid
from miram.pretrain.attention.nystrom import NystromAttention, pseudo_inverse

DIM, HEADS, GRID = 32, 4, (6, 4)
d = DIM // HEADS
Array = NDArray[np.float64]


def tokens(n: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def build(grid: tuple[int, int] = GRID, prefix: int = 0, **options: object) -> NystromAttention:
    torch.manual_seed(0)
    module = build_attention("nystrom", DIM, HEADS, grid, prefix, **options).double()
    assert isinstance(module, NystromAttention)
    return module


def by_hand(module: nn.Module, x: Tensor) -> Tensor:
    """Softmax attention written out with the module's own projections."""
    B, N, D = x.shape
    Q, K, V = (part.reshape(B, N, HEADS, d) for part in module.qkv(x).chunk(3, dim=-1))  # type: ignore[operator]
    weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", Q, K) / d**0.5, dim=-1)
    return module.proj(torch.einsum("bhnm,bmhd->bnhd", weights, V).reshape(B, N, D))  # type: ignore[operator]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_with_every_token_a_landmark_it_is_softmax(prefix: int) -> None:
    """All three factors are then the same A, and A A^+ A V = A V. With c the condition number of A, the weakest
    direction of AZ starts above 1 / (N c^2) and grows by 13/4 a step: c < 1e6 and N < 30 take 27 steps, and three more
    cube the rest three times. Rounding leaves about 1e-16 c, a tenth of the tolerance."""
    module = build(prefix=prefix, num_landmarks=24, pinv_iterations=30, exact_fallback=False, conv_kernel=0)
    assert not module.exact
    x = tokens(prefix + 24)
    Q, K, _ = module.qkv(x).unflatten(-1, (3, HEADS, d)).permute(2, 0, 3, 1, 4)
    assert torch.linalg.cond((Q @ K.mT / d**0.5).softmax(-1)).max() < 1e6
    torch.testing.assert_close(module(x), by_hand(module, x), atol=1e-9, rtol=0)


def test_of_tokens_equal_within_cells_it_is_softmax() -> None:
    """Where every cell of the landmark grid holds one repeated token, the landmarks lose nothing."""
    coarse = torch.randn(2, DIM, 3, 2, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(coarse, scale_factor=2, mode="nearest").flatten(2).transpose(1, 2)
    module = build(num_landmarks=6, pinv_iterations=30, conv_kernel=0)
    torch.testing.assert_close(module(x), by_hand(module, x), atol=1e-9, rtol=0)


def softmax_rows(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def cell_means(x: Array, grid: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Mean of the tokens of each cell; a cell reaches from the floor of its start to the ceiling of its end."""
    means = []
    for r in range(cells[0]):
        for c in range(cells[1]):
            rows = range(grid[0] * r // cells[0], math.ceil(grid[0] * (r + 1) / cells[0]))
            columns = range(grid[1] * c // cells[1], math.ceil(grid[1] * (c + 1) / cells[1]))
            means.append(np.mean([x[i * grid[1] + j] for i in rows for j in columns], axis=0))
    return np.array(means)


def inverse_as_in_the_paper(A: Array, iterations: int) -> Array:
    Z, one = A.T / (np.linalg.norm(A, 1) * np.linalg.norm(A, np.inf)), np.eye(len(A))
    for _ in range(iterations):
        Z = Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z))) / 4
    return Z


def convolved(V: Array, kernel: Array, grid: tuple[int, int]) -> Array:
    """Each channel with its own kernel, as correlation, nothing beyond the border."""
    out, reach = np.zeros_like(V), kernel.shape[-1] // 2
    for i in range(grid[0]):
        for j in range(grid[1]):
            for u in range(-reach, reach + 1):
                for v in range(-reach, reach + 1):
                    if 0 <= i + u < grid[0] and 0 <= j + v < grid[1]:
                        out[i * grid[1] + j] += kernel[:, u + reach, v + reach] * V[(i + u) * grid[1] + j + v]
    return out


@pytest.mark.parametrize(
    ("grid", "prefix", "landmarks", "cells", "iterations"),
    [((6, 4), 0, 6, (3, 2), 6), ((7, 5), 2, 8, (3, 2), 6), ((5, 8), 1, 9, (2, 4), 12)],
)
def test_with_few_landmarks_it_is_the_papers_formula_head_by_head(
    grid: tuple[int, int], prefix: int, landmarks: int, cells: tuple[int, int], iterations: int
) -> None:
    module, x = (
        build(grid, prefix, num_landmarks=landmarks, pinv_iterations=iterations),
        tokens(prefix + math.prod(grid)),
    )
    weight, bias = module.qkv.weight.detach().numpy(), module.qkv.bias.detach().numpy()
    kernel = module.conv.weight.detach().numpy()[:, 0]
    expected = np.zeros(x.shape)
    for b in range(len(x)):
        q, k, v = np.split(x[b].numpy() @ weight.T + bias, 3, axis=1)
        for h in range(HEADS):
            own = slice(h * d, (h + 1) * d)
            Q, K, V = q[:, own], k[:, own], v[:, own]
            Qm, Km = (np.vstack([t[:prefix], cell_means(t[prefix:], grid, cells)]) for t in (Q, K))
            A = softmax_rows(Qm @ Km.T / d**0.5)
            factors = softmax_rows(Q @ Km.T / d**0.5) @ inverse_as_in_the_paper(A, iterations)
            expected[b, :, own] = factors @ softmax_rows(Qm @ K.T / d**0.5) @ V
            expected[b, prefix:, own] += convolved(V[prefix:], kernel[own], grid)
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.proj(torch.from_numpy(expected)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_it_falls_back_to_exact_attention_only_without_fewer_landmarks_than_tokens(prefix: int) -> None:
    module = build(prefix=prefix, num_landmarks=24, conv_kernel=0)
    x = tokens(prefix + 24)
    assert module.exact
    torch.testing.assert_close(module(x), by_hand(module, x))
    assert not build(prefix=prefix, num_landmarks=23).exact


def test_pseudo_inverse_is_that_of_linear_algebra() -> None:
    A = torch.rand(2, 3, 7, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(A, 30), torch.linalg.pinv(A), atol=1e-8, rtol=1e-8)


def test_each_matrix_starts_from_its_own_norm() -> None:
    A = torch.rand(2, 1, 5, 5).softmax(-1)
    A[1] *= 100
    torch.testing.assert_close(pseudo_inverse(A, 6)[0], pseudo_inverse(A[:1], 6)[0], rtol=0, atol=0)


def test_the_inverse_is_fp32_under_bf16_autocast() -> None:
    """From the same bf16 landmarks it differs from float64 by the rounding of the result alone; a bf16 iteration is
    off by several per cent."""
    Qm, Km, summary = (x.bfloat16() for x in torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = nystrom.solve(Qm, Km, summary, 6)
    exact = nystrom.solve(Qm.double(), Km.double(), summary.double(), 6)
    assert rounded.dtype == torch.bfloat16
    assert exact.dtype == torch.double
    assert (rounded - exact).norm() < 2**-8 * exact.norm()


def test_the_inverse_stays_fp32_when_it_is_recomputed_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def spy(A: Tensor, iterations: int) -> Tensor:
        Z = pseudo_inverse(A, iterations)
        seen.extend([A.dtype, Z.dtype])
        return Z

    monkeypatch.setattr(nystrom, "pseudo_inverse", spy)
    module = build(num_landmarks=6).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(tokens(24).float())
    out.sum().backward()
    assert seen == [torch.float32] * 4


def test_convolution_of_the_values_is_laid_out_on_the_grid() -> None:
    """A kernel that shifts by one row adds the value of the token above, and nothing to prefix tokens."""
    module = build(prefix=2, num_landmarks=6)
    V = torch.randn(1, HEADS, 26, d, dtype=torch.double)
    with torch.no_grad():
        module.conv.weight.zero_()
        module.conv.weight[:, 0, 0, 1] = 1
        shifted = module.add_skip(torch.zeros_like(V), V)
    expected = torch.zeros_like(V)
    expected[:, :, 2 + 4 :] = V[:, :, 2:-4]
    torch.testing.assert_close(shifted, expected)


@pytest.mark.parametrize(("length", "cells"), [(12, 4), (7, 3), (5, 5), (9, 1), (4, 3)])
def test_cells_cover_the_line_and_share_a_place_where_it_does_not_divide(length: int, cells: int) -> None:
    ends = [(length * c // cells, -(-length * (c + 1) // cells)) for c in range(cells)]
    expected = [[float(a <= place < b) for place in range(length)] for a, b in ends]
    assert cells_of(length, cells).tolist() == expected


@pytest.mark.parametrize(
    ("grid", "landmarks", "expected"),
    [
        ((28, 28), 64, (8, 8)),
        ((16, 8), 32, (8, 4)),
        ((4, 4), 64, (4, 4)),
        ((1, 50), 10, (1, 10)),
        ((50, 1), 10, (10, 1)),
    ],
)
def test_landmark_grid_has_the_shape_of_the_token_grid(
    grid: tuple[int, int], landmarks: int, expected: tuple[int, int]
) -> None:
    assert landmark_grid(grid, landmarks) == expected


def test_landmark_grid_never_exceeds_what_was_asked_and_is_the_grid_only_when_there_is_a_landmark_a_token() -> None:
    for height in range(1, 20):
        for width in range(1, 20):
            for landmarks in range(1, 70):
                rows, columns = landmark_grid((height, width), landmarks)
                assert 1 <= rows <= height
                assert 1 <= columns <= width
                assert rows * columns <= landmarks
                assert ((rows, columns) == (height, width)) == (landmarks >= height * width)


@pytest.mark.parametrize(
    "options", [{"num_landmarks": 0}, {"pinv_iterations": 0}, {"conv_kernel": 2}, {"conv_kernel": -1}]
)
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_attention("nystrom", DIM, HEADS, GRID, **options)
