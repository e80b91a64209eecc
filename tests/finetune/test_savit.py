"""SAViT's parts against loops written out, and the backbone against its closed form and on phantoms."""

from __future__ import annotations

import copy
from math import ceil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miram.data.phantom import PhantomSettings, records
from miram.engine.errors import UserError
from miram.finetune.savit import (
    CrossAttention,
    LowRankAttention,
    MixPool,
    Regions,
    SAViT,
    SharedPrior,
    expected,
    savit_base,
    savit_small,
)
from miram.finetune.savit.mixpool import centres, mixed
from miram.finetune.savit.prior import momenta


def tiny(seed: int = 0, **options: object) -> SAViT:
    """5 x 4 tokens, so that regions overlap; random weights also where training starts at zero."""
    torch.manual_seed(seed)
    model = SAViT((40, 32), 1, 16, 3, 2, patch_size=8, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 40, 32, generator=torch.Generator().manual_seed(1))


def nothing(x: Tensor, places: Tensor) -> Tensor:
    return x


# ---------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_regions_are_of_one_size_cover_the_grid_and_put_back_are_what_was_cut(K: int) -> None:
    for height in range(K, 13):
        for width in range(K, 9):
            regions = Regions((height, width), K)
            x = torch.randn(2, height, width, 3)
            parts = regions.cut(x)
            assert len(parts) == K * K
            assert {tuple(part.shape[1:3]) for part in parts} == {(ceil(height / K), ceil(width / K))}
            torch.testing.assert_close(regions.put_back(parts), x)


def test_regions_of_7_by_5_are_those_drawn_by_hand_in_raster_order() -> None:
    windows = [(r.start, r.stop, c.start, c.stop) for r, c in Regions((7, 5), 2).windows]
    assert windows == [(0, 4, 0, 3), (0, 4, 2, 5), (3, 7, 0, 3), (3, 7, 2, 5)]


def test_regions_that_overlap_are_spread_evenly() -> None:
    assert [c.start for _, c in Regions((10, 10), 4).windows[:4]] == [0, 2, 5, 7]  # round(i 7 / 3)


def test_regions_whose_side_divides_do_not_overlap() -> None:
    starts = [(r.start, c.start) for r, c in Regions((14, 14), 2).windows]
    assert starts == [(0, 0), (0, 7), (7, 0), (7, 7)]


def test_where_regions_overlap_the_mean_is_put_back() -> None:
    regions = Regions((3, 2), 2)  # rows 0-1 and 1-2 (the start 0.5 + 0.5 is halves up), columns 0 and 1
    parts = [torch.full((1, 2, 1, 1), float(value)) for value in (1, 2, 5, 8)]
    assert regions.put_back(parts)[0, ..., 0].tolist() == [[1, 2], [3, 5], [5, 8]]


def test_a_grid_with_fewer_rows_than_regions_is_refused() -> None:
    with pytest.raises(UserError, match=r"2 x 9 tokens cannot be cut into 3 x 3"):
        Regions((2, 9), 3)


# ---------------------------------------------------------------------------------------------- shared prior


def test_momenta_are_half_a_cosine_from_5_to_9_tenths() -> None:
    assert momenta(4) == pytest.approx([0.5, 0.7, 0.9])
    nine = momenta(9)
    assert (nine[0], nine[-1]) == pytest.approx((0.5, 0.9))
    assert nine[2] == pytest.approx(0.9 - 0.4 * (1 + torch.cos(torch.tensor(2 * torch.pi / 7)).item()) / 2)


def test_the_recursion_is_the_one_of_four_regions_written_out() -> None:
    torch.manual_seed(0)
    prior, block = SharedPrior(6), nn.Linear(6, 6)
    x = torch.randn(2, 4, 6, 6)
    Z1, Z2, Z3, Z4 = x[:, :2, :3], x[:, :2, 3:], x[:, 2:, :3], x[:, 2:, 3:]

    def through(z: Tensor) -> Tensor:
        return F.layer_norm(torch.tanh(z @ block.weight.T + block.bias), (6,), eps=1e-6)

    Y1 = through(Z1)
    Y2 = through((Z2 + Y1) / 2)
    AP3 = 0.7 * Y1 + 0.3 * Y2
    Y3 = through((Z3 + AP3) / 2)
    AP4 = 0.9 * AP3 + 0.1 * Y3
    Y4 = through((Z4 + AP4) / 2)
    by_hand = torch.cat([torch.cat([Y1, Y2], 2), torch.cat([Y3, Y4], 2)], 1)
    torch.testing.assert_close(prior(x, lambda z, _: torch.tanh(block(z))), by_hand)


def test_blocks_are_told_where_each_region_lies_on_the_grid() -> None:
    seen: list[list[int]] = []

    def blocks(x: Tensor, places: Tensor) -> Tensor:
        seen.append(places[0].tolist())
        return x

    SharedPrior(2)(torch.zeros(1, 3, 4, 2), blocks)
    assert seen == [[0, 1, 4, 5], [2, 3, 6, 7], [4, 5, 8, 9], [6, 7, 10, 11]]


def test_nothing_flows_back_through_the_first_prompt_but_its_value_is_in_every_later_region() -> None:
    prior = SharedPrior(1)
    prior.norm = nn.Identity()  # type: ignore[assignment]
    x = torch.arange(1.0, 5).view(1, 2, 2, 1).requires_grad_()
    _, y2, y3, y4 = prior(x, nothing).flatten()

    def back(y: Tensor) -> list[float]:
        return torch.autograd.grad(y, x, retain_graph=True)[0].flatten().tolist()

    # AP_2 = .5 sg(Z_1) + .5 Z_1: the value is Z_1, half of it flows back, and half of that through the fusion.
    assert y2.item() == (2 + 1) / 2
    assert back(y2) == pytest.approx([0.25, 0.5, 0, 0])
    # AP_3 = .7 AP_2 + .3 Y_2
    assert y3.item() == pytest.approx((3 + 0.7 * 1 + 0.3 * 1.5) / 2)
    assert back(y3) == pytest.approx([(0.7 * 0.5 + 0.3 * 0.25) / 2, 0.3 * 0.5 / 2, 0.5, 0])
    assert prior(x + torch.tensor([1.0, 0, 0, 0]).view(1, 2, 2, 1), nothing).flatten()[3] > y4


def test_with_all_of_the_momentum_on_the_first_prompt_no_gradient_reaches_the_first_region_from_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("miram.finetune.savit.prior.momenta", lambda regions: [1.0] * (regions - 1))
    x = torch.randn(1, 4, 4, 8, requires_grad=True)
    SharedPrior(8)(x, nothing)[:, 2:].square().sum().backward()
    assert x.grad is not None
    assert x.grad[:, :2].abs().max() == 0
    assert x.grad[:, 2:].abs().max() > 0


@pytest.mark.parametrize("residual", [False, True])
def test_cross_attention_asks_with_the_region_itself(residual: bool) -> None:
    torch.manual_seed(0)
    fuse = CrossAttention(8, 2, residual)
    z, prompt = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    Q, AP = z.reshape(2, 6, 8), prompt.reshape(2, 6, 8)
    K, V = AP @ fuse.k.weight.T + fuse.k.bias, AP @ fuse.v.weight.T + fuse.v.bias
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = Q[..., h] @ K[..., h].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ V[..., h])
    out = (torch.cat(heads, -1) @ fuse.proj.weight.T + fuse.proj.bias).reshape(z.shape)
    torch.testing.assert_close(fuse(z, prompt), out + z if residual else out)


# ---------------------------------------------------------------------------------------------- MixPool


def pooled_by_hand(x: Tensor, size: tuple[int, int]) -> Tensor:
    H, W, D = x.shape
    mix = torch.zeros(H, W, D)
    for r in range(H):
        for c in range(W):
            near = [x[max(r - k, 0) : r + k + 1, max(c - k, 0) : c + k + 1].mean((0, 1)) for k in (1, 2)]
            mix[r, c] = (near[0] + near[1] + x.mean((0, 1))) / 3
    out = torch.zeros(*size, D)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * H // size[0], ceil((i + 1) * H / size[0]))
            columns = slice(j * W // size[1], ceil((j + 1) * W / size[1]))
            out[i, j] = mix[rows, columns].mean((0, 1))
    return out


@pytest.mark.parametrize("grid", [(7, 7), (6, 4), (5, 9)])
def test_mixpool_is_three_windows_averaged_by_hand(grid: tuple[int, int]) -> None:
    x, size = torch.randn(2, *grid, 3), Regions(grid, 2).size
    torch.testing.assert_close(mixed(x, size), torch.stack([pooled_by_hand(one, size) for one in x]))
    module = MixPool(3)
    out = module(x, lambda tokens, _: 2 * tokens.sin())
    token = F.layer_norm(2 * mixed(x, size).sin(), (3,), eps=1e-6)
    torch.testing.assert_close(out, token.mean((1, 2)))


def test_mixpool_is_no_multiple_of_the_mean_where_the_released_one_is() -> None:
    regions = torch.randn(50, 1, 2, 2)  # one token of each of 2 x 2 regions, as the released code pools them
    pools = [
        F.adaptive_avg_pool2d(regions, 2),
        F.avg_pool2d(regions, 3, 1, 1, count_include_pad=True),
        F.avg_pool2d(regions, 5, 1, 2, count_include_pad=True),
    ]
    released = sum(pool.mean((2, 3)) for pool in pools) / regions.mean((2, 3))
    torch.testing.assert_close(released, torch.full_like(released, 1 + 4 / 9 + 4 / 25), rtol=1e-3, atol=1e-3)

    x = torch.randn(50, 8, 8, 1)
    ratio = mixed(x, (4, 4)) / x.mean((1, 2), keepdim=True)
    assert (ratio.std((1, 2)) > 0.1).all()


@pytest.mark.parametrize("windows", [(3,), (5,), (3, 3), (5, 5), ()])
def test_every_scale_of_mixpool_changes_what_comes_out(
    windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, module = torch.randn(2, 8, 8, 4), MixPool(4)
    before = module(x, nothing)
    monkeypatch.setattr("miram.finetune.savit.mixpool.WINDOWS", windows)
    assert (module(x, nothing) - before).abs().max() > 1e-2


def test_the_global_scale_of_mixpool_carries_what_no_window_reaches() -> None:
    x = torch.zeros(1, 16, 16, 1)
    x[0, 15, 15] = 768.0
    assert mixed(x, (8, 8))[0, 0, 0].item() == pytest.approx(768 / 256 / 3)


def test_a_pooled_token_lies_in_the_middle_of_the_cells_it_averages() -> None:
    grid = torch.arange(7 * 4.0).view(1, 7, 4, 1).permute(0, 3, 1, 2)
    exact = F.adaptive_avg_pool2d(grid // 4, (4, 2)).flatten(), F.adaptive_avg_pool2d(grid % 4, (4, 2)).flatten()
    places = centres((7, 4), (4, 2))[0]
    assert ((places // 4 - exact[0]).abs() <= 0.5).all()
    assert ((places % 4 - exact[1]).abs() <= 0.5).all()


# ---------------------------------------------------------------------------------------------- backbone


def test_low_rank_attention_is_softmax_of_narrow_heads_by_hand() -> None:
    torch.manual_seed(0)
    attention, x = LowRankAttention(16, 2, tau=4), torch.randn(3, 5, 16)
    assert attention.q.weight.shape == attention.k.weight.shape == (4, 16)
    q, k, v = (x @ part.weight.T + part.bias for part in (attention.q, attention.k, attention.v))
    heads = []
    for h in range(2):
        narrow, wide = slice(2 * h, 2 * h + 2), slice(8 * h, 8 * h + 8)
        scores = q[..., narrow] @ k[..., narrow].transpose(1, 2) / (8 / 4) ** 0.5
        heads.append(scores.softmax(-1) @ v[..., wide])
    out = torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), out)


def test_base_and_small_have_the_numbers_of_the_paper() -> None:
    with torch.device("meta"):
        base, small = savit_base(in_chans=3, num_classes=5), savit_small(in_chans=3, num_classes=5)
    assert sum(p.numel() for p in base.parameters()) == 590_592 + 150_528 + 11 * 6_201_984 + 1_771_776 + 4_608 + 3_845
    assert sum(p.numel() for p in base.parameters()) == expected(768, 11, 196, in_chans=3, num_classes=5) == 70_743_173
    assert sum(p.numel() for p in small.parameters()) == expected(384, 11, 196, in_chans=3, num_classes=5) == 17_898_053


@pytest.mark.parametrize("tau", [1, 2, 4])
def test_the_closed_form_holds_for_other_sizes(tau: int) -> None:
    model = SAViT((40, 32), 2, 32, 3, 4, tau=tau, patch_size=8, num_classes=3, K=3)
    count = sum(p.numel() for p in model.parameters())
    assert count == expected(32, 3, 20, in_chans=2, patch_size=8, tau=tau, num_classes=3)


def test_the_backbone_is_regions_then_mixpool_written_out() -> None:
    model, x = tiny(), images()
    grid = model.patch_embed.proj(x).permute(0, 2, 3, 1) + model.pos_embed
    first, second, last = model.blocks
    done: list[Tensor] = []
    for i, (rows, columns) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        z = grid[:, rows : rows + 3, columns : columns + 2].reshape(2, 6, 16)
        if i == 1:
            prompt = done[0]
        if i > 1:
            mu = (0.7, 0.9)[i - 2]
            prompt = mu * prompt + (1 - mu) * done[-1]
        fused = z if i == 0 else model.prior.fuse(z.view(2, 3, 2, 16), prompt.view(2, 3, 2, 16)).view(2, 6, 16)
        done.append(model.prior.norm(second(first(fused))))
    regions = [part.view(2, 3, 2, 16) for part in done]
    top, bottom = torch.cat(regions[:2], 2), torch.cat(regions[2:], 2)
    whole = torch.cat([top[:, :2], (top[:, 2:] + bottom[:, :1]) / 2, bottom[:, 1:]], 1)
    torch.testing.assert_close(model.forward_features(x), whole.flatten(1, 2))
    tokens = torch.stack([pooled_by_hand(one, (3, 2)) for one in whole.detach()]).flatten(1, 2)
    features = model.norm(model.mixpool.norm(last(tokens)).mean(1))
    torch.testing.assert_close(model(x), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_gradient_reaches_every_tensor(residual: bool) -> None:
    torch.manual_seed(0)
    model = SAViT((40, 32), 1, 16, 3, 2, patch_size=8, num_classes=2, residual=residual)
    F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    # A bias of keys adds the same to every score of a query, which softmax does not see.
    assert {name for name in still if not name.endswith("k.bias")} == set()


def test_checkpointing_gives_the_same_features_and_gradients() -> None:
    plain, x = tiny(), images()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model.train()
        model(x).square().sum().backward()
    assert torch.equal(plain(x), saving(x))
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_a_sample_does_not_depend_on_its_batch_and_a_copy_gives_the_same() -> None:
    model, x = tiny(), images(3)
    torch.testing.assert_close(copy.deepcopy(model)(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_bf16_stays_near_fp32() -> None:
    model, x = tiny(), images()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert (low.float() - model(x)).abs().max() < 0.1
    low.float().sum().backward()


def test_dropping_is_for_training_only() -> None:
    model, x = tiny(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.5), images()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (40, 30)}, "40 x 30 is not made of patches"),
        ({"embed_dim": 20}, "multiple of 4 and of num_heads x tau = 8"),
        ({"depth": 1}, "depth must be 2 or more"),
        ({"K": 6}, "cannot be cut into 6 x 6 regions"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    usual = {"image_size": (40, 32), "embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8}
    with pytest.raises(UserError, match=message):
        SAViT(**(usual | options))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- training


def films(first: int, patients: int) -> tuple[Tensor, Tensor]:
    """Four films of each patient, (n, 1, 80, 64), and whether they are oblique."""
    found = records(first + patients, PhantomSettings(size=80))[4 * first :]
    pixels = torch.stack([torch.from_numpy(r.read().pixels.astype("float32")) for r in found])
    return (pixels[:, None] / 4095 - 0.25) / 0.25, torch.tensor([int(r.view == "MLO") for r in found])


@pytest.mark.slow
def test_it_learns_from_scratch_which_view_a_phantom_of_unseen_patients_is() -> None:
    """100 steps, 192 films of 48 patients: accuracy .84 to .94 on the films of 48 others, over four seeds."""
    (x, y), (unseen, truth) = films(0, 48), films(48, 48)
    for seed in range(3):
        torch.manual_seed(seed)
        model = SAViT((80, 64), 1, 64, 3, 4, patch_size=16, num_classes=2)
        optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-4, total_steps=100)
        for _ in range(100):
            batch = torch.randperm(len(x))[:32]
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            accuracy = (model.eval()(unseen).argmax(1) == truth).float().mean().item()
        assert accuracy > 0.7, f"seed {seed}: {accuracy:.3f}"
