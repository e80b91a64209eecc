"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup_steps: int, peak: float, floor: float = 0.0) -> float:
    """Learning rate of step 0 … steps - 1: linear to `peak`, then half a cosine down to `floor` (MAE, appendix A)."""
    warmup = min(warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def scaled_lr(blr: float, batch_size: int) -> float:
    """lr = blr * batch / 256 for the global batch (Goyal et al. 2017; MAE, appendix A)."""
    return blr * batch_size / 256
