"""Adapters against forwards written out, published counts, and the bug of a public adapter."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelScalingBlock
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import METHODS, apply
from miram.finetune.peft.adapters import Bottleneck
from miram.finetune.peft.base import learnt
from miram.finetune.peft.shape import Shape


def shaken(tuned):
    """With random numbers in everything that learns, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, tensor in learnt(tuned):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return tuned.eval()


def encoder_by_hand(vit, images, behind_attn, behind_ffn, beside_ffn):
    """Features of a ViT with a class token, functions (index of the block, tokens) put in its blocks."""
    x = vit._pos_embed(vit.patch_embed(images))
    for i, block in enumerate(vit.blocks):
        stream = x + block.ls1(behind_attn(i, block.attn(block.norm1(x))))
        x = stream + block.ls2(behind_ffn(i, block.mlp(block.norm2(stream)))) + beside_ffn(i, stream)
    return vit.norm(x)[:, 0]


def bottleneck_by_hand(tensors, path, x, activation):
    down, up = ((tensors[f"{path}.{name}.weight"], tensors[f"{path}.{name}.bias"]) for name in ("down", "up"))
    return activation(x @ down[0].T + down[1]) @ up[0].T + up[1]


@pytest.mark.parametrize("after", ["both", "ffn"])
@pytest.mark.parametrize("kind", ["class token", "registers, LayerScale"])
def test_houlsby_adds_gelu_bottlenecks_behind_attention_and_ffn(kind, after):
    vit = VITS[kind]()
    images = pictures(vit)
    tuned = shaken(apply(VITS[kind](), "houlsby", after=after))
    tensors = dict(learnt(tuned.model))

    def behind(part):
        path = "blocks.{}." + part + "_adapter0.module"
        return lambda i, h: h + bottleneck_by_hand(tensors, path.format(i), h, F.gelu)

    attn = behind("attn") if after == "both" else lambda i, h: h
    wanted = encoder_by_hand(vit, images, attn, behind("ffn"), lambda i, x: 0)
    torch.testing.assert_close(tuned(images), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["class token", "registers, LayerScale"])
def test_adaptformer_adds_a_scaled_relu_bottleneck_of_the_stream_beside_the_ffn(kind):
    vit = VITS[kind]()
    images = pictures(vit)
    tuned = shaken(apply(VITS[kind](), "adaptformer", scale=0.3))
    tensors = dict(learnt(tuned.model))

    def beside(i, stream):
        return 0.3 * bottleneck_by_hand(tensors, f"blocks.{i}.ffn_adapter0.module", stream, F.relu)

    wanted = encoder_by_hand(vit, images, lambda i, h: h, lambda i, h: h, beside)
    torch.testing.assert_close(tuned(images), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("houlsby", {}, 313_536),
        ("houlsby", {"after": "ffn"}, 156_768),
        ("houlsby", {"dim": 64, "after": "ffn"}, 1_189_632),
        ("adaptformer", {}, 1_189_632),
    ],
)
def test_counts_on_vit_b_are_the_published_ones(method, options, count):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
    chosen, shape = METHODS[method](**options), Shape.of(vit)
    chosen.attach(vit)
    assert chosen.expected(shape) == sum(tensor.numel() for _, tensor in learnt(vit)) == count


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize(("method", "options"), [("houlsby", {}), ("houlsby", {"after": "ffn"}), ("adaptformer", {})])
def test_every_encoder_starts_as_it_was_and_counts_as_the_closed_form_says(kind, method, options):
    images = pictures(VITS[kind]())
    before = VITS[kind]()(images)
    tuned = apply(VITS[kind](), method, **options).train()
    assert tuned.trainable == tuned.expected > 0
    assert torch.equal(tuned(images), before)
    shaken(tuned)
    assert (tuned(images) - before).abs().max() > 0.01


def moved(tuned, images, steps=3):
    """Names of what learns that has moved after some steps."""
    before = {name: tensor.detach().clone() for name, tensor in learnt(tuned.model)}
    optimizer = torch.optim.AdamW([tensor for _, tensor in learnt(tuned)], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        tuned(images).square().sum().backward()
        optimizer.step()
    return {name for name, tensor in learnt(tuned.model) if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("method", ["houlsby", "adaptformer"])
def test_every_tensor_of_an_adapter_learns_unlike_in_vpt_s_zero_adapter(method):
    vit = small()
    tuned = apply(small(), method)
    assert moved(tuned, pictures(vit)) == {name for name, _ in learnt(tuned.model)}
    broken = apply(small(), method)
    for part in broken.modules():
        if isinstance(part, Bottleneck):
            torch.nn.init.zeros_(part.down.weight)
    assert {name.split(".module.")[1] for name in moved(broken, pictures(vit))} == {"up.bias"}


def test_initial_weights_are_those_of_the_papers():
    width, down = 192, {}
    for method in ("houlsby", "adaptformer"):
        parts = [part for part in apply(small(embed_dim=width), method, dim=256).modules() if type(part) is Bottleneck]
        assert not any(t.any() for part in parts for t in (part.up.weight, part.up.bias, part.down.bias))
        down[method] = torch.cat([part.down.weight.detach() for part in parts])
    assert down["houlsby"].abs().max() <= 0.02
    assert down["houlsby"].std().item() == pytest.approx(0.0088, rel=0.02)  # a normal cut at 2 deviations has 0.88
    assert 0.99 < down["adaptformer"].abs().max().item() * width**0.5 <= 1  # uniform within 1 / sqrt(inputs)
    assert down["adaptformer"].std().item() * (3 * width) ** 0.5 == pytest.approx(1, rel=0.02)


def test_adaptformer_drops_out_in_training_only():
    vit, images = small(), pictures(small())
    tuned = shaken(apply(vit, "adaptformer", dropout=0.5))
    assert torch.equal(tuned(images), tuned(images))
    tuned.train()
    assert not torch.allclose(tuned(images), tuned(images), atol=1e-3)
    without = shaken(apply(small(), "adaptformer", dropout=0.0))
    wanted = without(images)
    assert torch.equal(without.train()(images), wanted)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("houlsby", {"dim": 0}, "dim"),
        ("houlsby", {"after": "attention"}, "after"),
        ("adaptformer", {"dropout": 1.0}, "dropout"),
    ],
)
def test_options_that_make_no_sense_are_refused(method, options, message):
    with pytest.raises(UserError, match=message):
        apply(small(), method, **options)


@pytest.mark.parametrize("method", ["houlsby", "adaptformer", "ssf"])
def test_blocks_without_halves_are_refused_and_left_as_they_were(method):
    vit = small(block_fn=ParallelScalingBlock)
    names, before = list(vit.state_dict()), vit(pictures(vit))
    with pytest.raises(UserError, match="ParallelScalingBlocks"):
        apply(vit, method)
    assert list(vit.state_dict()) == names
    assert torch.equal(vit(pictures(vit)), before)
