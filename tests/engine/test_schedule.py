"""Learning rate against closed forms and torch's schedulers."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from miram.engine.schedule import learning_rate, scaled_lr, warmup_constant_cooldown, warmup_cosine


def rates_of_torch(scheduler: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int) -> list[float]:
    """Of so many steps from a peak of 0.1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, rates = scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.2),  # 1/10 of the peak: the first step already learns
        (8, 1.8),
        (9, 2.0),
        (10, 2.0),  # the cosine starts from the peak
        (60, 1.0),  # half way down
        (35, 1 + cos(pi / 4)),
        (109, 1 + cos(pi * 99 / 100)),
    ],
)
def test_rate_has_its_closed_form(step: int, rate: float) -> None:
    assert warmup_cosine(step, steps=110, warmup_steps=10, peak=2.0) == pytest.approx(rate, rel=1e-12)


def test_floor_is_where_the_cosine_ends() -> None:
    assert warmup_cosine(50, steps=100, warmup_steps=0, peak=3.0, floor=1.0) == pytest.approx(2.0)
    assert warmup_cosine(100, steps=100, warmup_steps=0, peak=3.0, floor=1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_constant_cooldown])
@pytest.mark.parametrize("warmup", [5, 6, 1000])
def test_warm_up_is_at_most_all_steps(schedule: Callable[..., float], warmup: int) -> None:
    rates = [schedule(step, steps=5, warmup_steps=warmup, peak=1.0) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("cooldown", [None, 0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (300, 0), (300, 7), (300, 299)])
def test_rate_rises_to_the_peak_then_falls_and_stays_positive(steps: int, warmup: int, cooldown: float | None) -> None:
    def rate(step: int) -> float:
        if cooldown is None:
            return warmup_cosine(step, steps, warmup, peak=0.1)
        return warmup_constant_cooldown(step, steps, warmup, 0.1, cooldown)

    rates = [rate(step) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(0.1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


@pytest.mark.parametrize(("batch", "rate"), [(256, 1.5e-4), (4096, 2.4e-3), (32, 1.875e-5)])
def test_rate_is_proportional_to_the_global_batch(batch: int, rate: float) -> None:
    assert scaled_lr(1.5e-4, batch) == pytest.approx(rate, rel=1e-12)


# ---------------------------------------------------------------------------------------------- constant and cooldown


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.2),
        (9, 2.0),
        (10, 2.0),
        (79, 2.0),
        (80, 2.0),  # the fall starts from the peak
        (81, 2.0 - 1.8 / 20),  # a twentieth of the way to the floor
        (90, 1.1),  # half way down
        (99, 0.2 + 1.8 / 20),  # the last step still learns
        (100, 0.2),
    ],
)
def test_constant_rate_falls_over_the_last_share_of_the_steps(step: int, rate: float) -> None:
    found = warmup_constant_cooldown(step, steps=100, warmup_steps=10, peak=2.0, cooldown=0.2, floor=0.2)
    assert found == pytest.approx(rate, rel=1e-12)


def test_without_cooldown_the_rate_stays() -> None:
    rates = [warmup_constant_cooldown(step, 10, 2, 0.3, cooldown=0.0) for step in range(11)]
    assert rates == pytest.approx([0.15] + [0.3] * 10)


@pytest.mark.parametrize("cooldown", [0.8, 0.9, 1.0])
def test_a_cooldown_that_reaches_into_warm_up_takes_what_warm_up_leaves(cooldown: float) -> None:
    rates = [warmup_constant_cooldown(step, 10, 2, 1.0, cooldown) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0] + [1 - k / 8 for k in range(8)])


@pytest.mark.parametrize("cooldown", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_a_single_step_is_taken_at_the_peak(warmup: int, cooldown: float) -> None:
    assert warmup_constant_cooldown(0, 1, warmup, 0.7, cooldown) == pytest.approx(0.7)


@pytest.mark.parametrize(("cooldown", "falling"), [(0.24, 2), (0.26, 3), (0.04, 0)])
def test_cooldown_is_rounded_to_whole_steps(cooldown: float, falling: int) -> None:
    rates = [warmup_constant_cooldown(step, 10, 0, 1.0, cooldown) for step in range(10)]
    assert sum(rate < 1 for rate in rates) == max(0, falling - 1)
    assert rates[-1] == pytest.approx(1 / falling if falling else 1)


# ---------------------------------------------------------------------------------------------- as torch has it


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warm_up_is_torchs_linear_one(schedule: str) -> None:
    found = [learning_rate(s, steps=20, warmup_steps=7, peak=0.1, schedule=schedule) for s in range(7)]  # type: ignore[arg-type]
    expected = rates_of_torch(lambda optimizer: LinearLR(optimizer, 1 / 7, total_iters=6), 7)
    assert found == pytest.approx(expected, rel=1e-9)


def test_cosine_after_warm_up_is_torchs_annealing() -> None:
    found = [learning_rate(s, steps=27, warmup_steps=7, peak=0.1, lr_floor=0.3) for s in range(7, 28)]
    expected = rates_of_torch(lambda optimizer: CosineAnnealingLR(optimizer, T_max=20, eta_min=0.03), 21)
    assert found == pytest.approx(expected, rel=1e-9)


def test_cooldown_is_torchs_linear_fall() -> None:
    found = [
        learning_rate(s, steps=30, warmup_steps=7, peak=0.1, schedule="constant", cooldown=0.4, lr_floor=0.3)
        for s in range(18, 31)
    ]
    expected = rates_of_torch(lambda optimizer: LinearLR(optimizer, 1.0, 0.3, total_iters=12), 13)
    assert found == pytest.approx(expected, rel=1e-9)


def test_without_a_floor_the_cosine_gives_the_bits_it_always_gave() -> None:
    for step in range(100):
        old = 0.37 * 0.5 * (1 + cos(pi * ((step - 10) / 90))) if step >= 10 else 0.37 * (step + 1) / 10
        assert learning_rate(step, steps=100, warmup_steps=10, peak=0.37) == old
