"""The optimizer's groups against what they were, timm's, closed forms, and themselves on other ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from timm.optim import param_groups_weight_decay
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from miram.engine.loss_scale import LossScale
from miram.engine.objective import Objective
from miram.engine.optim import make_optimizer, set_lr
from miram.engine.recipe import TrainSection


class Tower(Objective):
    """A token, two blocks and a head; the blocks' parameters are not in order of what decays."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.blocks = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        self.head = nn.Linear(3, 1, bias=False)
        self.norm = nn.LayerNorm(1)

    def distances(self) -> dict[str, int]:
        far = {"token": 3, "blocks.0.weight": 2, "blocks.0.bias": 2, "blocks.1.weight": 1, "blocks.1.bias": 1}
        return {name: far[name] for name in reversed(far)}  # the order must not matter

    def forward(self, batch: dict[str, Any]) -> Tensor:
        out: Tensor = self.norm(self.head(self.blocks(batch["x"] + self.token))) + self.head.weight.sum()
        return out.square().sum().reshape(1)


class Matrices(Tower):
    """Nothing of one dimension learns."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.requires_grad_(p.ndim > 1)


class Vectors(Tower):
    """Nothing of two dimensions learns."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.requires_grad_(p.ndim == 1)


def section(**options: Any) -> TrainSection:
    return TrainSection(**{"steps": 1, "weight_decay": 0.3, **options})


def names(objective: nn.Module, group: dict[str, Any]) -> list[str]:
    known = {id(p): name for name, p in objective.named_parameters()}
    return [known[id(p)] for p in group["params"]]


def learn(objective: nn.Module, optimizer: torch.optim.Optimizer, lrs: list[float] | None = None) -> dict[str, Tensor]:
    """Weights after some steps."""
    for step, lr in enumerate(lrs or [0.1, 0.02, 0.3]):
        torch.manual_seed(step)
        objective({"x": torch.randn(2, 4, 3)}).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in objective.named_parameters()}


# ---------------------------------------------------------------------------------------------- decay


def test_without_layer_decay_matrices_and_vectors_are_the_two_groups() -> None:
    objective = Tower()
    groups = make_optimizer(objective, section()).param_groups
    assert [names(objective, group) for group in groups] == [
        ["token", "blocks.0.weight", "blocks.1.weight", "head.weight"],
        ["blocks.0.bias", "blocks.1.bias", "norm.weight", "norm.bias"],
    ]
    assert [(group["weight_decay"], group["lr_scale"], group["lr"]) for group in groups] == [(0.3, 1, 0), (0, 1, 0)]
    assert all(group["fused"] and group["betas"] == (0.9, 0.95) for group in groups)


@pytest.mark.parametrize("kind", [Tower, Matrices, Vectors])
@pytest.mark.parametrize("layer_decay", [None, 1.0])
def test_training_gives_the_bits_of_two_plain_groups(kind: type[Tower], layer_decay: float | None) -> None:
    plain, ours = kind(), kind()
    trainable = [p for p in plain.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    expected = learn(plain, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True))
    found = learn(ours, make_optimizer(ours, section(layer_decay=layer_decay)))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adam_adds_the_decay_to_the_gradient() -> None:
    """L2: of the same weights, torch's own Adam takes the same steps, and AdamW others."""
    plain, ours, other = Tower(), Tower(), Tower()
    trainable = [p for p in plain.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    expected = learn(plain, torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), fused=True))
    found = learn(ours, make_optimizer(ours, section(optimizer="adam")))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    decoupled = learn(other, make_optimizer(other, section()))
    assert not torch.equal(found["head.weight"], decoupled["head.weight"])


def test_what_decays_is_what_decays_in_timm() -> None:
    objective = Tower()
    theirs = {
        id(p): group["weight_decay"] for group in param_groups_weight_decay(objective, 0.3) for p in group["params"]
    }
    for group in make_optimizer(objective, section(layer_decay=0.5)).param_groups:
        assert all(group["weight_decay"] == theirs.pop(id(p)) for p in group["params"])
    assert not theirs


def test_what_is_frozen_is_in_no_group() -> None:
    objective = Tower()
    objective.token.requires_grad_(False)
    objective.blocks[1].requires_grad_(False)
    groups = make_optimizer(objective, section(layer_decay=0.5)).param_groups
    assert sorted(name for group in groups for name in names(objective, group)) == sorted(
        ["blocks.0.weight", "blocks.0.bias", "head.weight", "norm.weight", "norm.bias"]
    )


# ---------------------------------------------------------------------------------------------- layer-wise decay

SCALES = {"token": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "head": 1.0, "norm": 1.0}


def test_first_step_moves_each_parameter_by_its_share_of_the_rate() -> None:
    """Adam's first step is lr * sign(gradient) but for epsilon."""
    before, after = Tower(), Tower()
    optimizer = make_optimizer(after, section(layer_decay=0.5, weight_decay=0.0))
    after({"x": torch.randn(2, 4, 3)}).sum().backward()
    signs = {name: p.grad.sign() for name, p in after.named_parameters() if p.grad is not None}
    set_lr(optimizer, 0.01)
    optimizer.step()
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name, sign in signs.items():
        share = next(scale for prefix, scale in SCALES.items() if name.startswith(prefix))
        moved = new[name].detach() - old[name].detach()
        assert torch.allclose(moved, -0.01 * share * sign, rtol=1e-2, atol=1e-6), name


def test_set_lr_gives_each_group_its_share_as_a_number() -> None:
    optimizer = make_optimizer(Tower(), section(layer_decay=0.5))
    set_lr(optimizer, 0.08)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.08, 0.08, 0.04, 0.04, 0.02, 0.02, 0.01])
    assert all(isinstance(rate, float) for rate in rates)  # a tensor would be read back from the device
    set_lr(optimizer, 0.16)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.02)


def test_distance_of_a_parameter_that_does_not_exist_is_a_mistake() -> None:
    class Mistaken(Tower):
        def distances(self) -> dict[str, int]:
            return {"blocks.7.weight": 1}

    with pytest.raises(AssertionError):
        make_optimizer(Mistaken(), section(layer_decay=0.5))


# ---------------------------------------------------------------------------------------------- shards


def scaled_steps(objective: nn.Module, enabled: bool) -> dict[str, Tensor]:
    """Weights after four steps with layer-wise decay and a scaled loss, the third of them skipped by the flag."""
    optimizer, loss_scale = make_optimizer(objective, section(layer_decay=0.5)), LossScale("cpu", enabled)  # type: ignore[arg-type]
    for step in range(4):
        torch.manual_seed(step)
        (objective({"x": torch.randn(2, 4, 3)}).sum() * loss_scale.scale).backward()
        loss_scale.unscale_([p.grad for p in objective.parameters() if p.grad is not None])
        overflowed = torch.tensor(float(step == 2))
        optimizer.found_inf = overflowed  # type: ignore[attr-defined]
        set_lr(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        loss_scale.update(overflowed)
    return {name: p.detach() for name, p in objective.named_parameters()}


def sharded_steps() -> dict[str, Tensor]:
    """On a rank: the same batch on both, so that the mean of gradients rounds nothing."""
    distributed.init_process_group("gloo")
    mesh = distributed.init_device_mesh("cpu", (2,))
    objective = Tower()
    for block in objective.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    found: dict[str, Any] = scaled_steps(objective, enabled=True)
    return {name: tensor.full_tensor() for name, tensor in found.items()}


def test_sharded_scaled_training_is_that_of_the_whole_to_the_bit() -> None:
    found, expected = on_ranks(2, sharded_steps)[0], scaled_steps(Tower(), enabled=False)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_sgd_is_the_gradient_times_the_rate() -> None:
    objective = Tower()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = make_optimizer(objective, section(optimizer="sgd", weight_decay=0.0))
    set_lr(optimizer, 0.1)
    objective({"x": torch.randn(4, 3)}).sum().backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, p in objective.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradients[name])


def test_sgd_leaves_everything_where_the_guard_says_so() -> None:
    objective = Tower()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = make_optimizer(objective, section(optimizer="sgd"))
    set_lr(optimizer, 0.1)
    objective({"x": torch.randn(4, 3)}).sum().backward()
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in objective.named_parameters())
