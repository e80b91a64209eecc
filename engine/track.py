"""What a person watching a run sees: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

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
        rate = count / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=self.done, note=f"{rate:.1f}/s")
        if not console.is_terminal and now - self._said > self.EVERY:
            self._said = now
            left = (self.total - self.done) / max(rate, 1e-9) / 60
            print(
                f"{self.name}: {self.done}/{self.total}, {rate:.1f}/s, {left:.0f} min left", file=sys.stderr, flush=True
            )


class Tracker:
    """Progress of one training on rank 0; other ranks stay silent."""

    def __init__(self, name: str, steps: int, start: int, visible: bool):
        self.visible, self.steps = visible, steps
        self._bar = progress_bar()
        self._bar.disable = self._bar.disable or not visible
        self._task = self._bar.add_task(name, total=steps, completed=start, note="")
        self._clock, self._clock_step = time.perf_counter(), start

    def __enter__(self) -> Tracker:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """One step is done."""
        self._bar.update(self._task, completed=step)

    def steps_per_second(self, step: int) -> float:
        """Since it was last asked."""
        now = time.perf_counter()
        rate = (step - self._clock_step) / max(now - self._clock, 1e-9)
        self._clock, self._clock_step = now, step
        return rate

    def leave_out(self, seconds: float) -> None:
        """Time that was spent on something else than steps."""
        self._clock += seconds

    def show(self, line: Mapping[str, float]) -> None:
        """A logged step, in a few figures."""
        note = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['images_per_s']:.0f} images/s"
        self._bar.update(self._task, note=note)
        if self.visible and not console.is_terminal:
            print(f"step {int(line['step'])}/{self.steps}  {note}", file=sys.stderr, flush=True)


def peak_memory_bytes() -> int:
    """Most memory held so far: of the device where there is one, else of this process."""
    import torch  # data work, which only wants the bar, starts without it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
