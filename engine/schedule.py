"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    peak: float,
    schedule: Literal["cosine", "constant"] = "cosine",
    cooldown: float = 0.2,
    lr_floor: float = 0.0,
) -> float:
    """Learning rate of step 0 … steps - 1; `cooldown` is a share of the steps, `lr_floor` one of the peak."""
    if schedule == "cosine":
        return warmup_cosine(step, steps, warmup_steps, peak, lr_floor * peak)
    return warmup_constant_cooldown(step, steps, warmup_steps, peak, cooldown, lr_floor * peak)


def warmup_cosine(step: int, steps: int, warmup_steps: int, peak: float, floor: float = 0.0) -> float:
    """Learning rate of step 0 … steps - 1: linear to `peak`, then half a cosine down to `floor` (MAE, appendix A)."""
    warmup = min(warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_constant_cooldown(
    step: int, steps: int, warmup_steps: int, peak: float, cooldown: float = 0.2, floor: float = 0.0
) -> float:
    """Learning rate of step 0 … steps - 1: linear to `peak`, constant, linear to `floor` (Hägele et al. 2024).

    The fall takes the last round(cooldown * steps) steps, or what warm-up leaves of them. Its first step is still at
    the peak, and the floor is that of step `steps`, as the cosine's is: the last step learns.
    """
    warmup = min(warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    falling = min(round(cooldown * steps), steps - warmup)
    left = min(1.0, (steps - step) / falling) if falling else 1.0
    return floor + (peak - floor) * left


def scaled_lr(blr: float, batch_size: int) -> float:
    """lr = blr * batch / 256 for the global batch (Goyal et al. 2017; MAE, appendix A)."""
    return blr * batch_size / 256
