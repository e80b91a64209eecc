"""Loss scaling against torch's GradScaler, step by step, and against arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from miram.engine.loss_scale import LossScale

CPU = torch.device("cpu")
YES, NO = torch.tensor(1.0), torch.tensor(0.0)

SERIES: dict[str, Callable[[int], bool]] = {
    "never": lambda step: False,
    "at the start": lambda step: step < 5,
    "a step before it would grow": lambda step: step == 1999,
    "at the step at which it would grow": lambda step: step == 2000,
    "now and then": lambda step: step in (3, 4, 700, 2701, 2702, 4703),
    "often": lambda step: step % 700 == 0,
}


def scales_of_torch(overflows: Callable[[int], bool], steps: int) -> list[float]:
    weight = nn.Parameter(torch.zeros(1))
    optimizer, scaler, scales = torch.optim.SGD([weight], lr=0.0), torch.amp.GradScaler("cpu"), []
    scaler.scale(torch.zeros(1))  # makes its tensors
    for step in range(steps):
        weight.grad = torch.full((1,), float("inf") if overflows(step) else 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("overflows", SERIES.values(), ids=SERIES.keys())
def test_scale_is_torchs_at_every_step(overflows: Callable[[int], bool]) -> None:
    ours, found = LossScale(CPU, enabled=True), []
    for step in range(4500):
        ours.update(YES if overflows(step) else NO)
        found.append(ours.scale.item())
    assert found == scales_of_torch(overflows, 4500)


def test_scale_stays_between_1_and_2_to_the_24th() -> None:
    ours = LossScale(CPU, enabled=True)
    for step in range(40):
        ours.update(YES)
        assert ours.scale.item() == max(1.0, 2.0 ** (15 - step))
    ours.load(torch.tensor([2.0**23, 0.0]))
    for expected in (2.0**24, 2.0**24):
        for _ in range(2000):
            ours.update(NO)
        assert ours.scale.item() == expected


@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3)])
def test_any_flag_that_is_not_zero_is_an_overflow(flag: Tensor) -> None:
    ours = LossScale(CPU, enabled=True)
    ours.update(flag)
    assert ours.scale.item() == 2.0**15
    ours.update(torch.zeros_like(flag))
    assert ours.scale.item() == 2.0**15


def test_unscaled_gradients_are_those_without_a_scale_to_the_bit() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    layer(x).square().mean().backward()
    expected = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    ours = LossScale(CPU, enabled=True)
    (layer(x).square().mean() * ours.scale).backward()
    found = [p.grad for p in layer.parameters() if p.grad is not None]
    assert not torch.equal(found[0], expected[0])
    ours.unscale_(found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("enabled", "survives"), [(True, True), (False, False)])
def test_gradient_too_small_for_fp16_survives_by_the_scale_alone(enabled: bool, survives: bool) -> None:
    ours, weight = LossScale(CPU, enabled), torch.ones(1, requires_grad=True)
    (weight.half().float() * 1e-9 * ours.scale).sum().backward()  # its gradient passes through fp16
    assert weight.grad is not None
    ours.unscale_([weight.grad])
    assert (weight.grad.item() == pytest.approx(1e-9, rel=1e-3)) is survives


def test_taken_up_from_its_state_it_goes_on_as_it_would_have() -> None:
    overflows = {1, 2, 2500, 2600}
    whole = LossScale(CPU, enabled=True)
    expected = []
    for step in range(5000):
        whole.update(YES if step in overflows else NO)
        expected.append(whole.scale.item())
        if step == 2550:
            state = whole.state()
    resumed = LossScale(CPU, enabled=True)
    resumed.load(state)
    found = []
    for step in range(2551, 5000):
        resumed.update(YES if step in overflows else NO)
        found.append(resumed.scale.item())
    assert state.tolist() == [2.0**14, 50]  # halved thrice, doubled once, 50 steps ago
    assert found == expected[2551:]
    assert len(set(found)) > 1


def test_disabled_it_does_nothing() -> None:
    ours, gradient = LossScale(CPU, enabled=False), torch.full((2,), 3.0)
    ours.load(torch.tensor([8.0, 1.0]))
    ours.unscale_([gradient])
    for flag in (YES, NO):
        ours.update(flag)
    assert ours.scale.item() == 1
    assert ours.state().tolist() == [1, 0]
    assert gradient.tolist() == [3, 3]


def test_nothing_is_read_back_from_the_device() -> None:
    """On the meta device there is nothing to read: whoever tries raises."""
    meta = torch.device("meta")
    ours, gradient = LossScale(meta, enabled=True), torch.ones(2, device=meta)
    ours.unscale_([gradient])
    ours.update(torch.ones((), device=meta))
    ours.load(ours.state())
    with pytest.raises(RuntimeError):
        ours.scale.item()
