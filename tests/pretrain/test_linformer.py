"""Linformer: softmax where E is the identity, a coarser grid where E averages, and E moved between grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from miram.pretrain.attention import build_attention
from miram.pretrain.attention.linformer import LinformerAttention, cell_means, resize

DIM, HEADS, GRID = 32, 4, (6, 4)
SHARING = ["headwise", "key_value", "none"]


def build(prefix: int = 0, grid: tuple[int, int] = GRID, **options: object) -> LinformerAttention:
    torch.manual_seed(0)
    module = build_attention("linformer", DIM, HEADS, grid, prefix, **options)
    assert isinstance(module, LinformerAttention)
    return module


def projections(module: LinformerAttention) -> list[nn.Parameter]:
    return [module.E] if module.F is None else [module.E, module.F]


def trained(module: LinformerAttention) -> LinformerAttention:
    """E and F away from their start, and from each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in projections(module):
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def heads_of(module: nn.Module, x: Tensor) -> list[Tensor]:
    B, N, D = x.shape
    return [part.reshape(B, N, HEADS, D // HEADS) for part in module.qkv(x).chunk(3, dim=-1)]  # type: ignore[operator]


def by_hand(module: LinformerAttention, x: Tensor) -> Tensor:
    """Eq. 7 of the paper, head by head, prefix tokens kept."""
    Q, K, V = heads_of(module, x)
    prefix, out = module.prefix_tokens, []
    for head in range(HEADS):
        E, F_ = (weight[head if len(weight) > 1 else 0].flatten(1) for weight in (projections(module) * 2)[:2])
        q, k, v = (part[:, :, head] for part in (Q, K, V))
        k = torch.cat([k[:, :prefix], torch.einsum("kn,bnd->bkd", E, k[:, prefix:])], dim=1)
        v = torch.cat([v[:, :prefix], torch.einsum("kn,bnd->bkd", F_, v[:, prefix:])], dim=1)
        out.append(torch.softmax(q @ k.mT / (DIM // HEADS) ** 0.5, -1) @ v)
    return module.proj(torch.cat(out, dim=-1))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_identity_projections_give_softmax(prefix: int, sharing: str) -> None:
    module = build(prefix, num_projected=24, sharing=sharing).double()
    with torch.no_grad():
        for weight in projections(module):
            weight.copy_(torch.eye(24).reshape(24, *GRID).expand_as(weight))
    exact = build_attention("softmax", DIM, HEADS, GRID, prefix, backend="eager").double()
    missing, unexpected = exact.load_state_dict(module.state_dict(), strict=False)
    assert missing == []
    assert set(unexpected) <= {"E", "F"}
    x = normal(3, prefix + 24, DIM)
    torch.testing.assert_close(module(x), exact(x), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("prefix", [0, 2])
def test_it_is_the_papers_formula(prefix: int, sharing: str) -> None:
    module = trained(build(prefix, num_projected=7, sharing=sharing)).double()
    x = normal(3, prefix + 24, DIM)
    torch.testing.assert_close(module(x), by_hand(module, x), atol=1e-13, rtol=1e-12)


def test_sharing_is_what_it_says() -> None:
    shapes = {
        sharing: {name: tuple(p.shape) for name, p in build(num_projected=7, sharing=sharing).named_parameters()}
        for sharing in SHARING
    }
    assert shapes["headwise"]["E"] == shapes["headwise"]["F"] == (1, 7, 6, 4)
    assert shapes["key_value"]["E"] == (1, 7, 6, 4)
    assert "F" not in shapes["key_value"]
    assert shapes["none"]["E"] == shapes["none"]["F"] == (HEADS, 7, 6, 4)


def test_at_the_start_it_attends_to_the_pooled_grid() -> None:
    module = build(num_projected=6).double()
    x = normal(2, 24, DIM)
    Q, K, V = (part.transpose(1, 2) for part in heads_of(module, x))
    pooled = [
        F.avg_pool2d(part.mT.reshape(2 * HEADS, DIM // HEADS, *GRID), 2).reshape(2, HEADS, DIM // HEADS, 6).mT
        for part in (K, V)
    ]
    expected = torch.softmax(Q @ pooled[0].mT / (DIM // HEADS) ** 0.5, -1) @ pooled[1]
    torch.testing.assert_close(module(x), module.proj(expected.transpose(1, 2).reshape(2, 24, DIM)))


def test_cells_tile_every_grid_and_number_k() -> None:
    """Every token in exactly one cell; every row a mean over a rectangle of nearly the same size."""
    for height in range(1, 9):
        for width in range(1, 9):
            for k in range(1, height * width + 1):
                means = cell_means((height, width), k)
                cells = (means > 0).sum((1, 2))
                assert means.shape == (k, height, width)
                assert torch.equal((means > 0).sum(0), torch.ones(height, width, dtype=torch.long))
                torch.testing.assert_close(means.sum((1, 2)), torch.ones(k))
                torch.testing.assert_close(means.amax((1, 2)), 1 / cells)
    torch.testing.assert_close(cell_means((4, 3), 12).flatten(1), torch.eye(12))


def test_cells_are_as_square_as_they_can_be() -> None:
    for grid, k in [((28, 28), 49), ((28, 14), 98), ((56, 28), 32), ((16, 16), 256)]:
        for cell in cell_means(grid, k) > 0:
            assert int(cell.any(1).sum()) == int(cell.any(0).sum())


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_sample_never_depends_on_its_batch(prefix: int, sharing: str) -> None:
    module, x = trained(build(prefix, num_projected=7, sharing=sharing)), normal(3, prefix + 24, DIM).float()
    loud = x.clone()
    loud[1] *= 60
    torch.testing.assert_close(module(loud)[0], module(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(module(x[:1])[0], module(x)[0])


@pytest.mark.parametrize("sharing", SHARING)
def test_gradients_are_right(sharing: str) -> None:
    torch.manual_seed(0)
    module = build_attention("linformer", 8, 2, (3, 2), 1, num_projected=4, sharing=sharing).double()
    assert isinstance(module, LinformerAttention)
    weights = projections(trained(module))

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return module(x)

    assert torch.autograd.gradcheck(run, (normal(2, 7, 8).requires_grad_(), *weights))


def test_bf16_autocast_stays_close() -> None:
    module, x = trained(build(1, num_projected=7)), normal(3, 25, DIM).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - module(x)).norm() / module(x).norm() < 0.02


def test_recomputed_and_compiled_it_is_the_same() -> None:
    module, x = trained(build(1, num_projected=7, sharing="none")), normal(2, 25, DIM).float().requires_grad_()
    expected = module(x)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    for other in (
        checkpoint(module, x, use_reentrant=False),
        torch.compile(module, backend="aot_eager", fullgraph=True)(x),
    ):
        torch.testing.assert_close(other, expected)
        torch.testing.assert_close(torch.autograd.grad(other.square().sum(), x)[0], grad)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("grid", [(12, 8), (9, 7), (3, 4), (6, 5)])
def test_weights_of_another_grid_are_resized_with_their_sums(grid: tuple[int, int], sharing: str) -> None:
    saved = trained(build(num_projected=7, sharing=sharing)).state_dict()
    before = {name: value.clone() for name, value in saved.items()}
    module = build(grid=grid, num_projected=7, sharing=sharing)
    module.load_state_dict(saved)
    for mine, name in zip(projections(module), ("E", "F"), strict=False):
        assert mine.shape[-2:] == grid
        torch.testing.assert_close(mine.sum((-1, -2)), before[name].sum((-1, -2)))
    assert all(torch.equal(saved[name], value) for name, value in before.items())


def test_same_grid_loads_bit_by_bit() -> None:
    saved = trained(build(num_projected=7)).state_dict()
    module = build(num_projected=7)
    module.load_state_dict(saved)
    assert torch.equal(module.E, saved["E"])


def test_doubling_the_grid_is_torchs_bilinear_enlargement() -> None:
    E = normal(2, 5, 6, 4)
    torch.testing.assert_close(resize(E, (12, 8)), F.interpolate(E, (12, 8), mode="bilinear") / 4)


def test_rows_and_columns_are_not_mixed_up() -> None:
    E = torch.zeros(1, 1, 6, 4)
    E[0, 0, 4, 1] = 1
    peak = resize(E, (18, 4))[0, 0]
    assert divmod(int(peak.argmax()), 4) == (13, 1)
    assert float(peak[:, [0, 2, 3]].abs().max()) == 0


def test_an_enlarged_image_attends_to_the_same_keys() -> None:
    """A token field linear in both directions, sampled twice as finely: keys and values of inner cells agree."""
    small, large = build(num_projected=6), build(grid=(12, 8), num_projected=6)
    large.load_state_dict(small.state_dict())

    def field(height: int, width: int) -> Tensor:
        y, x = (torch.arange(n, dtype=torch.float) + 0.5 for n in (height, width))
        ramp = 2 * y[:, None] / height + 3 * x[None] / width
        return ramp.reshape(1, 1, -1, 1).expand(1, HEADS, -1, DIM // HEADS)

    near, far = small.project(small.E, field(6, 4)), large.project(large.E, field(12, 8))
    # A weight at the grid's edge has nowhere outside to spread to and moves inwards by a quarter of a coarse token.
    torch.testing.assert_close(far, near, atol=0.25 * (2 / 6 + 3 / 4) / 2, rtol=0)
    torch.testing.assert_close(far[:, :, 2:4].mean(2), near[:, :, 2:4].mean(2))


def test_other_numbers_of_rows_are_refused_in_words() -> None:
    saved = build(num_projected=7).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for E"):
        build(grid=(12, 8), num_projected=8).load_state_dict(saved)


def test_more_rows_than_tokens_are_cut() -> None:
    assert build(num_projected=1000).E.shape == (1, 24, *GRID)


@pytest.mark.parametrize("options", [{"num_projected": 0}, {"sharing": "layerwise"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build(**options)


def test_nothing_of_tokens_times_rows_is_kept() -> None:
    """Q, K, V, the output, a normaliser a query, and the projected keys and values; E itself is a parameter."""
    B, N, d, k = 2, 56 * 56, DIM // HEADS, 64
    module = build(grid=(56, 56), num_projected=k, sharing="none")
    qkv = torch.randn(B, N, 3, HEADS, d, requires_grad=True)
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        module.mix(*(qkv * 1).permute(2, 0, 3, 1, 4))
    parameters = sum(p.nbytes for p in projections(module))
    assert sum(kept.values()) - parameters <= 4 * (B * HEADS * (N * (4 * d + 1) + 4 * k * d))
