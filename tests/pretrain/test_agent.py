"""Agent attention against its two softmax products, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miram.pretrain.attention import build_attention

DIM, HEADS = 24, 3
d = DIM // HEADS


def written_out(module: torch.nn.Module, x: Tensor, prefix: int, agents: list[list[int]]) -> Tensor:
    """softmax(Q A^T) softmax(A K^T) V; `agents` lists the grid tokens that each agent averages."""
    B, N, _ = x.shape
    Q, K, V = (part.reshape(B, N, HEADS, d) for part in module.qkv(x).chunk(3, dim=-1))  # type: ignore[operator]
    own = [Q[:, i] for i in range(prefix)]
    A = torch.stack(own + [torch.stack([Q[:, prefix + i] for i in cell]).mean(0) for cell in agents], dim=1)
    gather = torch.softmax(torch.einsum("bahd,bnhd->bhan", A, K) / d**0.5, dim=-1)
    broadcast = torch.softmax(torch.einsum("bnhd,bahd->bhna", Q, A) / d**0.5, dim=-1)
    out = torch.einsum("bhna,bham,bmhd->bnhd", broadcast, gather, V).reshape(B, N, DIM)
    return module.proj(out)  # type: ignore[operator]


EVEN = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]  # 4 x 6
UNEVEN = [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]  # 3 x 3: cells share the middle


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("grid", "agents"), [((4, 6), EVEN), ((3, 3), UNEVEN), ((2, 3), [[i] for i in range(6)])])
def test_it_is_two_softmax_products(grid: tuple[int, int], agents: list[list[int]], prefix: int) -> None:
    module = build_attention("agent", DIM, HEADS, grid, prefix, num_agents=len(agents), conv_kernel=0).double()
    x = torch.randn(2, prefix + grid[0] * grid[1], DIM, dtype=torch.double)
    torch.testing.assert_close(module(x), written_out(module, x, prefix, agents), atol=1e-12, rtol=0)


def test_one_agent_gives_every_token_the_same() -> None:
    module = build_attention("agent", DIM, HEADS, (3, 4), num_agents=1, conv_kernel=0)
    out = module(torch.randn(1, 12, DIM))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_the_convolution_is_added_to_the_grid_and_not_to_prefix_tokens() -> None:
    module = build_attention("agent", DIM, HEADS, (4, 6), 2, num_agents=6).double()
    x = torch.randn(1, 26, DIM, dtype=torch.double)
    V = module.qkv(x)[0, :, 2 * DIM :]
    with torch.no_grad():
        kernel = module.conv.weight.clone()
        module.conv.weight.zero_()
        bare = module(x)
        module.conv.weight.copy_(kernel)
        added = torch.linalg.solve(module.proj.weight, (module(x) - bare)[0].T).T
    assert added[:2].abs().max() < 1e-10
    picture = V[2:].T.reshape(1, DIM, 4, 6)
    expected = torch.nn.functional.conv2d(picture, kernel, padding=1, groups=DIM).reshape(DIM, 24).T
    torch.testing.assert_close(added[2:], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("options", [{"num_agents": 0}, {"conv_kernel": 2}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_attention("agent", DIM, HEADS, (4, 4), **options)
