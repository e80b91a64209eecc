"""DVPT against a forward written out by hand, which can drop the attention as the released code does."""

from __future__ import annotations

import copy
import math
from typing import Any

import by_hand
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import Tuned, apply

M, R = 5, 6


def tuned(vit: Any = None, **options: Any) -> Tuned:
    """Prompts large and gates open, each differently, so that everything counts."""
    torch.manual_seed(3)
    model = apply(vit or small(depth=4), "dvpt", **{"num_prompts": M, "dim": R} | options)
    with torch.no_grad():
        model.model.prompts.normal_()
        for i, module in enumerate(dict.fromkeys(modules(model))):
            module.gate.fill_(0.3 + 0.1 * i)
            module.down.weight.mul_(2)
    return model


def modules(model: Tuned) -> list[Any]:
    return [block.dvpt.held[0] for block in model.model.vit.blocks]


def added(module: Any, stream: Tensor, scale: float = R**-0.5, asks: bool = True) -> Tensor:
    """What a module adds to a stream of [class token | patches | M prompts], prompt by prompt."""
    x = F.gelu(stream @ module.down.weight.T + module.down.bias)
    x = x.clone()
    for b in range(len(x)):
        patches = x[b, 1:-M].clone()
        for row in range(-M, 0) if asks else ():
            weights = [math.exp(scale * float(x[b, row] @ patch)) for patch in patches]
            x[b, row] = sum(w * patch for w, patch in zip(weights, patches, strict=True)) / sum(weights)
    return module.gate * (x @ module.up.weight.T + module.up.bias)


def forward(model: Tuned, images: Tensor, **changes: Any) -> Tensor:
    """The whole forward, the prompts behind the patches: their place decides nothing."""
    vit = model.model.vit
    prompts = (model.model.prompts + model.model.positions).expand(len(images), -1, -1)
    x = torch.cat([by_hand.embed(vit, images), prompts], dim=1)
    for block, module in zip(vit.blocks, modules(model), strict=True):
        x = by_hand.attention(block, x)
        x = x + by_hand.ffn(block, x) + added(module, x, **changes)
    return by_hand.norm(vit.norm, x[:, :-M])


@torch.no_grad()
@pytest.mark.parametrize("share_every", [1, 3, "all"])
def test_the_forward_is_the_one_written_out(share_every: Any) -> None:
    model = tuned(share_every=share_every)
    images = pictures(model.model.vit)
    tokens = model.forward_features(images)
    torch.testing.assert_close(tokens, forward(model, images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images), tokens[:, 0])  # the class token, not prompt 0


@torch.no_grad()
def test_the_attention_is_alive_and_its_scale_that_of_the_bottleneck() -> None:
    model = tuned()
    images = pictures(model.model.vit)
    tokens = model.forward_features(images)
    for changes in ({"asks": False}, {"scale": 0.0}, {"scale": 48**-0.5}):
        other = forward(model, images, **changes)
        assert (tokens - other).abs().max() > 1e-3, changes


def test_what_the_prompts_ask_changes_the_output_by_the_attention_alone() -> None:
    module = modules(tuned())[0]
    stream = torch.randn(2, 1 + M + 16, 48, requires_grad=True)  # as in the model: [class token | prompts | patches]
    out = module(stream)
    asked = torch.autograd.grad(out[:, 1].sum(), stream, retain_graph=True)[0].abs().sum(-1)[0]
    assert (asked > 0).tolist() == [False, True] + [False] * (M - 1) + [True] * 16  # itself and all patches
    prefix = torch.autograd.grad(out[:, 0].sum(), stream, retain_graph=True)[0].abs().sum(-1)[0]
    assert prefix.nonzero().flatten().tolist() == [0]
    patch = torch.autograd.grad(out[:, -1].sum(), stream)[0].abs().sum(-1)[0]
    assert patch.nonzero().flatten().tolist() == [M + 16]


@torch.no_grad()
@pytest.mark.parametrize("kind", VITS)
def test_with_gates_at_zero_only_the_prompts_in_the_sequence_remain(kind: str) -> None:
    vit = VITS[kind]()
    images = pictures(vit)
    model, shallow = apply(copy.deepcopy(vit), "dvpt", num_prompts=M), apply(vit, "vpt_shallow", num_prompts=M).model
    shallow.prompts.copy_(model.model.prompts + model.model.positions)
    torch.testing.assert_close(model(images), shallow(images))
    for module in modules(model):
        module.gate.fill_(1.0)
    assert (model(images) - shallow(images)).abs().max() > 1e-3


@torch.no_grad()
def test_the_branch_stands_outside_layer_scale() -> None:
    vit = small("vit_base_patch14_reg4_dinov2", patch_size=16, depth=1)
    for block in vit.blocks:
        block.ls2.gamma.zero_()  # nothing comes from the FFN
    model = tuned(vit)
    images = pictures(vit)
    seen: list[Tensor] = []
    vit.blocks[0].norm2.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    tokens = model.forward_features(images)
    wanted = seen[0] + modules(model)[0](seen[0])
    torch.testing.assert_close(tokens, vit.norm(torch.cat([wanted[:, :5], wanted[:, 5 + M :]], dim=1)))


@pytest.mark.parametrize(
    ("share_every", "groups"), [(1, "0123456"), (2, "0011223"), (3, "0001112"), ("all", "0000000")]
)
def test_successive_blocks_share_a_module(share_every: Any, groups: str) -> None:
    model = copy.deepcopy(tuned(small(depth=7), share_every=share_every))
    parts = modules(model)
    for part, group in zip(parts, groups, strict=True):
        assert all((part is other) == (group == its) for other, its in zip(parts, groups, strict=True))
    assert model.trainable == model.expected == 2 * M * 48 + len(set(groups)) * (2 * 48 * R + R + 48 + 1)


@pytest.mark.parametrize(
    ("share_every", "count"), [(1, 454_908), (2, 265_854), (3, 202_836), (12, 108_309), ("all", 108_309)]
)
def test_counts_are_the_published_ones(share_every: Any, count: int) -> None:
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224", num_classes=0)
    base.to_empty(device="cpu")
    model = apply(base, "dvpt", share_every=share_every)
    assert model.trainable == model.expected == count


def test_blocks_without_an_ffn_half_and_odd_sharing_are_refused() -> None:
    with pytest.raises(UserError, match="ParallelScalingBlock"):
        apply(small("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock), "dvpt")
    with pytest.raises(UserError, match="share_every"):
        apply(small(), "dvpt", share_every=0)
