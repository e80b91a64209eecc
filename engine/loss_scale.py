"""Loss scaling for fp16, whose gradients would else underflow (Micikevicius et al. 2018, section 3.2).

Not torch's GradScaler: that looks for overflow at each optimizer by itself and on each rank for itself, and reads it
back on the host. Here the flag comes from outside, combined over ranks, and nothing leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

START, LEAST, MOST = 2.0**16, 1.0, 2.0**24
GROW_AFTER = 2000  # steps without overflow


class LossScale:
    """The power of two that the loss is multiplied by before the backward pass.

    It is halved when gradients overflow and doubled after 2000 steps without, as torch's, but stays within 1 … 2**24:
    gradients that overflow at 1 are no fault of the scale. When not enabled it is 1 for good.
    """

    def __init__(self, device: torch.device | str, enabled: bool):
        self.enabled = enabled
        self._values = torch.tensor([START if enabled else 1.0, 0.0], device=device)
        self.scale, self._clean = self._values[0], self._values[1]  # views: 0-D, and always these

    @torch.no_grad()
    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale in place; exact, as it is a power of two."""
        if self.enabled and gradients:
            torch._foreach_mul_(list(gradients), self.scale.reciprocal())

    @torch.no_grad()
    def update(self, overflowed: Tensor) -> None:
        """Adapt the scale to whether the step's gradients overflowed on any rank: 0-D, the same on all, not 0 if so."""
        if not self.enabled:
            return
        fine = overflowed == 0
        clean = (self._clean + 1).where(fine, 0)
        grown = clean == GROW_AFTER
        scale = (2 * self.scale).where(grown, self.scale).where(fine, self.scale / 2)
        self.scale.copy_(scale.clamp(LEAST, MOST))
        self._clean.copy_(clean.where(~grown, 0))

    def state(self) -> Tensor:
        """(2,) scale and steps since it last changed or overflowed."""
        return self._values.clone()

    def load(self, state: Tensor) -> None:
        """Take up a state."""
        if self.enabled:
            self._values.copy_(state)
