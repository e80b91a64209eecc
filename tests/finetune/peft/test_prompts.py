"""Prompts against forwards written out by hand, and against timm's register tokens, which are shallow prompts."""

from __future__ import annotations

import copy
from typing import Any

import by_hand
import pytest
import timm
import torch
from torch import Tensor, nn
from vits import pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import Tuned, apply
from miram.pretrain.encoder import Encoder

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tuned(method: str, vit: Encoder | None = None, **options: Any) -> Tuned:
    torch.manual_seed(3)
    model = apply(vit or small(depth=4), method, **options)
    with torch.no_grad():
        for name, tensor in model.model.named_parameters():
            if tensor.requires_grad and "prompts" in name:
                tensor.normal_()
    return model


def own(prompts: Tensor, batch: int = 2) -> Tensor:
    return prompts.detach().expand(batch, -1, -1)


# ---------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("start", [0, 2])
def test_shallow_prompts_enter_once_and_are_carried(start: int) -> None:
    model = tuned("vpt_shallow", num_prompts=3, start=start)
    vit, images = model.model.vit, pictures(model.model.vit)
    x = by_hand.embed(vit, images)
    for i, block in enumerate(vit.blocks):
        if i == start:
            x = torch.cat([x, own(model.model.prompts)], dim=1)  # behind the patches: their place decides nothing
        x = by_hand.through(block, x)
    x = by_hand.norm(vit.norm, x[:, :17])
    torch.testing.assert_close(model.forward_features(images), x, **CLOSE)
    torch.testing.assert_close(model(images), x[:, 0], **CLOSE)


@pytest.mark.parametrize("start", [0, 2])
def test_deep_prompts_are_new_at_every_block(start: int) -> None:
    model = tuned("vpt_deep", num_prompts=3, start=start)
    vit, images = model.model.vit, pictures(model.model.vit)
    x = by_hand.embed(vit, images)
    for i, block in enumerate(vit.blocks):
        sequence = x if i < start else torch.cat([x, own(model.model.prompts[i - start])], dim=1)
        x = by_hand.through(block, sequence)[:, :17]
    torch.testing.assert_close(model.forward_features(images), by_hand.norm(vit.norm, x), **CLOSE)


@pytest.mark.parametrize(("start", "temperature"), [(0, False), (1, True)])
def test_gates_mix_what_enters_a_block_with_what_leaves_it(start: int, temperature: bool) -> None:
    model = tuned("vpt_gated", num_prompts=3, start=start, temperature=temperature)
    vit, images = model.model.vit, pictures(model.model.vit)
    gates, degrees = [-1.0, 0.5, 2.0][: 3 - start], [0.5, 3.0, 40.0]
    with torch.no_grad():
        model.model.gates.copy_(torch.tensor(gates))
        for module, degree in zip(model.model.temperatures, degrees, strict=False):
            module.value.fill_(degree)
    x, prompts = by_hand.embed(vit, images), own(model.model.prompts)
    for i, block in enumerate(vit.blocks):
        sequence = x if i < start else torch.cat([x, prompts], dim=1)
        degree = min(degrees[i - start], 10.0) if temperature and i >= start else 1.0  # 10 is the most it may be
        out = by_hand.through(block, sequence, degree)
        x = out[:, :17]
        if start <= i < len(vit.blocks) - 1:
            share = 1 / (1 + 2.718281828 ** -gates[i - start])
            prompts = share * out[:, 17:] + (1 - share) * prompts
    torch.testing.assert_close(model.forward_features(images), by_hand.norm(vit.norm, x), **CLOSE)


def test_gates_begin_at_the_sigmoid_of_minus_their_option() -> None:
    assert tuned("vpt_gated").model.gates.tolist() == [-5.0] * 3
    assert tuned("vpt_gated", gate_init=10, start=1).model.gates.tolist() == [-10.0] * 2


def test_open_gates_are_shallow_and_shut_ones_deep_with_one_set() -> None:
    vit, images = small(depth=4), pictures(small())
    models = {m: tuned(m, copy.deepcopy(vit), num_prompts=3) for m in ("vpt_gated", "vpt_shallow", "vpt_deep")}
    gated, shallow, deep = (model.model for model in models.values())
    with torch.no_grad():
        shallow.prompts.copy_(gated.prompts)
        deep.prompts.copy_(gated.prompts.expand_as(deep.prompts))
        gated.gates.fill_(40.0)
        torch.testing.assert_close(gated(images), shallow(images), **CLOSE)
        gated.gates.fill_(-40.0)
        torch.testing.assert_close(gated(images), deep(images), **CLOSE)


def test_a_temperature_out_of_bounds_can_come_back() -> None:
    model = tuned("vpt_gated", temperature=True)
    module = model.model.temperatures[1]
    with torch.no_grad():
        module.value.fill_(20.0)
    model(pictures(model.model.vit)).square().sum().backward()
    assert module.value.grad != 0


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_18x2_224", "eva02_base_patch14_224"])
def test_a_hot_attention_looks_at_everything_alike_whatever_its_kind(name: str) -> None:
    vit = small(name, patch_size=16)
    model = tuned("vpt_gated", vit, temperature=True)
    seen: list[Tensor] = []
    attention = next(module for module in vit.blocks[0].modules() if hasattr(module, "q_norm"))
    attention.k_norm.register_forward_hook(lambda *call: seen.append(call[2]))
    before = attention.q_norm(torch.ones(1, 3, 5, 16))
    with torch.no_grad():
        model.model.temperatures[0].value.fill_(4.0)
    torch.testing.assert_close(attention.q_norm(torch.ones(1, 3, 5, 16)) * 4, before)
    model(pictures(vit))
    assert seen  # norms of q and k are called as modules there, or the temperature did nothing


# ---------------------------------------------------------------------------------------------- as register tokens

REGISTERED: dict[str, dict[str, Any]] = {
    "vit_base_patch14_reg4_dinov2": {"patch_size": 16, "reg_tokens": 4},
    "vit_medium_patch16_reg4_gap_256": {"reg_tokens": 4},
    "vit_base_patch16_siglip_224": {"reg_tokens": 4, "no_embed_class": True},
    "vit_base_patch16_clip_224": {"reg_tokens": 4, "no_embed_class": True},  # norms before the first block
    "vit_small_patch16_dinov3": {"num_reg_tokens": 4},
    "vit_base_patch16_rope_reg1_gap_256": {"num_reg_tokens": 4},
    "vit_base_patch16_rope_mixed_224": {"num_reg_tokens": 4, "no_embed_class": True},
    "vit_small_patch16_rope_mixed_ape_224": {"num_reg_tokens": 4, "no_embed_class": True, "img_size": (64, 32)},
}


def pair(name: str, **more: Any) -> tuple[Any, nn.Module]:
    """A timm ViT with register tokens, and one without whose prompts are those tokens."""
    options = REGISTERED[name] | more
    registered = small(name, **{"img_size": 64} | options)
    plain = small(name, **{"img_size": 64} | options | {k: 0 for k in options if k.endswith("reg_tokens")})
    state = registered.state_dict()
    registers = state.pop("reg_token")
    plain.load_state_dict(state)
    model = apply(plain, "vpt_shallow", num_prompts=4).model
    with torch.no_grad():
        model.prompts.copy_(registered.norm_pre(registers)[0])  # prompts come behind that norm
    return registered, model


@pytest.mark.parametrize("name", REGISTERED)
def test_prompts_compute_what_register_tokens_compute(name: str) -> None:
    registered, model = pair(name)
    images, first = pictures(registered), registered.num_prefix_tokens - 4
    wanted, tokens = registered.forward_features(images), model.forward_features(images)
    torch.testing.assert_close(tokens, torch.cat([wanted[:, :first], wanted[:, first + 4 :]], dim=1), **CLOSE)
    if not getattr(registered, "pool_include_prefix", False) and registered.attn_pool is None:
        torch.testing.assert_close(model(images), registered(images), **CLOSE)


@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("indices", [None, 1, [0, -1]])
def test_intermediates_are_timms_without_the_prompts(name: str, norm: bool, indices: Any) -> None:
    registered, model = pair(name, depth=3, img_size=(64, 32))
    images = pictures(registered)
    for options in ({"output_fmt": "NLC"}, {"return_prefix_tokens": True}):
        wanted_last, wanted = registered.forward_intermediates(images, indices, norm=norm, **options)
        last, found = model.forward_intermediates(images, indices, norm=norm, **options)
        torch.testing.assert_close(last, torch.cat([wanted_last[:, :1], wanted_last[:, 5:]], dim=1), **CLOSE)
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            if "return_prefix_tokens" in options:
                torch.testing.assert_close(ours[1], theirs[1][:, :1], **CLOSE)
                ours, theirs = ours[0], theirs[0]
            torch.testing.assert_close(ours, theirs, **CLOSE)
    alone = model.forward_intermediates(images, indices, norm=norm, intermediates_only=True)
    assert [x.shape for x in alone] == [(2, 48, 4, 2)] * len(found)


@pytest.mark.parametrize(
    "name", ["vit_base_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_224"]
)
def test_dropped_patches_take_their_positions_with_them(name: str) -> None:
    registered, model = pair(name, patch_drop_rate=0.5)
    images, first = pictures(registered), registered.num_prefix_tokens - 4
    outs = []
    for vit in (registered, model):
        vit.train()
        torch.manual_seed(5)
        outs.append(vit.forward_features(images))
    wanted, tokens = outs
    assert tokens.shape[1] == first + 8
    torch.testing.assert_close(tokens, torch.cat([wanted[:, :first], wanted[:, first + 4 :]], dim=1), **CLOSE)


# ---------------------------------------------------------------------------------------------- the rest


def test_pooling_sees_no_prompts() -> None:
    for name in ("vit_base_patch16_gap_224", "vit_base_patch16_siglip_224"):
        model = tuned("vpt_deep", small(name)).model
        images = pictures(model.vit)
        patches = model.forward_features(images)
        assert patches.shape == (2, 16, 48)
        wanted = model.vit.attn_pool(patches) if model.vit.attn_pool else patches.mean(1)
        torch.testing.assert_close(model(images), model.vit.fc_norm(wanted))


def test_checkpointing_recomputes_the_same_gradients_where_prompts_change() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tuned("vpt_deep", small("vit_base_patch16_rope_mixed_224", depth=3), start=1).train()
        model.model.set_grad_checkpointing(checkpointing)
        runs: list[int] = []
        model.model.vit.blocks[1].norm1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(pictures(model.model.vit)).square().sum().backward()
        assert len(runs) == 1 + checkpointing
        grads.append(model.model.prompts.grad)
    assert grads[0].abs().amin(dim=-1).min() > 0
    torch.testing.assert_close(*grads)


def test_prompts_begin_within_the_xavier_bound_of_the_patch_projection() -> None:
    base = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1)
    prompts = apply(base, "vpt_shallow", num_prompts=200).model.prompts
    assert 0.0624 < prompts.abs().max() <= 0.0625  # v on a ViT-B/16 in the paper
    assert prompts.std().item() == pytest.approx(0.0625 / 3**0.5, rel=0.01)
    grey = apply(small(), "vpt_shallow", num_prompts=200).model.prompts
    assert 0.99 < grey.abs().max() / (6 / (256 + 48)) ** 0.5 <= 1


def test_dropout_takes_numbers_of_new_prompts_in_training_only() -> None:
    model = tuned("vpt_deep", dropout=0.25, num_prompts=100).model
    left = torch.zeros(2, 100, 48)
    fresh = own(model.prompts[2])
    torch.testing.assert_close(model.eval().enter(2, left, left), fresh)
    dropped = model.train().enter(2, left, left)
    torch.testing.assert_close(dropped[dropped != 0], (fresh / 0.75)[dropped != 0])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("vpt_shallow", {}, 7_680),
        ("vpt_deep", {}, 92_160),
        ("vpt_deep", {"num_prompts": 50}, 460_800),
        ("vpt_deep", {"num_prompts": 100}, 921_600),
        ("vpt_deep", {"num_prompts": 50, "start": 8}, 153_600),
        ("vpt_gated", {}, 7_691),
        ("vpt_gated", {"temperature": True, "start": 3}, 7_697),
    ],
)
def test_counts_are_the_published_ones(method: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224", num_classes=0)
    base.to_empty(device="cpu")
    model = apply(base, method, **options)
    assert model.trainable == model.expected == count


@pytest.mark.parametrize(("method", "start"), [("vpt_shallow", 4), ("vpt_deep", 4), ("vpt_gated", 3)])
def test_prompts_that_would_enter_too_late_are_refused(method: str, start: int) -> None:
    tuned(method, start=start - 1)
    with pytest.raises(UserError, match=f"start is {start}.*4 blocks"):
        tuned(method, start=start)
