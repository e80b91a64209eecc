"""What a line of metrics says of the steps since the line before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .step import Outcome


class Window:
    """Sums over steps, on the device: nothing waits for them until a line is written.

    (S + 5,) sums of S losses and of the gradient's norm, and numbers of steps, of clipped and of skipped steps, and of
    damaged samples that others stood in for.
    """

    def __init__(self, losses: int, device: torch.device):
        self.values = torch.zeros(losses + 5, device=device)

    def add(self, outcome: Outcome) -> None:
        """Add a step; one that was skipped has no norm to speak of."""
        norm = outcome.norm.where(~outcome.skipped, 0)
        counts = (torch.ones_like(norm), outcome.clipped, outcome.skipped, outcome.damaged)
        self.values += torch.stack([*outcome.losses, norm, *counts])

    def take(self, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        """Means of the losses, in total and by name, and of the norm; counts where they are not zero. Starts again."""
        *losses, norm, steps, clipped, skipped, damaged = self.values.tolist()
        self.values.zero_()
        line = {"loss": sum(w * value for w, value in zip(weights, losses, strict=True)) / steps}
        line |= {f"loss/{name}": value / steps for name, value in zip(names, losses, strict=True)}
        line["grad_norm"] = norm / max(steps - skipped, 1)
        counts = {"clipped_steps": clipped, "overflowed_steps": skipped, "damaged": damaged}
        return line | {name: int(count) for name, count in counts.items() if count}
