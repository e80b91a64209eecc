"""Signals that ask a run to stop: noted when they come, obeyed between two steps. Imports nothing slow."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

QUEUES = (signal.SIGTERM, signal.SIGUSR1)  # what queues and launchers send
CAUGHT = (*QUEUES, signal.SIGINT)


class StopSignals:
    """Notes SIGTERM and SIGUSR1 inside its `with`, and Ctrl-C while `training`; a second Ctrl-C ends the process.

    To be entered before torch is imported: a queue may send its signal while a run is still starting, which then takes
    a step, saves and leaves as it would have later. Ctrl-C of someone who waits for the start is obeyed at once.
    """

    def __init__(self) -> None:
        self.received = ""

    def __enter__(self) -> StopSignals:
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, self._note) for number in QUEUES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, Ctrl-C is noted, too."""
        before = {number: signal.signal(number, self._note) for number in CAUGHT}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.received and os.environ.get("RANK", "0") == "0":
            again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            with suppress(OSError):  # not print, which the handler may have interrupted
                os.write(2, f"\nmiram: saving after this step{again}\n".encode())
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_stop_signals(_: int) -> None:
    """For data workers: the group's signal is for the loop, which still needs them to finish its step."""
    for number in CAUGHT:
        signal.signal(number, signal.SIG_IGN)
