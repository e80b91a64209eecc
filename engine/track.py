"""What a person watching a run sees: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


def progress_bar() -> Progress:
    """The bar every stage uses; silent where the output is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


class Meter:
    """Progress of work on items: a bar with rate and time left on a terminal, a line now and then elsewhere."""

    EVERY = 30.0  # seconds between lines

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.start, self.done = name, total, done, done
        self._bar = progress_bar()
        self._task = self._bar.add_task(name, total=total, completed=done, note="")
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more item is done."""
        self.reach(self.done - self.start + 1)

    def reach(self, count: int) -> None:
        """So many items are done since the start."""
        self.done = self.start + count
        now = time.monotonic()
        if not count:
            return  # no rate yet, so nothing to foretell
        rate = count / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=self.done, note=f"{rate:.1f}/s")
        if not console.is_terminal and now - self._said > self.EVERY:
            self._said = now
            left = (self.total - self.done) / max(rate, 1e-9) / 60
            print(
                f"{self.name}: {self.done}/{self.total}, {rate:.1f}/s, {left:.0f} min left", file=sys.stderr, flush=True
            )


class Tracker:
    """Progress of one training: figures on every rank, for people only where `visible`.

    Args:
        name: what is trained.
        steps: of the whole training.
        start: steps done before this start.
        batch_size: images a step, over all ranks.
        visible: whether this process shows anything.
    """

    def __init__(self, name: str, steps: int, start: int, batch_size: int, visible: bool):
        self.steps, self.start, self.batch_size, self.visible = steps, start, batch_size, visible
        self._bar = progress_bar()
        self._bar.disable = self._bar.disable or not visible
        self._task = self._bar.add_task(name, total=steps, completed=start, note="")
        self._asked_step = start
        self._began = self._asked = time.perf_counter()
        self._waited = self._elsewhere = 0.0

    def __enter__(self) -> Tracker:
        self._began = self._asked = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """One step is done."""
        self._bar.update(self._task, completed=step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the draw of data: the host has nothing to give to the device meanwhile."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Around what is no training, such as a monitor's look; saving is part of training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._elsewhere += time.perf_counter() - began

    def figures(self, step: int) -> dict[str, float]:
        """Since it was last asked: images a second, share of the time waited for data; and the peak of memory.

        Both are 0 where no time or no step has passed. Time that was left out counts for neither.
        """
        now = time.perf_counter()
        spent = max(now - self._asked - self._elsewhere, 0.0)
        images = (step - self._asked_step) * self.batch_size
        rate, share = (images / spent, min(self._waited / spent, 1.0)) if spent else (0.0, 0.0)
        self._asked, self._asked_step, self._waited, self._elsewhere = now, step, 0.0, 0.0
        return {"images_per_s": round(rate, 2), "data_wait": round(share, 4), "peak_memory_bytes": peak_memory_bytes()}

    def show(self, line: Mapping[str, float]) -> None:
        """A logged step, in a few figures."""
        rate, memory = line["images_per_s"], line["peak_memory_bytes"] / 1e9
        note = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {rate:.{0 if rate >= 10 else 1}f} images/s"
        note += f"  {100 * line['data_wait']:.0f}% waiting  {memory:.1f} GB"
        self._bar.update(self._task, note=note)
        if self.visible and not console.is_terminal:
            step = int(line["step"])
            print(f"step {step}/{self.steps}  {note}{self._left(step)}", file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        """Time left at the pace since the start, looks of monitors and all."""
        if step <= self.start:
            return ""
        seconds = (time.perf_counter() - self._began) / (step - self.start) * (self.steps - step)
        return f"  {duration(seconds)} left"


def duration(seconds: float) -> str:
    """In the unit a person would use: 40 s, 2 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux: proc(5), VmHWM


def reset_peak_memory() -> None:
    """From here on the peak is counted anew, where the system can forget the old one: on CUDA and on Linux."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            FORGET.write_text("5")


def peak_memory_bytes() -> int:
    """Most memory held since `reset_peak_memory`, or ever: of the device where there is one, else of this process."""
    import torch  # data work, which only wants the bar, starts without it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
