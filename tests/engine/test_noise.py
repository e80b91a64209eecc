"""A sample's masks are its own: whatever batch it is in, and as random as torch's."""

from __future__ import annotations

from copy import deepcopy
from math import sqrt
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from scipy.stats import chi2, chisquare
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from miram.engine.errors import UserError
from miram.engine.noise import Noise, SeededDropout, draw, mix, per_sample


class Model(nn.Module):
    """Drops by two modules."""

    def __init__(self, one: nn.Module, other: nn.Module | None = None):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def masks(module: nn.Module, seed: int, positions: Tensor | list[int], *shape: int, name: str = "one") -> Tensor:
    """What is kept of `shape`, one sample a row, by a module of that name."""
    model = nn.ModuleDict({name: module})
    per_sample(model).set(seed, torch.as_tensor(positions))
    return model[name](torch.ones(shape)) != 0


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors of independent draws."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1]) * sqrt(a.numel())


def tiny(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    """A narrow ViT in fp64, training; each sample of a batch on its own is equal to rounding."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.create_model(name, **shape | options).double().train()


EVERYTHING = {
    "drop_path_rate": 0.4,
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.3,
    "pos_drop_rate": 0.1,
    "drop_rate": 0.1,
}
EVA = "eva02_tiny_patch14_224"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- the draws


def lowbias32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """As its author writes it, in unsigned arithmetic."""
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * np.uint32(0x846CA68B)
    return x ^ x >> 16


def test_hash_is_lowbias32_in_unsigned_arithmetic() -> None:
    x = np.random.default_rng(0).integers(2**32, size=100_000, dtype=np.uint32)
    assert (mix(torch.from_numpy(x.view(np.int32))).numpy().view(np.uint32) == lowbias32(x)).all()


def test_draws_are_the_hash_without_its_last_round_and_with_a_key_in_the_middle() -> None:
    keys = np.random.default_rng(0).integers(2**32, size=(2, 3), dtype=np.uint32)
    y = (lowbias32(np.arange(5000, dtype=np.uint32)) ^ keys[0, :, None]) * np.uint32(0x7FEB352D) ^ keys[1, :, None]
    expected = (y ^ y >> 15) * np.uint32(0x846CA68B)
    assert (draw(torch.from_numpy(keys.view(np.int32)), 5000).numpy().view(np.uint32) == expected).all()


def test_masks_are_what_they_always_were() -> None:
    kept = masks(nn.Dropout(0.5), 12345, [0, 7], 2, 24).int()
    assert ["".join(map(str, row)) for row in kept.tolist()] == GOLDEN


GOLDEN = ["111010011110110001001001", "111011010100110011010101"]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", [nn.Dropout, DropPath])
def test_kept_share_is_the_rate_within_four_standard_errors(kind: type[nn.Module], p: float) -> None:
    rows = 40_000 if kind is DropPath else 40
    kept = masks(kind(p), 1, torch.arange(rows), rows, *([1] if kind is DropPath else [30, 333]))
    assert abs(kept.double().mean() - (1 - p)) <= 4 * sqrt(p * (1 - p) / kept.numel())


def keys_of(seed: int, samples: int, modules: int = 1) -> Tensor:
    """(modules, 2, samples) keys."""
    noise = per_sample(nn.ModuleList(nn.Dropout(0.5) for _ in range(modules)))
    noise.set(seed, torch.arange(samples))
    assert noise.keys is not None
    return noise.keys


@pytest.mark.parametrize("shift", [24, 20, 16])
def test_draws_are_uniform(shift: int) -> None:
    byte = draw(keys_of(3, 64)[0], 20_000) >> shift & 255
    assert chisquare(byte.flatten().bincount(minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64, 192, 768, 1024, 4096])
def test_neighbours_are_drawn_independently(lag: int) -> None:
    top = (draw(keys_of(5, 32)[0], 40_000) >> 28) + 8
    pairs = top[:, lag:] * 16 + top[:, :-lag]  # overlapping pairs are dependent only if the draws are
    assert chisquare(pairs.flatten().bincount(minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize("over", ["samples", "modules", "seeds", "elements"])
def test_kept_counts_scatter_as_those_of_independent_draws(over: str) -> None:
    if over == "elements":  # one element over many samples
        kept = (draw(keys_of(7, 4000)[0], 500) > 0).T
    elif over == "samples":
        kept = draw(keys_of(7, 500)[0], 4000) > 0
    elif over == "modules":
        kept = torch.stack([draw(keys, 4000)[0] > 0 for keys in keys_of(7, 1, 500)])
    else:
        kept = torch.stack([draw(keys_of(seed, 1)[0], 4000)[0] > 0 for seed in range(500)])
    dispersion = float(((kept.double().sum(1) - 2000).square() / 1000).sum())  # chi-square of 500 degrees
    assert 1e-3 < chi2.sf(dispersion, 500) < 1 - 1e-3


def test_no_two_of_samples_modules_and_steps_go_together() -> None:
    drawn = torch.cat([draw(keys, 2000) > 0 for seed in range(4) for keys in keys_of(seed, 8, 6)])
    correlations = torch.corrcoef(drawn.double()).fill_diagonal_(0) * sqrt(2000)
    assert correlations.abs().max() < 5.5  # of 18 336 pairs the largest is about 4.1
    assert abs(float(correlations.square().sum()) / (192 * 191) - 1) < 0.05


# ---------------------------------------------------------------------------------------------- whose they are


@pytest.mark.parametrize("module", [nn.Dropout(0.3), nn.Dropout2d(0.3), DropPath(0.3)])
@pytest.mark.parametrize("micro", [4, 1])
def test_micro_batches_have_the_masks_of_the_whole_batch(module: nn.Module, micro: int) -> None:
    shape = (16, 6, 5)
    whole = masks(deepcopy(module), 9, torch.arange(8), 8, *shape)
    parts = [masks(deepcopy(module), 9, part, micro, *shape) for part in torch.arange(8).split(micro)]
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) > 1


def test_masks_follow_the_positions() -> None:
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    whole = masks(nn.Dropout(0.3), 9, torch.arange(8), 8, 50)
    assert torch.equal(masks(nn.Dropout(0.3), 9, order, 8, 50), whole[order])


def test_masks_change_with_step_module_and_sample_alone() -> None:
    one = masks(nn.Dropout(0.5), 9, [3], 1, 20_000)
    others = [
        masks(nn.Dropout(0.5), 10, [3], 1, 20_000),
        masks(nn.Dropout(0.5), 9 + 2**32, [3], 1, 20_000),
        masks(nn.Dropout(0.5), 9, [4], 1, 20_000),
        masks(nn.Dropout(0.5), 9, [3], 1, 20_000, name="two"),
    ]
    assert all(abs(correlation(one, other)) < 4 for other in others)
    assert torch.equal(one, masks(nn.Dropout(0.5), 9, [3], 1, 20_000))


def test_masks_stay_when_other_modules_come_and_go() -> None:
    alone = Model(nn.Dropout(0.5))
    beside = Model(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.2), DropPath(0.1)))
    for model in (alone, beside):
        per_sample(model).set(1, torch.arange(4))
    x = torch.ones(4, 100)
    assert torch.equal(alone(x), beside(x))


@pytest.mark.parametrize("module", [nn.Dropout(0.5), DropPath(0.5)])
def test_rows_of_a_sample_stay_together_and_differ(module: nn.Module) -> None:
    kept = masks(deepcopy(module), 9, torch.arange(4), 4 * 6, 30)  # 6 tiles a sample
    alone = masks(deepcopy(module), 9, [2], 6, 30)
    assert torch.equal(kept[12:18], alone)
    assert len({tuple(row.tolist()) for row in alone}) > 1


def test_rows_that_are_no_whole_number_a_sample_are_an_error() -> None:
    with pytest.raises(AssertionError, match="7 rows are no multiple of 2 samples"):
        masks(nn.Dropout(0.5), 9, [0, 1], 7, 30)


# ---------------------------------------------------------------------------------------------- like torch's


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, DropPath])
def test_mean_and_variance_are_those_of_torch_and_timm(kind: type[nn.Module], p: float) -> None:
    x = torch.ones(4000, 8, 2, 2) * 3
    model = Model(kind(p)).train()
    theirs = model(x)
    per_sample(model).set(4, torch.arange(4000))
    ours = model(x)
    draws = {nn.Dropout: 32, nn.Dropout2d: 8, DropPath: 1}[kind] * 4000
    error = 3 * sqrt(p / (1 - p) / draws)  # of the mean of x * mask / (1 - p)
    assert abs(ours.mean() - theirs.mean()) < 4 * sqrt(2) * error
    assert abs(ours.var() / theirs.var() - 1) < 4 * sqrt(2) * 3 / sqrt(draws * p)
    assert torch.allclose(ours.unique(), theirs.unique())


@pytest.mark.parametrize(
    ("kind", "apart", "shape"),
    [
        (nn.Dropout1d, 2, (20, 10, 4)),
        (nn.Dropout2d, 2, (20, 10, 2, 3)),
        (nn.Dropout3d, 2, (20, 10, 2, 3, 2)),
        (DropPath, 1, (200, 10, 4)),
    ],
)
def test_what_drops_together_is_kept_together(kind: type[nn.Module], apart: int, shape: tuple[int, ...]) -> None:
    kept = masks(kind(0.5), 1, torch.arange(20), *shape).flatten(apart)
    assert torch.equal(kept.all(-1), kept.any(-1))
    assert 0.3 < kept.double().mean() < 0.7


def test_paths_are_not_scaled_where_timm_does_not_scale_them() -> None:
    model = Model(DropPath(0.5, scale_by_keep=False))
    per_sample(model).set(1, torch.arange(64))
    assert model(torch.ones(64, 3)).unique().tolist() == [0, 1]


def test_bf16_is_scaled_by_the_exact_number() -> None:
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = Model(nn.Dropout(0.1))
    per_sample(model).set(1, torch.arange(4))
    y = model(x)
    assert y.dtype == torch.bfloat16
    kept = y != 0
    assert torch.equal(y[kept], (x.float() / 0.9).bfloat16()[kept])


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_gradient_flows_through_what_is_kept_alone(p: float) -> None:
    model = Model(nn.Dropout(p))
    per_sample(model).set(1, torch.arange(4))
    x = torch.randn(4, 100, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (y != 0) / (1 - p) if p < 1 else torch.zeros(4, 100))
    assert bool((y != 0).any()) is (p < 1)


def test_nothing_drops_in_evaluation_even_before_it_was_told_what() -> None:
    model = Model(nn.Dropout(0.5)).eval()
    noise = per_sample(model)
    x = torch.randn(4, 100)
    assert torch.equal(model(x), x)
    noise.set(1, torch.arange(2))
    assert torch.equal(model(x[:3]), x[:3])


def test_training_before_it_was_told_what_is_an_error() -> None:
    model = Model(nn.Dropout(0.5))
    per_sample(model)
    with pytest.raises(AssertionError, match=r"Noise\.set comes before"):
        model(torch.ones(2, 2))


# ---------------------------------------------------------------------------------------------- what is replaced


def test_names_and_what_drops_nothing_stay() -> None:
    vit = tiny(drop_path_rate=0.4)
    names = [*vit.state_dict()], [name for name, _ in vit.named_modules()], [name for name, _ in vit.named_buffers()]
    fused, untouched = [block.attn.fused_attn for block in vit.blocks], vit.blocks[0].attn.proj_drop
    per_sample(vit).set(0, torch.arange(2))
    assert names == ([*vit.state_dict()], [n for n, _ in vit.named_modules()], [n for n, _ in vit.named_buffers()])
    assert [block.attn.fused_attn for block in vit.blocks] == fused
    assert vit.blocks[0].attn.proj_drop is untouched
    assert isinstance(vit.blocks[2].drop_path2, SeededDropout)


def test_module_with_two_names_is_replaced_under_both() -> None:
    shared = nn.Dropout(0.5)
    model = Model(shared, nn.Sequential(shared))
    per_sample(model)
    assert isinstance(model.one, SeededDropout)
    assert model.other is not None
    assert model.other[0] is model.one


@pytest.mark.parametrize("module", [PatchDropout(0.5), nn.AlphaDropout(0.1), nn.MultiheadAttention(4, 2, dropout=0.1)])
def test_what_cannot_draw_by_sample_is_refused(module: nn.Module) -> None:
    with pytest.raises(UserError, match=rf"^one \({type(module).__name__}\) drops at random in a way"):
        per_sample(Model(module))


def test_what_cannot_draw_by_sample_may_stay_at_rate_0() -> None:
    per_sample(Model(PatchDropout(0.0), nn.MultiheadAttention(4, 2))).set(0, torch.arange(3))


# ---------------------------------------------------------------------------------------------- in a ViT


def seen(noise: Noise, vit: nn.Module, images: Tensor, micro: int) -> Tensor:
    """Outputs of one step in micro-batches."""
    outputs = []
    for positions in torch.arange(len(images)).split(micro):
        noise.set(5, positions)
        outputs.append(vit(images[positions]))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", EVA])
def test_vit_draws_from_no_generator(name: str, images: Tensor) -> None:
    vit = tiny(name, **EVERYTHING)
    before = torch.get_rng_state()
    vit(images)
    assert not torch.equal(before, torch.get_rng_state())
    per_sample(vit).set(5, torch.arange(8))
    before = torch.get_rng_state()
    vit(images)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rate", EVERYTHING)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", EVA])
def test_output_of_a_sample_depends_on_its_own_place_alone(name: str, rate: str, images: Tensor) -> None:
    vit = tiny(name, **{rate: EVERYTHING[rate]})
    noise = per_sample(vit)
    whole = seen(noise, vit, images, 8)
    for micro in (4, 1):
        assert torch.allclose(seen(noise, vit, images, micro), whole, rtol=1e-10, atol=1e-12)
    order = torch.tensor([3, 1, 7, 5, 0, 2, 4, 6])
    noise.set(5, order)
    assert torch.allclose(vit(images[order]), whole[order], rtol=1e-10, atol=1e-12)
    noise.set(6, torch.arange(8))
    assert not torch.allclose(vit(images), whole, rtol=1e-3)  # it does drop


def test_dropped_attention_is_the_map_times_its_mask() -> None:
    attn = tiny(attn_drop_rate=0.3).blocks[0].attn
    per_sample(attn).set(5, torch.arange(4))
    x = torch.randn(4, 17, 24, dtype=torch.double)
    q, k, v = attn.qkv(x).reshape(4, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / sqrt(12)).softmax(-1)
    dropped = attn.attn_drop(torch.ones_like(weights)) * weights
    assert 0 < (dropped == 0).double().mean() < 0.5
    assert torch.allclose(attn(x), attn.proj((dropped @ v).transpose(1, 2).reshape(4, 17, 24)))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", EVA])
def test_checkpointing_recomputes_the_same_masks(name: str, images: Tensor) -> None:
    vit = tiny(name, **EVERYTHING)
    noise = per_sample(vit)

    def gradients() -> dict[str, Tensor]:
        vit.zero_grad()
        seen(noise, vit, images, 8).square().sum().backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}

    plain = gradients()
    vit.set_grad_checkpointing(True)
    assert all(torch.equal(plain[name], gradient) for name, gradient in gradients().items())


def test_augmented_rotary_positions_are_the_same_for_every_micro_batch(images: Tensor) -> None:
    vit = tiny(EVA, rope_type="dinov3", rope_rescale_coords=2.0, drop_path_rate=0.4)
    noise = per_sample(vit)
    whole = seen(noise, vit, images, 8)
    assert torch.allclose(seen(noise, vit, images, 2), whole, rtol=1e-10, atol=1e-12)
    noise.set(6, torch.arange(8))
    assert not torch.allclose(vit(images), whole, rtol=1e-3)


# ---------------------------------------------------------------------------------------------- compiled, copied


def test_compiled_it_drops_the_same_and_compiles_once() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 6), nn.Dropout2d(0.2), nn.Linear(6, 6), DropPath(0.4))
    noise = per_sample(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(8, 5, 6)
    for seed in range(4):
        noise.set(seed, torch.arange(8) + 8 * seed)
        assert torch.allclose(compiled(x), model(x))
    assert counter.frame_count == 1


def test_blocks_compiled_apart_share_one_program_whatever_their_rates(images: Tensor) -> None:
    vit = tiny(**EVERYTHING, depth=10)
    noise = per_sample(vit)
    expected = [seen(noise, vit, images, 4) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    for block in vit.blocks:
        block.compile(backend=counter)
    assert all(torch.allclose(seen(noise, vit, images, 4), y, rtol=1e-10, atol=1e-12) for y in expected)
    assert counter.frame_count == 2  # the first block has no drop-path


def test_copy_goes_on_with_the_steps(images: Tensor) -> None:
    vit = tiny(**EVERYTHING)
    noise = per_sample(vit)
    noise.set(0, torch.arange(4))
    copy = deepcopy(vit)
    first = seen(noise, vit, images, 8)
    assert torch.equal(copy(images), first)
    for other in (1, 2):
        noise.set(other, torch.arange(8))
        assert torch.equal(copy(images), vit(images))
    per_sample(copy).set(5, torch.arange(8))  # from now on by itself
    noise.set(1, torch.arange(3))
    assert torch.equal(copy(images), first)


def test_setting_again_keeps_the_memory_until_the_number_of_samples_changes() -> None:
    model = Model(nn.Dropout(0.5))
    noise = per_sample(model)
    places = []
    for count in (4, 4, 3, 3):
        noise.set(1, torch.arange(count))
        keys = model.one.source.keys
        assert isinstance(keys, Tensor)
        places.append(keys.data_ptr())
        assert len(model(torch.ones(count, 9))) == count
    assert places[0] == places[1]
    assert places[2] == places[3]
