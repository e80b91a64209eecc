"""Every mean is compared with the weights that the sites would have if each merged its change, dense, in float64."""

import copy

import pytest
import torch
from vits import pictures, small

from miram.engine.errors import UserError
from miram.finetune.federate.averaging import (
    apply_residual,
    as_fixed,
    as_one_adapter,
    average,
    combine,
    compressed,
    from_fixed,
    pairs,
    refuse_mode,
    residual_of,
)
from miram.finetune.peft import apply
from miram.finetune.peft.base import learnt
from miram.finetune.peft.files import load, save
from miram.finetune.peft.registry import read_method

WEIGHTS = [0.5, 0.3, 0.2]
METHODS = {
    "lora": {"rank": 3, "alpha": 2.0, "targets": ["qkv", "fc1"]},
    "lora, rank-stabilised": {"rank": 3, "alpha": 2.0, "rslora": True},
    "lora_qkv": {"rank": 2, "alpha": 3.0, "targets": "qv"},
}


def tuned(kind: str, make=small):
    torch.manual_seed(5)
    return apply(make(), kind.partition(",")[0], **METHODS[kind]).eval()


def values(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learnt(model)}


def put(model, tensors) -> None:
    with torch.no_grad():
        for name, tensor in learnt(model):
            tensor.copy_(tensors[name])


def moved(start, site: int, still=(), size: float = 0.3):
    """What a site makes of the start."""
    generator = torch.Generator().manual_seed(site)
    return {n: t if n in still else t + size * torch.randn(t.shape, generator=generator) for n, t in start.items()}


def dense(make, tensors, residual=None) -> dict[str, torch.Tensor]:
    """The weights of the plain encoder that a change makes, in float64."""
    model = make()
    put(model, tensors)
    apply_residual(model, residual or {})
    return {name: tensor.double() for name, tensor in model.merged().state_dict().items()}


def mean_of(states, weights=WEIGHTS):
    return {name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) for name in states[0]}


def worst(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


CASES = [(kind, make) for kind in METHODS for make in ("fused", "apart")]


def maker(kind: str, form: str):
    if form == "fused":
        return lambda: tuned(kind)
    return lambda: tuned(kind, lambda: small("vit_base_patch16_rope_224", qkv_fused=False))


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_with_a_frozen_and_shared_the_average_is_that_of_the_merged_weights(kind, form):
    make = maker(kind, form)
    start = values(make())
    still = {a for a, _ in pairs(start).values()}
    updates = [moved(start, site, still) for site in range(3)]
    wanted = mean_of([dense(make, update) for update in updates])
    assert worst(dense(make, average(updates, WEIGHTS)), wanted) < 1e-6
    assert worst(dense(make, start), wanted) > 0.01
    assert residual_of(updates, WEIGHTS) == {}


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_with_a_residual_the_average_is_exact_over_several_rounds_and_without_it_is_not(kind, form):
    make = maker(kind, form)
    stands, total = values(make()), {}
    for round in range(3):
        updates = [moved(stands, 10 * round + site) for site in range(3)]
        wanted = mean_of([dense(make, update, total) for update in updates])
        stands = average(updates, WEIGHTS)
        plain = worst(dense(make, stands, total), wanted)
        total = combine(total, residual_of(updates, WEIGHTS))
        assert worst(dense(make, stands, total), wanted) < 1e-6
        assert plain > 0.01


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_the_last_model_of_residual_mode_is_one_plain_adapter_on_the_encoder_as_it_was(kind, form, tmp_path):
    make = maker(kind, form)
    updates = [moved(values(make()), site) for site in range(3)]
    stands, residual = average(updates, WEIGHTS), residual_of(updates, WEIGHTS)
    method, tensors = as_one_adapter(make().method, stands, residual)
    base = small() if form == "fused" else small("vit_base_patch16_rope_224", qkv_fused=False)
    one = apply(copy.deepcopy(base), kind.partition(",")[0], **method.model_dump()).eval()
    put(one, tensors)
    assert one.trainable == one.expected
    save(one, tmp_path / "adapter")
    again = load(tmp_path / "adapter", base).eval()
    both = make()
    put(both, stands)
    apply_residual(both, residual)
    x = pictures(base)
    torch.testing.assert_close(again(x), both(x), atol=1e-5, rtol=1e-5)
    merged = {name: tensor.double() for name, tensor in again.merged().state_dict().items()}
    assert worst(merged, dense(make, stands, residual)) < 1e-6
    assert worst(merged, dense(make, stands)) > 0.01


def test_dora_averages_its_product_exactly_and_the_lengths_apart():
    def make():
        torch.manual_seed(5)
        return apply(small(), "dora", rank=2).eval()

    updates = [moved(values(make()), site, size=0.1) for site in range(3)]
    stands, residual = average(updates, WEIGHTS), residual_of(updates, WEIGHTS)
    for path, (a, b) in pairs(stands).items():
        product = sum(w * update[b].double() @ update[a].double() for w, update in zip(WEIGHTS, updates, strict=True))
        A, B = residual[path]
        torch.testing.assert_close((stands[b] @ stands[a] + B @ A).double(), product, atol=1e-6, rtol=0)
    both = make()
    put(both, stands)
    apply_residual(both, residual)
    method, tensors = as_one_adapter(both.method, stands, residual)
    one = apply(small(), "dora", **method.model_dump()).eval()
    put(one, tensors)
    torch.testing.assert_close(one(pictures(small())), both(pictures(small())), atol=1e-5, rtol=1e-5)


def test_pairs_are_found_by_the_names_of_models_and_of_peft_files_and_nothing_else_is():
    names = [
        *("model.base_model.model.blocks.0.attn.qkv.lora_A.default.weight", "head.weight"),
        *("model.base_model.model.blocks.0.attn.qkv.lora_B.default.weight", "model.cls_token"),
        *("base_model.model.blocks.1.mlp.fc1.lora_A.weight", "base_model.model.blocks.1.mlp.fc1.lora_B.weight"),
        *("model.blocks.0.attn.qkv.lora.A.q", "model.blocks.0.attn.qkv.lora.B.q"),
        *("model.blocks.0.attn.qkv.lora.B.v", "blocks.3.attn.k_proj.lora.A.k"),  # whose other halves do not learn
    ]
    assert pairs(names) == {
        "model.base_model.model.blocks.0.attn.qkv": (names[0], names[2]),
        "base_model.model.blocks.1.mlp.fc1": (names[4], names[5]),
        "model.blocks.0.attn.qkv.lora.q": (names[6], names[7]),
    }


def test_every_low_rank_of_a_model_is_found():
    assert len(pairs(values(tuned("lora_qkv")))) == 2 * 2
    assert len(pairs(values(tuned("lora")))) == 2 * 2
    assert pairs(values(apply(small(), "vpt_deep"))) == {}


def test_the_mean_is_summed_in_float64_and_keeps_types():
    tiny = [{"a": torch.tensor([value]), "b": torch.tensor([value]).bfloat16()} for value in (1e8, 1.0, -1e8)]
    mean = average(tiny, [1 / 3] * 3)
    assert abs(mean["a"].item() - 1 / 3) < 1e-7
    assert (mean["a"].dtype, mean["b"].dtype) == (torch.float32, torch.bfloat16)


def test_a_mean_of_one_is_that_one_bit_by_bit():
    update = moved(values(tuned("lora")), 1)
    assert all(torch.equal(tensor, update[name]) for name, tensor in average([update], [1.0]).items())
    assert residual_of([update], [1.0]) == {}


@pytest.mark.parametrize("sites", [2, 3, 4])
def test_the_residual_has_the_rank_of_the_sites_deviations(sites):
    start = values(tuned("lora"))
    residual = residual_of([moved(start, site) for site in range(sites)], [1 / sites] * sites)
    assert {len(A) for A, _ in residual.values()} == {(sites - 1) * 3}
    assert {B.shape[1] for _, B in residual.values()} == {(sites - 1) * 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_compressed_to_their_rank_and_no_further(dtype):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(4, 30), (20, 4)])
    wide = torch.cat([A, A[:2] + A[2:], 3 * A]), torch.cat([B, B[:, :2] - B[:, 2:], -0.2 * B], 1)
    narrow = compressed(wide, dtype)
    assert (narrow[0].shape, narrow[1].shape) == ((4, 30), (20, 4))
    assert narrow[0].dtype == dtype
    exact = wide[1] @ wide[0]
    error = (narrow[1].double() @ narrow[0].double() - exact).abs().max() / exact.abs().max()
    assert error < 10 * torch.finfo(dtype).eps


def test_a_product_of_larger_rank_than_its_matrix_is_compressed_to_the_matrix():
    wide = torch.randn(40, 7), torch.randn(9, 40)
    narrow = compressed(wide, torch.float32)
    assert narrow[0].shape == (7, 7)
    torch.testing.assert_close(narrow[1] @ narrow[0], wide[1] @ wide[0], atol=1e-4, rtol=1e-5)


def test_a_residual_travels_as_fixed_tensors():
    residual = residual_of([moved(values(tuned("lora_qkv")), site) for site in range(2)], [0.5, 0.5])
    fixed = as_fixed(residual)
    again = from_fixed({"head.mean": torch.zeros(3), **fixed})
    assert again.keys() == residual.keys()
    assert "residual.model.blocks.0.attn.qkv.lora.q.A" in fixed
    assert all(torch.equal(again[path][i], residual[path][i]) for path in residual for i in (0, 1))


def test_residual_mode_is_refused_where_there_is_no_low_rank_or_no_single_rank():
    refuse_mode(read_method("lora", {}), "residual")
    refuse_mode(read_method("vpt_deep", {}), "freeze_a")
    with pytest.raises(UserError, match="VPTDeep has no low rank"):
        refuse_mode(read_method("vpt_deep", {}), "residual")
    with pytest.raises(UserError, match="rank_pattern"):
        refuse_mode(read_method("lora", {"peft": {"rank_pattern": {"blocks.0.attn.qkv": 2}}}), "residual")
