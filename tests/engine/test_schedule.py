"""Learning rate against its closed form."""

from __future__ import annotations

from math import cos, pi

import pytest

from miram.engine.schedule import scaled_lr, warmup_cosine


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


@pytest.mark.parametrize("warmup", [5, 6, 1000])
def test_warm_up_is_at_most_all_steps(warmup: int) -> None:
    rates = [warmup_cosine(step, steps=5, warmup_steps=warmup, peak=1.0) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (300, 0), (300, 7), (300, 299)])
def test_rate_rises_to_the_peak_then_falls_and_stays_positive(steps: int, warmup: int) -> None:
    rates = [warmup_cosine(step, steps, warmup, peak=0.1) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(0.1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


@pytest.mark.parametrize(("batch", "rate"), [(256, 1.5e-4), (4096, 2.4e-3), (32, 1.875e-5)])
def test_rate_is_proportional_to_the_global_batch(batch: int, rate: float) -> None:
    assert scaled_lr(1.5e-4, batch) == pytest.approx(rate, rel=1e-12)
