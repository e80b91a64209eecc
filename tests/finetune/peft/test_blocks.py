"""Changes to a block's halves against the block's formula written out, for every kind of block timm builds."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import nn
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft.blocks import Branch, attention_halves, ffn_halves, linears
from miram.pretrain.encoder import embed

EVA = "eva02_base_patch14_224"
KINDS = VITS | {
    "EVA, post-norm": lambda: small(EVA, patch_size=16, use_post_norm=True),
    "EVA, packed SwiGLU, LayerScale": lambda: small(
        EVA, patch_size=16, scale_mlp=False, swiglu_mlp=True, qkv_fused=True, init_values=0.3
    ),
    "EVA, no rotation": lambda: small("eva_large_patch14_196", patch_size=16),
    "norm before the blocks": lambda: small("vit_base_patch16_clip_224"),
    "differential attention": lambda: small("vit_dlittle_patch16_reg1_gap_256", embed_dim=96),
}
ONE_STEP = {
    "ParallelScalingBlock": lambda: small("vit_base_patch16_224", block_fn=_block("ParallelScalingBlock")),
    "DiffParallelScalingBlock": lambda: small("vit_dpwee_patch16_reg1_gap_256"),
}


def _block(name):
    import timm.models.vision_transformer as module

    return getattr(module, name)


def changes(width):
    """What goes behind, and beside, attention and FFN: four different random maps."""
    torch.manual_seed(3)
    return [nn.Linear(width, width) for _ in range(4)]


def put(block, maps):
    """Put the four maps on every half of a block."""
    for halves, after, beside in ((attention_halves(block), *maps[:2]), (ffn_halves(block), *maps[2:])):
        for i, half in enumerate(halves):
            half.after(after, f"after_{half.core._get_name()}{i}")
            half.branch(beside, f"beside_{half.core._get_name()}{i}")


def by_hand(block, x, rope, maps):
    """A block's formula with the maps in it."""
    after_attn, beside_attn, after_ffn, beside_ffn = maps
    turned = {} if rope is None else {"rope": rope}
    if isinstance(block, Block):
        x = x + block.ls1(after_attn(block.attn(block.norm1(x)))) + beside_attn(x)
        return x + block.ls2(after_ffn(block.mlp(block.norm2(x)))) + beside_ffn(x)
    if isinstance(block, EvaBlock):
        one = torch.ones(())
        gammas = [one if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2)]
        x = x + gammas[0] * after_attn(block.attn(block.norm1(x), **turned)) + beside_attn(x)
        return x + gammas[1] * after_ffn(block.mlp(block.norm2(x))) + beside_ffn(x)
    if isinstance(block, ResPostBlock | EvaBlockPostNorm):
        x = x + block.norm1(after_attn(block.attn(x, **turned))) + beside_attn(x)
        return x + block.norm2(after_ffn(block.mlp(x))) + beside_ffn(x)
    assert isinstance(block, ParallelThingsBlock)
    x = x + sum(part.ls(after_attn(part.attn(part.norm(x)))) + beside_attn(x) for part in block.attns)
    return x + sum(part.ls(after_ffn(part.mlp(part.norm(x)))) + beside_ffn(x) for part in block.ffns)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_behind_and_beside_the_halves_computes_the_block_s_formula(kind):
    vit = KINDS[kind]()
    x, rope = embed(vit, pictures(vit))
    block = vit.blocks[0]
    maps = changes(x.shape[-1])
    wanted = by_hand(block, x, rope, maps)  # before there are hooks
    before = block(x, **({} if rope is None else {"rope": rope}))
    put(block, maps)
    found = block(x, **({} if rope is None else {"rope": rope}))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 0.1


def test_drop_path_drops_what_is_behind_a_core_and_keeps_what_is_beside_it():
    vit = small(drop_path_rate=1.0).train()  # the second block's halves are always dropped
    maps = changes(48)
    put(vit.blocks[1], maps)
    x = torch.randn(2, 5, 48)
    first = x + maps[1](x)
    torch.testing.assert_close(vit.blocks[1](x), first + maps[3](first))


@pytest.mark.parametrize("kind", ["class token", "rotary, registers", "things in parallel"])
def test_a_deep_copy_has_its_own_changes(kind):
    vit = KINDS[kind]()
    put(vit.blocks[0], changes(48))
    images = pictures(vit)
    copied, before = copy.deepcopy(vit), vit(images)
    with torch.no_grad():
        for name, tensor in vit.named_parameters():
            if "beside" in name or "after" in name:
                tensor.zero_()
    assert torch.equal(copied(images), before)
    assert not torch.allclose(vit(images), before, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_features_and_gradients(kind):
    vit = KINDS[kind]()
    for i in range(2):
        put(vit.blocks[i], changes(vit.embed_dim))
    images, found = pictures(vit), []
    for recompute in (False, True):
        vit.set_grad_checkpointing(recompute)
        vit.zero_grad()
        features = vit(images)
        features.square().sum().backward()
        found.append([features.detach(), *(p.grad.clone() for p in vit.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-5, rtol=1e-4)
    assert all(part.stream is None for part in vit.modules() if isinstance(part, Branch))
    copy.deepcopy(vit)  # impossible if a tensor of the graph had been kept


def test_names_of_the_encoder_s_tensors_stay():
    vit = small()
    names = set(vit.state_dict())
    put(vit.blocks[0], changes(48))
    assert names < set(vit.state_dict())


def test_one_module_may_stand_in_several_blocks():
    vit = small()
    shared, own = nn.Linear(48, 48), copy.deepcopy(small())
    with torch.no_grad():
        shared.weight.mul_(0.1)
    for one, other in zip(vit.blocks, own.blocks, strict=True):
        ffn_halves(one)[0].branch(shared, "beside")
        ffn_halves(other)[0].branch(copy.deepcopy(shared), "beside")
    images = pictures(vit)
    assert torch.equal(vit(images), own(images))
    extra = [sum(p.numel() for p in v.parameters()) - sum(p.numel() for p in small().parameters()) for v in (vit, own)]
    assert extra == [48 * 49, 2 * 48 * 49]


@pytest.mark.parametrize("kind", ONE_STEP)
def test_blocks_that_make_attention_and_ffn_in_one_step_are_refused_in_one_sentence(kind):
    block = ONE_STEP[kind]().blocks[0]
    for halves in (attention_halves, ffn_halves):
        with pytest.raises(UserError, match=f"{kind}s, which make attention and FFN in one step"):
            halves(block)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_of_the_blocks_is_listed_and_is_called_as_a_module(kind):
    vit = KINDS[kind]()
    before = vit(pictures(vit))
    found, called = linears(vit), []
    assert set(found) == {path for path, part in vit.named_modules() if _in_block(path) and type(part) is nn.Linear}
    for path in found:
        vit.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
    torch.testing.assert_close(vit(pictures(vit)), before)  # EVA's bias of q and v is still added
    assert sorted(called) == sorted(found)


def _in_block(path):
    return path.startswith("blocks.")


def test_roles_are_those_of_timm_s_names():
    roles = {path.removeprefix("blocks.0."): role for path, role in linears(VITS["SwiGLU"]()).items() if ".0." in path}
    assert roles == {
        "attn.q_proj": "q",
        "attn.k_proj": "k",
        "attn.v_proj": "v",
        "attn.proj": "proj",
        "mlp.fc1_g": "fc1",
        "mlp.fc1_x": "fc1",
        "mlp.fc2": "fc2",
    }
