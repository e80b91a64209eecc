"""Stopping well: ranks agree on it, and a loss that is no number or memory that runs out becomes a clear end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .errors import RunFailed

FEW = 16  # samples that a sentence can name


# ---------------------------------------------------------------------------------------------- what ranks agree on


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step."""

    broken: int = 0  # the first step whose loss or gradient is no number
    stop: bool = False  # some rank was told to stop
    save: bool = False  # the main process finds that it is time for a checkpoint

    def __or__(self, other: Agreed) -> Agreed:
        return Agreed(self.broken or other.broken, self.stop or other.stop, self.save or other.save)


class Bulletin:
    """Three flags of each step, copied to the host while the device works, and read a step later: nothing waits.

    (3,) broken, stop, save, summed over ranks.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.pages = [torch.zeros(3, pin_memory=self.on_gpu) for _ in range(2)]
        self.sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def post(self, step: int, flags: Tensor) -> None:
        """Send those of a step."""
        page = self.pages.pop(0)
        self.pages.append(page)
        page.copy_(flags, non_blocking=True)
        event = None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.sent.append((step, page, event))

    def read(self, waiting: bool) -> Agreed:
        """What was posted the time before last or, `waiting` for the device, last."""
        agreed = Agreed()
        while len(self.sent) > (0 if waiting else 1):
            step, page, event = self.sent.popleft()
            if event is not None:
                event.synchronize()
            broken, stop, save = (value > 0 for value in page.tolist())
            agreed |= Agreed(step * broken, stop, save)
        return agreed


class Culprits:
    """Which samples of the last two steps gave this rank a loss that is no number."""

    def __init__(self) -> None:
        self.steps: deque[tuple[int, Tensor, list[list[str]]]] = deque(maxlen=2)

    def note(self, step: int, broken: Tensor, keys: list[list[str]]) -> None:
        """(M,) flags and the sample keys of a step's M micro-batches; the flags stay on the device."""
        self.steps.append((step, broken, keys))

    def named(self, accelerator: Accelerator, step: int) -> str:
        """A clause about a broken step, the same on all ranks, which must all ask."""
        said = gather_object([self._of(accelerator.process_index, step)])
        return "; ".join(filter(None, said)) or (
            f"the gradient of step {step} is infinite or not a number, though its losses are numbers"
        )

    def _of(self, rank: int, step: int) -> str:
        _, flags, keys = next(noted for noted in self.steps if noted[0] == step)
        bad = [key for flag, batch in zip(flags.tolist(), keys, strict=True) if flag for key in batch]
        more = f" and {len(bad) - FEW} more" if len(bad) > FEW else ""
        names = f" of samples {', '.join(bad[:FEW])}{more}" if bad else ""
        return f"on rank {rank} the loss of step {step}{names} is infinite or not a number" if flags.any() else ""


# ---------------------------------------------------------------------------------------------- memory


class OutOfMemory(RunFailed):
    """The device, or the machine, has no memory for a step."""


@contextmanager
def telling_of_memory(what: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that failed into one sentence that says `what` did not fit.

    Raises:
        OutOfMemory: torch got no memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"out of memory: {what()}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no class of its own for it
            raise
        raise OutOfMemory(f"out of memory: {what()}") from error


# ---------------------------------------------------------------------------------------------- other ranks


@contextmanager
def telling_of_lost_ranks() -> Iterator[None]:
    """Turn what torch says when another rank is gone into a sentence.

    Raises:
        RunFailed: one is.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise RunFailed("another rank is gone; it says why, or was killed; what was saved before is sound") from error
