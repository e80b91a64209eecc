"""The moving average against its closed form, torch's, timm's, and itself on other ranks or taken up again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ranks import on_ranks
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from miram.engine.ema import Ema

WARM = 10**6  # a step at which every decay is what was asked for


def model() -> nn.Sequential:
    """Of three layers, the second frozen; the first divides over two ranks unevenly, the last leaves one nothing."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    layers[1].requires_grad_(False)
    return layers


def wander(module: nn.Module, steps: range) -> Iterator[int]:
    """Move every trainable parameter a step; the same way wherever it lies."""
    for step in steps:
        with torch.no_grad():
            for i, p in enumerate(p for p in module.parameters() if p.requires_grad):
                p.mul_(0.9).add_(0.1 * (step % 7) - 0.05 * i)
        yield step


def test_average_has_its_closed_form() -> None:
    """After n steps: the sum over steps k of (1 - d_k) d_{k+1} … d_{n-1} w_k, the start weighing d_0 … d_{n-1}."""
    moving, weights = model(), []
    ema = Ema(moving, decay=0.6)
    weights.append(moving[0].weight.detach().double().clone())
    for step in wander(moving, range(12)):
        weights.append(moving[0].weight.detach().double().clone())
        ema.update(step)
    decays = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 9 / 18, 10 / 19, 11 / 20, 12 / 21]
    shares = [1.0] + [1 - decay for decay in decays]
    for k, decay in enumerate(decays):
        shares[: k + 1] = [share * decay for share in shares[: k + 1]]
    assert sum(shares) == pytest.approx(1)
    expected = sum((share * weight for share, weight in zip(shares, weights, strict=True)), torch.zeros(5, 3).double())
    assert (ema.tensors["0.weight"] - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [(0.999, 0, 0.1), (0.999, 90, 0.91), (0.999, 8989, 8990 / 8999), (0.999, 8991, 0.999), (0.05, 0, 0.05)],
)
def test_decay_warms_up_by_the_step_alone(decay: float, step: int, expected: float) -> None:
    assert Ema(model(), decay).decay_at(step) == pytest.approx(expected, rel=1e-12)


def test_warm_average_is_torchs_to_the_bit() -> None:
    moving = model()
    ema = Ema(moving, decay=0.97)
    theirs = AveragedModel(moving, multi_avg_fn=get_ema_multi_avg_fn(0.97))
    theirs.update_parameters(moving)  # the first time it copies
    for _ in wander(moving, range(20)):
        ema.update(WARM)
        theirs.update_parameters(moving)
    for name, value in theirs.module.named_parameters():
        if name in ema.tensors:
            assert torch.equal(ema.tensors[name], value)


def test_warm_average_is_timms_to_the_bit() -> None:
    moving = model()
    ema, theirs = Ema(moving, decay=0.97), ModelEmaV3(moving, decay=0.97)
    for _ in wander(moving, range(20)):
        ema.update(WARM)
        theirs.update(moving)
    for name, value in theirs.module.named_parameters():
        if name in ema.tensors:
            assert torch.equal(ema.tensors[name], value)


def test_only_what_is_learnt_is_averaged() -> None:
    assert list(Ema(model(), 0.9).tensors) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_average_starts_from_the_weights_and_is_no_view_of_them() -> None:
    moving, start = model(), model()
    ema = Ema(moving, 0.9)
    for _ in wander(moving, range(3)):
        pass
    assert torch.equal(ema.tensors["0.weight"], start[0].weight)


def test_average_needs_more_than_half_precision() -> None:
    with pytest.raises(AssertionError):
        Ema(model().bfloat16(), 0.9)


def test_average_taken_up_again_goes_on_to_the_bit() -> None:
    whole = model()
    uninterrupted = Ema(whole, 0.8)
    for step in wander(whole, range(20)):
        uninterrupted.update(step)
    moving = model()
    first = Ema(moving, 0.8)
    for step in wander(moving, range(9)):
        first.update(step)
    saved = {name: tensor.clone() for name, tensor in first.tensors.items()}
    second = Ema(moving, 0.8)
    for name, tensor in second.tensors.items():
        tensor.copy_(saved[name])
    for step in wander(moving, range(9, 20)):
        second.update(step)
    assert all(torch.equal(second.tensors[name], value) for name, value in uninterrupted.tensors.items())


def test_nothing_is_read_back_from_the_device() -> None:
    """On the meta device there is nothing to read: whoever tries raises."""
    ema = Ema(model().to("meta"), 0.9)
    ema.update(3)
    with pytest.raises(RuntimeError):
        ema.tensors["0.bias"].sum().item()


# ---------------------------------------------------------------------------------------------- shards


def averages(moving: nn.Module) -> dict[str, Tensor]:
    """After ten steps."""
    ema = Ema(moving, 0.7)
    for step in wander(moving, range(10)):
        ema.update(step)
    return ema.tensors


def sharded_averages() -> dict[str, Tensor]:
    """On a rank: a shard of each parameter through ten steps, gathered."""
    distributed.init_process_group("gloo")
    found = averages(fully_shard(model(), mesh=distributed.init_device_mesh("cpu", (2,))))
    assert all(isinstance(tensor, DTensor) for tensor in found.values())
    return {name: tensor.full_tensor() for name, tensor in found.items() if isinstance(tensor, DTensor)}


def test_average_of_shards_is_that_of_the_whole_to_the_bit() -> None:
    found, expected = on_ranks(2, sharded_averages)[0], averages(model())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
