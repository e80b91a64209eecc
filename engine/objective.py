"""What plugs into the training loop: an objective, a stream of batches, a monitor."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Any]


class Objective(nn.Module):
    """What is learnt: a module whose forward maps a batch to S sums of losses."""

    loss_names: tuple[str, ...]
    loss_weights: tuple[float, ...]

    def counts(self, batch: Batch) -> Tensor:
        """(S,) how much each loss of this batch counts: its number of patches, images or whatever it sums over."""
        raise NotImplementedError

    def begin_step(self, step: int, steps: int) -> None:
        """Called once before the step's first forward: for what changes from step to step without being learnt."""

    def distances(self) -> dict[str, int]:
        """Blocks between a parameter and what is last, for layer-wise decay; names left out are at 0."""
        return {}


class Stream(Protocol):
    """Where batches come from."""

    batches_per_epoch: int

    def skipped(self) -> int:
        """How many samples of this rank could not be read, and were skipped, since this was last asked."""
        ...

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Generator[Batch]:
        """Micro-batches of this rank from global batch `start` on, without end; a batch's `key` names its samples."""
        ...


class Monitor(Protocol):
    """Looks at a training now and then, on the main process alone, and changes nothing of it."""

    every: int | None  # steps between looks; None: only at the end

    def __call__(self, step: int) -> dict[str, float]:
        """Look, and return what belongs into the line of metrics."""
        ...
