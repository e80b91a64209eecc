"""Attention in windows against full attention under a mask that brute force draws from the tokens' places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from miram.pretrain.attention import build_attention
from miram.pretrain.attention.window import WindowAttention, runs

DIM, HEADS = 24, 3
d = DIM // HEADS


def window_of(place: int, length: int, window: int, shift: bool) -> int:
    """Number of the window that a place on a line falls into."""
    count = next(k for k in range(1, length + 1) if k * window >= length)
    side = next(s for s in range(1, length + 1) if s * count >= length)
    offset = side - side // 2 if shift and count > 1 and side > 1 else 0
    return (place + offset) // side


def may_look(grid: tuple[int, int], prefix: int, window: int, shift: bool) -> Tensor:
    """(N, N): prefix tokens see and are seen by all, others by their window."""
    places = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    homes = [tuple(window_of(x, n, window, shift) for x, n in zip(place, grid, strict=True)) for place in places]
    mask = torch.ones(prefix + len(homes), prefix + len(homes), dtype=torch.bool)
    for a, home in enumerate(homes):
        for b, other in enumerate(homes):
            mask[prefix + a, prefix + b] = home == other
    return mask


def masked(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    B, N, _ = x.shape
    Q, K, V = (part.reshape(B, N, HEADS, d) for part in module.qkv(x).chunk(3, dim=-1))  # type: ignore[operator]
    logits = torch.einsum("bnhd,bmhd->bhnm", Q, K) / d**0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return module.proj(torch.einsum("bhnm,bmhd->bnhd", weights, V).reshape(B, N, DIM))  # type: ignore[operator]


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"), [((8, 8), 4), ((4, 8), 4), ((7, 9), 4), ((5, 11), 3), ((6, 6), 1), ((3, 10), 4), ((1, 7), 2)]
)
def test_it_is_softmax_under_a_mask(grid: tuple[int, int], window: int, shift: bool, prefix: int) -> None:
    module = build_attention("window", DIM, HEADS, grid, prefix, window=window, shift=shift).double()
    x = torch.randn(2, prefix + grid[0] * grid[1], DIM, dtype=torch.double)
    expected = masked(module, x, may_look(grid, prefix, window, shift))
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("shift", [False, True])
def test_one_window_is_softmax(shift: bool, prefix: int) -> None:
    module = build_attention("window", DIM, HEADS, (6, 5), prefix, window=6, shift=shift).double()
    softmax = build_attention("softmax", DIM, HEADS, (6, 5), prefix).double()
    softmax.load_state_dict(module.state_dict())
    x = torch.randn(2, prefix + 30, DIM, dtype=torch.double)
    torch.testing.assert_close(module(x), softmax(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("length", "window", "shift", "sides"),
    [
        (14, 4, False, [4, 4, 4, 2]),
        (14, 4, True, [2, 4, 4, 4]),
        (14, 8, False, [7, 7]),
        (14, 8, True, [3, 7, 4]),
        (128, 8, False, [8] * 16),
        (128, 8, True, [4] + [8] * 15 + [4]),
        (8, 8, True, [8]),
        (5, 1, True, [1] * 5),
        (1, 8, False, [1]),
    ],
)
def test_windows_of_a_line(length: int, window: int, shift: bool, sides: list[int]) -> None:
    assert [run.side for run in runs(length, window, shift) for _ in range(run.number)] == sides


def test_windows_tile_every_line_and_are_never_larger_than_asked() -> None:
    for length in range(1, 60):
        for window in range(1, 20):
            for shift in (False, True):
                place = 0
                for run in runs(length, window, shift):
                    assert run.start == place
                    assert 1 <= run.side <= window
                    place = run.stop
                assert place == length


def test_blocks_take_turns() -> None:
    assert [WindowAttention.options_of_block(index)["shift"] for index in range(4)] == [False, True, False, True]


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        build_attention("window", DIM, HEADS, (4, 4), window=0)
