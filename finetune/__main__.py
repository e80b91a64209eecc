"""`python -m miram.finetune CONFIG --section.key=value …`, what `accelerate launch -m` and `torchrun -m` start."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

if not __package__:
    sys.exit("start this with `python -m miram.finetune CONFIG …`, not by its file name")

from ..engine.command import run_stage
from ..engine.errors import FAILED, INTERRUPTED, exit_code
from ..engine.signals import StopSignals

ABOUT = (
    "Tunes an encoder for classification, and judges it on patients that it never saw: everything that is chosen is",
    "chosen on inner folds of the training patients. The same command goes on with an unfinished run.",
    "",
    "  --sweep    methods x label fractions x seeds of the `sweep` section, side by side in one table",
)


def start(command: str, arguments: Sequence[str]) -> None:
    """Read the command line and tune."""
    try:
        with StopSignals() as signals:
            from .classify.config import FinetuneConfig
            from .classify.stage import finetune

            rest = [argument for argument in arguments if argument != "--sweep"]
            stage = partial(finetune, sweeps=len(rest) < len(arguments), signals=signals)
            run_stage(command, FinetuneConfig, stage, rest, ABOUT)
    except KeyboardInterrupt:
        print(f"miram: {INTERRUPTED}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # at once: torch's clean-up of what was interrupted may crash


def main() -> None:
    """What a launcher starts on every rank."""
    start("python -m miram.finetune", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
