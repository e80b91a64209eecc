"""Where the time of a few steps goes, on demand.

RUN/profile/steps-10-20.rank0.json.gz    Chrome trace of steps 10 to 19: open it in ui.perfetto.dev or chrome://tracing
RUN/profile/steps-10-20.rank0.txt        the ten operations that cost most

Names hold the steps that were profiled, which are fewer than asked for where a start ended or began inside the window.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, record_function, supported_activities
from torch.profiler import profile as torch_profile

from .files import write_atomic

if TYPE_CHECKING:
    from torch.autograd.profiler_util import EventList

MARK = "miram step "  # begins the name of each step's span in the trace
COSTLIEST = 10


def parse_window(text: str) -> tuple[int, int]:
    """(first, end) of a window such as "10:20": steps 10 to 19, numbered as in metrics.jsonl, where the first is 1.

    Raises:
        ValueError: it is no such window.
    """
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if not found or not 1 <= int(found[1]) < int(found[2]):
        raise ValueError(
            f"{text!r} is no window of steps; write 10:20 for steps 10 to 19, as metrics.jsonl numbers them from 1"
        )
    return int(found[1]), int(found[2])


class Profile:
    """Torch's profiler on a window of steps; without a window, nothing.

    Args:
        window: as `parse_window` reads it, or None.
        folder: the run's.
        rank: of this process; each writes its own files.
    """

    def __init__(self, window: str | None, folder: Path, rank: int):
        self.first, self.end = parse_window(window) if window else (0, 0)
        self.folder, self.rank = folder / "profile", rank
        self._profiler: torch_profile | None = None
        self._mark: record_function
        self._last: int

    def at(self, step: int) -> None:
        """A step begins, the one that metrics.jsonl will call `step`.

        Its span in the trace lasts until the next one begins: logging and saving are in it.
        """
        inside = self.first <= step < self.end
        if self._profiler is not None:
            self._mark.__exit__(None, None, None)
            if not inside:
                self._write()
        elif inside:
            self._start(step)
        if inside:
            self._last = step
            self._mark = record_function(f"{MARK}{step}")
            self._mark.__enter__()

    def close(self) -> None:
        """Write what there is, if a window is open."""
        if self._profiler is not None:
            self._mark.__exit__(None, None, None)
            self._write()

    def _start(self, step: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it calls a machine without a GPU an error
        self._from = step
        self._profiler = torch_profile(activities=supported_activities())
        self._profiler.start()

    def _write(self) -> None:
        """Stop and write; a full disk must not end the training."""
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        name = f"steps-{self._from}-{self._last + 1}.rank{self.rank}"
        trace = self.folder / f"{name}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            write_atomic(self.folder / f"{name}.txt", costliest(profiler.key_averages()))
        except OSError as error:
            print(f"miram: no profile: {trace}: {error.strerror}; the training goes on", file=sys.stderr, flush=True)
            return
        if self.rank == 0:
            said = f"miram: profile of steps {self._from} to {self._last} in {trace} (open in ui.perfetto.dev)"
            print(said, file=sys.stderr, flush=True)


def costliest(averages: EventList) -> str:
    """Table of the operations that took the most time themselves, on the device where there is one."""
    averages[:] = [event for event in averages if not event.key.startswith(MARK)]
    where = "device" if supported_activities() - {ProfilerActivity.CPU} and torch.accelerator.is_available() else "cpu"
    return averages.table(sort_by=f"self_{where}_time_total", row_limit=COSTLIEST)
