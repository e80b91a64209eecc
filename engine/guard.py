"""Stopping well: a signal becomes a checkpoint, a loss that is no number becomes a clear end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .errors import RunFailed


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C; the loop asks at step boundaries. A second Ctrl-C ends the process."""

    CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = ""

    def __enter__(self) -> StopSignals:
        self._before: dict[signal.Signals, Any] = {s: signal.signal(s, self._note) for s in self.CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank was told to stop: all ranks get the same answer, so that none waits for another."""
        if accelerator.num_processes == 1:
            return bool(self.received)
        flag = torch.tensor(float(bool(self.received)), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item() > 0)


def ignore_stop_signals(_: int) -> None:
    """For data workers: the group's signal is for the loop, which still needs them to finish its step."""
    for number in StopSignals.CAUGHT:
        signal.signal(number, signal.SIG_IGN)


def require_finite(values: Tensor, step: int) -> None:
    """Stop before a broken loss reaches a log line or a checkpoint.

    Raises:
        RunFailed: a value is infinite or not a number.
    """
    if not torch.isfinite(values).all():
        raise RunFailed(
            f"a loss or gradient became infinite or not a number by step {step}; the last checkpoint is sound. "
            "Try a lower train.blr, a longer train.warmup_steps, train.clip_grad=1 or train.precision=fp32"
        )
