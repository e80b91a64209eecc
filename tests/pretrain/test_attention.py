"""Attention variants against closed forms that they never get to by a fallback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miram.pretrain.attention import ATTENTIONS, build_attention
from miram.pretrain.attention.nystrom import NystromAttention, landmark_grid, pseudo_inverse

DIM, HEADS, GRID = 32, 4, (6, 4)
VARIANTS = [("softmax", {}), ("softmax", {"backend": "eager"}), ("nystrom", {"num_landmarks": 6})]


def tokens(prefix: int = 0, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, prefix + 24, DIM, generator=torch.Generator().manual_seed(seed))


def by_hand(module: nn.Module, x: Tensor) -> Tensor:
    """Softmax attention written out with the module's own projections."""
    B, N, D = x.shape
    Q, K, V = (part.reshape(B, N, HEADS, D // HEADS) for part in module.qkv(x).chunk(3, dim=-1))  # type: ignore[operator]
    weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", Q, K) / (D // HEADS) ** 0.5, dim=-1)
    return module.proj(torch.einsum("bhnm,bmhd->bnhd", weights, V).reshape(B, N, D))  # type: ignore[operator]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_softmax_is_attention_by_hand(backend: str) -> None:
    module = build_attention("softmax", DIM, HEADS, GRID, backend=backend)
    torch.testing.assert_close(module(tokens()), by_hand(module, tokens()))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_nystrom_with_every_token_a_landmark_is_softmax(prefix: int) -> None:
    options = {"num_landmarks": 24, "pinv_iterations": 40, "exact_fallback": False, "conv_kernel": 0}
    module = build_attention("nystrom", DIM, HEADS, GRID, prefix, **options).double()
    assert not module.exact
    x = tokens(prefix).double()
    torch.testing.assert_close(module(x), by_hand(module, x), atol=1e-8, rtol=1e-6)


def test_nystrom_falls_back_to_exact_attention_only_without_fewer_landmarks() -> None:
    assert build_attention("nystrom", DIM, HEADS, GRID, num_landmarks=24, conv_kernel=0).exact
    assert not build_attention("nystrom", DIM, HEADS, GRID, num_landmarks=23).exact


def test_nystrom_of_tokens_equal_within_cells_is_softmax() -> None:
    """Where every cell of the landmark grid holds one repeated token, the landmarks lose nothing."""
    coarse = torch.randn(2, DIM, 3, 2, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(coarse, scale_factor=2, mode="nearest").flatten(2).transpose(1, 2)
    options = {"num_landmarks": 6, "pinv_iterations": 40, "conv_kernel": 0}
    module = build_attention("nystrom", DIM, HEADS, GRID, **options).double()
    torch.testing.assert_close(module(x), by_hand(module, x), atol=1e-8, rtol=1e-6)


def test_convolution_of_the_values_is_laid_out_on_the_grid() -> None:
    """A kernel that shifts by one row adds the value of the token above, and nothing to prefix tokens."""
    module = build_attention("nystrom", DIM, HEADS, GRID, 2, num_landmarks=6)
    assert isinstance(module, NystromAttention)
    V = torch.randn(1, HEADS, 26, DIM // HEADS)
    with torch.no_grad():
        module.conv.weight.zero_()
        module.conv.weight[:, 0, 0, 1] = 1
        shifted = module.skip(V)
    expected = torch.zeros_like(V)
    expected[:, :, 2 + 4 :] = V[:, :, 2:-4]
    torch.testing.assert_close(shifted, expected)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_sample_never_depends_on_its_batch(name: str, options: dict[str, object]) -> None:
    module, x = build_attention(name, DIM, HEADS, GRID, 1, **options).eval(), tokens(1)
    loud = x.clone()
    loud[1] *= 6
    torch.testing.assert_close(module(loud)[0], module(x)[0])
    torch.testing.assert_close(module(x[:1])[0], module(x)[0])


def test_weights_move_between_variants() -> None:
    softmax, nystrom = (build_attention(name, DIM, HEADS, GRID) for name in ("softmax", "nystrom"))
    missing, unexpected = nystrom.load_state_dict(softmax.state_dict(), strict=False)
    assert unexpected == []
    assert missing == ["conv.weight"]


def test_pseudo_inverse_is_that_of_linear_algebra() -> None:
    A = torch.rand(2, 3, 7, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(A, 60), torch.linalg.pinv(A), atol=1e-8, rtol=1e-6)


def test_each_matrix_starts_from_its_own_norm() -> None:
    A = torch.rand(2, 1, 5, 5).softmax(-1)
    A[1] *= 100
    torch.testing.assert_close(pseudo_inverse(A, 6)[0], pseudo_inverse(A[:1], 6)[0], rtol=0, atol=0)


def test_gradient_of_the_recomputed_iteration_is_right() -> None:
    module = build_attention("nystrom", 8, 2, (4, 4), 1, num_landmarks=4).double()
    x = torch.randn(1, 17, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), atol=1e-5)


def test_bf16_autocast_stays_close_because_the_inverse_is_fp32() -> None:
    module = build_attention("nystrom", DIM, HEADS, GRID, num_landmarks=6)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(tokens())
    assert (half.float() - module(tokens())).norm() / module(tokens()).norm() < 0.02


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


def test_landmark_grid_never_exceeds_what_was_asked() -> None:
    for height in range(1, 20):
        for width in range(1, 20):
            for landmarks in range(1, 70):
                rows, columns = landmark_grid((height, width), landmarks)
                assert 1 <= rows <= height
                assert 1 <= columns <= width
                assert rows * columns <= landmarks


def test_unknown_name_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="softmax"):
        build_attention("sofmax", DIM, HEADS, GRID)
    for name in ATTENTIONS:
        with pytest.raises(ValueError, match="multiple of 5"):
            build_attention(name, DIM, 5, GRID)
