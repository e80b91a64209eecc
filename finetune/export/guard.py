"""What an export that computes something else (int8, merged tokens) does to the figure the model is judged by.

Both networks see the same images (judges.py), and both figures the same bootstrap samples of patients, so that what
they have in common is not in the interval of the difference. Legend: R bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.errors import RunFailed, UserError
from ...engine.metrics import Estimate, Floats
from ..classify.bootstrap import cell
from ..classify.units import counted
from .judges import JUDGES, Asking, Judge, NotMeasured
from .parity import Runner
from .source import Source

__all__ = ["Change", "Guard", "NotMeasured", "refuse_worse"]

REPLICATES = 1000


@dataclass(frozen=True)
class Change:
    """A figure before and after, and the difference (negative: the export is worse), of the same images."""

    metric: str
    task: str
    split: str
    before: Estimate
    after: Estimate
    difference: Estimate
    n_images: int
    n_patients: int

    @property
    def facts(self) -> dict[str, Any]:
        """For export.json."""
        figures = {name: cell(getattr(self, name)) for name in ("before", "after", "difference")}
        names = ("metric", "task", "split", "n_images", "n_patients")
        return {name: getattr(self, name) for name in names} | figures

    @property
    def sentence(self) -> str:
        """For the card and the screen."""
        return (
            f"{self.metric} of {self.task} ({self.split}; {counted(self.n_images, 'image')} of "
            f"{counted(self.n_patients, 'patient')}): {said(self.before)} before, {said(self.after)} after; change "
            f"{said(self.difference, '+')}."
        )


def said(of: Estimate, sign: str = "") -> str:
    """`0.812 [0.700, 0.900]`."""
    low, high = of.interval
    return f"{of.value:{sign}.4f}" + (f" [{low:{sign}.4f}, {high:{sign}.4f}]" if math.isfinite(low) else "")


def refuse_worse(change: Change, margin: float, what: str = "the export") -> None:
    """Refuse what lost more than it may.

    Raises:
        RunFailed: the figure fell by more than the margin.
    """
    # a loss of the very margin is allowed, however it is rounded; what is no number is not
    if not -change.difference.value <= margin + 1e-9:
        low, high = change.difference.interval
        known = f" [{-high:.4f}, {-low:.4f}]" if math.isfinite(low) else ""
        raise RunFailed(
            f"{what}: {change.metric} of {change.task} fell by {-change.difference.value:.4f}{known} on "
            f"{counted(change.n_images, 'image')} of {counted(change.n_patients, 'patient')}, more than --margin "
            f"{margin:g}; nothing was written"
        )


class Guard:
    """Measures what exports of a source do to its figure; what is exported is judged once, however many there are.

    Args:
        source: what is exported.
        run: the folder it was read from.
        data: labelled images; None: those of the run's own data whose patients the model did not learn from, the test
            split of them where there is one.
        split: of the data; None: all of it.
        task: label to judge by; None: the model's own.
        batch_size: images at once.
        replicates: R.
    """

    def __init__(
        self,
        source: Source,
        run: str | Path,
        data: str | Sequence[str] | None = None,
        split: str | None = None,
        task: str | None = None,
        *,
        batch_size: int = 64,
        replicates: int = REPLICATES,
    ):
        self.source, self.run, self.batch_size, self.replicates = source, Path(run), batch_size, replicates
        self.asked = Asking(None if data is None else data if isinstance(data, str) else [*data], split, task)

    @cached_property
    def judge(self) -> Judge:
        """Its images, read once.

        Raises:
            NotMeasured: there are none, and none were asked for.
            UserError: there are none, or they do not fit.
        """
        try:
            return JUDGES[self.source.kind](self.source, self.run, self.asked, self.batch_size, self.replicates)
        except NotMeasured as why:
            if self.asked.part:
                raise UserError(str(why)) from why
            raise

    @cached_property
    def before(self) -> Floats:
        """(1 + R,) the figure of the source."""
        return self.judge.figures(self.source.module)

    def change(self, after: Runner) -> Change:
        """What one export does.

        Raises:
            NotMeasured: there are no images to measure it on.
            UserError: the images do not fit, or the model learnt from their patients.
        """
        judge, was = self.judge, self.before
        now = judge.figures(after)
        if np.isnan(now[0] - was[0]):
            raise NotMeasured(f"{judge.metric} cannot be computed on {judge.split}; name other images with --data")
        old, new, gap = (Estimate.of(float(x[0]), x[1:] if judge.drawn else x[:0]) for x in (was, now, now - was))
        return Change(judge.metric, judge.task, judge.split, old, new, gap, judge.n_images, judge.n_patients)
