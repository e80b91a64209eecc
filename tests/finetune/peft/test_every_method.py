"""What must hold of every tuning method, on every kind of ViT: identity, gradients, counts, files, copies, merging."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vits import VITS, pictures

from miram.engine.errors import UserError
from miram.finetune.peft import METHODS, Tuned, apply, load, save

OPTIONS: dict[str, dict[str, Any]] = {  # small enough for two blocks of width 48; no dropout, so that runs compare
    "lora": {"rank": 2, "targets": ["qkv", "proj", "fc1", "fc2"]},
    "dora": {"rank": 2},
    "houlsby": {"dim": 4},
    "adaptformer": {"dim": 8, "dropout": 0.0},
    "vpt_shallow": {"num_prompts": 3},
    "vpt_deep": {"num_prompts": 3},
    "vpt_gated": {"num_prompts": 3},
    "dvpt": {"num_prompts": 3, "dim": 4, "share_every": 2},
}
KINDS = ("class token", "no class token", "registers, LayerScale", "rotary, registers", "things in parallel")
everywhere = pytest.mark.parametrize(("method", "kind"), [(method, kind) for method in METHODS for kind in VITS])


def on_kinds(methods: Iterable[str]) -> Any:
    """Each method on a few kinds; on the others too among the slow tests."""
    pairs = [(m, k, [] if k in KINDS else [pytest.mark.slow]) for m in methods for k in VITS]
    return pytest.mark.parametrize(("method", "kind"), [pytest.param(m, k, marks=marks) for m, k, marks in pairs])


every = on_kinds(METHODS)


def tuned(method: str, kind: str) -> Tuned:
    torch.manual_seed(3)
    return apply(VITS[kind](), method, **OPTIONS.get(method, {})).eval()


def learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def moved(model: Tuned) -> Tuned:
    """Every number that learns somewhere else, as after a training."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in learnt(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def images(kind: str) -> Tensor:
    return pictures(VITS[kind](), 4)


def train(model: Tuned, x: Tensor, steps: int) -> None:
    """Steps of AdamW on four images of two classes, then one more backward pass, whose gradients stay."""
    model.train()
    optimizer = torch.optim.AdamW(learnt(model).values(), lr=1e-3)
    for step in range(steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 0, 1])).backward()
        if step < steps:
            optimizer.step()
    model.eval()


@everywhere
def test_the_count_is_the_closed_form(method: str, kind: str) -> None:
    model = tuned(method, kind)
    total = sum(p.numel() for p in model.model.parameters())
    assert model.trainable + model.frozen == total
    assert model.expected == model.trainable or (model.expected is None and method in ("full", "bitfit", "ln"))


@everywhere
@torch.no_grad()
def test_an_additive_method_begins_as_the_encoder(method: str, kind: str) -> None:
    x, model = images(kind), tuned(method, kind)
    same = (model(x) - VITS[kind]()(x)).abs().max() < 1e-5
    assert same == METHODS[method].additive
    assert model(x).shape == (4, 48)


@everywhere
def test_every_tensor_that_learns_has_a_gradient_after_one_step(method: str, kind: str) -> None:
    model = tuned(method, kind)
    model.set_head(2)
    train(model.double(), images(kind).double(), steps=1)
    for name, tensor in learnt(model).items():
        if not name.endswith("k_norm.bias"):  # the same for every key, so softmax takes it away again
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name
            assert tensor.grad.abs().max() > 1e-13, name  # what cancels leaves 1e-18


@every
def test_training_leaves_what_is_frozen_to_the_bit_and_moves_the_rest(method: str, kind: str) -> None:
    model = tuned(method, kind)
    model.set_head(2)
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    train(model, images(kind), steps=3)
    names = learnt(model).keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, before[name]) == (name not in names), name


@every
@torch.no_grad()
def test_every_tensor_that_learns_changes_the_output(method: str, kind: str) -> None:
    x, model = images(kind).double(), moved(tuned(method, kind)).double()
    before = model(x)
    for name, tensor in learnt(model).items():
        if not name.endswith("k_norm.bias"):
            was = tensor.clone()
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)))
            assert (model(x) - before).abs().max() > 1e-9, name
            tensor.copy_(was)


@every
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(method: str, kind: str, tmp_path: Path) -> None:
    model = tuned(method, kind)
    model.set_head(2)
    moved(model)
    save(model, tmp_path / "adapter")
    again = load(tmp_path / "adapter", VITS[kind]()).eval()
    assert torch.equal(again(images(kind)), model(images(kind)))
    assert learnt(again).keys() == learnt(model).keys()


@every
@torch.no_grad()
def test_a_deep_copy_stands_on_its_own(method: str, kind: str) -> None:
    x, model = images(kind), moved(tuned(method, kind))
    before, twin = model(x), copy.deepcopy(model)
    for tensor in model.parameters():
        tensor.zero_()
    assert torch.equal(twin(x), before)


@every
def test_checkpointing_changes_no_gradient(method: str, kind: str) -> None:
    x, gradients = images(kind), []
    for recompute in (False, True):
        model = moved(tuned(method, kind))
        model.set_grad_checkpointing(recompute)
        model.set_head(2)
        nn.init.constant_(model.head.weight[0], 0.1)
        F.cross_entropy(model(x), torch.tensor([0, 1, 0, 1])).backward()
        gradients.append([tensor.grad for tensor in learnt(model).values()])
    for without, given in zip(*gradients, strict=True):
        assert torch.allclose(without, given, rtol=1e-4, atol=1e-7)


@every
def test_half_precision_gives_about_the_same(method: str, kind: str) -> None:
    x, model = images(kind), moved(tuned(method, kind))
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert F.cosine_similarity(rough.float(), exact, dim=1).min() > 0.98


@on_kinds(name for name, method in METHODS.items() if method.merges)
@torch.no_grad()
def test_merged_computes_the_same_and_is_a_plain_encoder(method: str, kind: str) -> None:
    x, model = images(kind), moved(tuned(method, kind))
    before = model(x)
    merged = model.merged().eval()
    plain = VITS[kind]()
    assert torch.allclose(merged(x), before, atol=2e-5)
    assert type(merged) is type(plain)
    assert merged.state_dict().keys() - {n for n in merged.state_dict() if n.endswith("bias")} == (
        plain.state_dict().keys() - {n for n in plain.state_dict() if n.endswith("bias")}
    )


@every
@torch.no_grad()
def test_an_encoder_of_half_precision_is_tuned_as_it_is(method: str, kind: str) -> None:
    vit = VITS[kind]().bfloat16()
    model = apply(vit, method, **OPTIONS.get(method, {}))
    assert model(images(kind).bfloat16()).isfinite().all()


@everywhere
def test_what_learns_can_be_sharded_and_is_held_once(method: str, kind: str) -> None:
    model = tuned(method, kind)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(model.parameters())), "a tensor is a child of two modules, which FSDP2 cannot have"
    assert all(tensor.dim() > 0 for tensor in model.parameters()), "FSDP2 takes no scalars"


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.merges])
def test_what_cannot_merge_says_so(method: str) -> None:
    with pytest.raises(UserError, match="does not merge"):
        tuned(method, "class token").merged()
