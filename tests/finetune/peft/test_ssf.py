"""Scale and shift against forwards written out, the published count, and the encoder they fold into."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp
from torch import nn
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import METHODS, apply
from miram.finetune.peft.base import learnt
from miram.finetune.peft.shape import Shape
from miram.finetune.peft.ssf import ScaleShift

EVA = "eva02_base_patch14_224"
MORE = VITS | {
    "EVA, packed SwiGLU, LayerScale": lambda: small(
        EVA, patch_size=16, scale_mlp=False, qkv_fused=True, init_values=0.3
    ),
    "EVA, post-norm": lambda: small(EVA, patch_size=16, use_post_norm=True),
    "norm before the blocks": lambda: small("vit_base_patch16_clip_224"),
    "norms without weights": lambda: small(norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
    "projections without biases": lambda: small(proj_bias=False, qkv_bias=False),
}
WITHOUT_BIASES = {  # what merging gives a bias that timm's own has not, of two blocks
    "post-norm": {"attn.qkv"},
    "rotary, registers": {"attn.qkv"},
    "SwiGLU": {"attn.k_proj"},
    "EVA, packed SwiGLU, LayerScale": {"attn.qkv"},
    "EVA, post-norm": {"attn.k_proj"},
    "norm before the blocks": {"patch_embed.proj"},
    "norms without weights": {"norm1", "norm2", "norm"},
    "projections without biases": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
}


def shaken(tuned):
    """With scales about 1 and shifts about 0, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, tensor in learnt(tuned):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return tuned.eval()


def test_it_stands_behind_every_projection_and_norm_of_a_plain_vit():
    tuned = apply(small(), "ssf")
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = {"patch_embed.proj", "norm"} | {f"blocks.{i}.{part}" for i in range(2) for part in block}
    assert {name for name, _ in learnt(tuned.model)} == {f"{x}.ssf.{t}" for x in layers for t in ("scale", "shift")}


def test_features_are_those_of_the_formula_written_out():
    vit = small()
    images = pictures(vit)
    tuned = shaken(apply(small(), "ssf"))
    tensors = dict(learnt(tuned.model))

    def ssf(path, y):
        return tensors[f"{path}.ssf.scale"] * y + tensors[f"{path}.ssf.shift"]

    x = vit._pos_embed(ssf("patch_embed.proj", vit.patch_embed(images)))
    for i, block in enumerate(vit.blocks):
        at = f"blocks.{i}"
        qkv = ssf(f"{at}.attn.qkv", block.attn.qkv(ssf(f"{at}.norm1", block.norm1(x))))
        q, k, v = qkv.unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)  # of 3 heads of 16
        attended = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        x = x + ssf(f"{at}.attn.proj", block.attn.proj(attended.transpose(1, 2).flatten(2)))
        hidden = nn.functional.gelu(ssf(f"{at}.mlp.fc1", block.mlp.fc1(ssf(f"{at}.norm2", block.norm2(x)))))
        x = x + ssf(f"{at}.mlp.fc2", block.mlp.fc2(hidden))
    torch.testing.assert_close(tuned(images), ssf("norm", vit.norm(x))[:, 0], atol=1e-5, rtol=1e-5)


def test_the_count_on_vit_b_is_the_published_one():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
    shape = Shape.of(vit)
    METHODS["ssf"]().attach(vit)
    assert METHODS["ssf"]().expected(shape) == sum(tensor.numel() for _, tensor in learnt(vit)) == 205_824


@pytest.mark.parametrize("kind", MORE)
def test_every_encoder_starts_as_it_was_counts_right_and_merges_into_a_plain_one(kind):
    images = pictures(MORE[kind]())
    before = MORE[kind]()(images)
    tuned = apply(MORE[kind](), "ssf").train()
    assert tuned.trainable == tuned.expected > 0
    torch.testing.assert_close(tuned(images), before, atol=1e-5, rtol=0)
    wanted = shaken(tuned)(images)
    assert (wanted - before).abs().max() > 0.1
    tokens = tuned.forward_features(images)
    vit = tuned.merged()
    torch.testing.assert_close(vit(images), wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(vit.forward_features(images), tokens, atol=2e-5, rtol=1e-5)
    assert not any(isinstance(part, ScaleShift) or part._forward_hooks for part in vit.modules())
    added = {name.rsplit(".", 1)[0] for name in set(vit.state_dict()) - set(MORE[kind]().state_dict())}
    assert {name.split(".", 2)[-1] if name.startswith("blocks") else name for name in added} == WITHOUT_BIASES.get(
        kind, set()
    )


def test_a_merged_encoder_loads_into_timm_s_own():
    tuned = shaken(apply(small(), "ssf"))
    images = pictures(tuned.model)
    wanted, fresh = tuned(images), small(seed=7)
    fresh.load_state_dict(tuned.merged().state_dict())
    torch.testing.assert_close(fresh(images), wanted, atol=1e-5, rtol=1e-5)


def test_a_key_that_timm_lacks_is_never_loaded_without_a_word():
    merged = shaken(apply(VITS["rotary, registers"](), "ssf")).merged()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.bias"):
        VITS["rotary, registers"]().load_state_dict(merged.state_dict())


@pytest.mark.parametrize("norm", ["rmsnorm", nn.RMSNorm])
def test_norms_that_can_have_no_bias_tune_but_refuse_to_merge_and_stay_as_they_were(norm):
    vit = small(norm_layer=norm)
    tuned = shaken(apply(vit, "ssf"))
    images = pictures(vit)
    wanted = tuned(images)
    assert tuned.trainable == tuned.expected
    with pytest.raises(UserError, match=r"blocks\.0\.norm1, of (RmsNorm|RMSNorm), has no bias"):
        tuned.merged()
    assert torch.equal(tuned(images), wanted)


def test_copies_and_merged_copies_have_nothing_in_common_with_the_original():
    tuned = shaken(apply(small(), "ssf"))
    images = pictures(tuned.model)
    wanted = tuned(images)
    copied, merged = copy.deepcopy(tuned), copy.deepcopy(tuned).merged()
    assert torch.equal(tuned(images), wanted)
    torch.testing.assert_close(merged(images), wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        tuned.model.patch_embed.proj.ssf.scale.zero_()
    assert not torch.allclose(tuned(images), wanted, atol=1e-2)
    assert torch.equal(copied(images), wanted)


def test_the_kinds_above_are_what_they_say():
    packed = MORE["EVA, packed SwiGLU, LayerScale"]().blocks[0]
    assert type(packed.mlp) is GluMlp
    assert packed.attn.q_bias is not None
    assert packed.gamma_1 is not None
    assert isinstance(MORE["norm before the blocks"]().norm_pre, nn.LayerNorm)


def test_under_autocast_a_scale_near_one_is_not_rounded_to_one():
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x := torch.randn(32, 64))
        ssf = ScaleShift(layer, 64)
        with torch.no_grad():
            ssf.scale.fill_(1.003)  # bfloat16 has nothing between 1 and 1.0078
        scaled = layer(x)
    assert plain.dtype == scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, (plain.float() * 1.003).bfloat16())
    assert not torch.equal(scaled, plain)


def test_the_last_norm_is_the_one_behind_pooling_where_tokens_have_none():
    names = {name for name, _ in learnt(apply(VITS["average of registers"](), "ssf").model)}
    assert {"fc_norm.ssf.scale", "fc_norm.ssf.shift"} < names  # where tokens have no last norm
    assert not any(name.startswith("norm.") for name in names)
