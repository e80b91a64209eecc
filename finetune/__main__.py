"""`python -m miram.finetune CONFIG --section.key=value …`, what `accelerate launch -m` and `torchrun -m` start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pydantic import BaseModel

if not __package__:
    sys.exit("start this with `python -m miram.finetune CONFIG …`, not by its file name")

from ..engine.command import start_stage
from ..engine.errors import exit_code

ABOUT = (
    "Tunes an encoder for classification, and judges it on patients that it never saw: everything that is chosen is",
    "chosen on inner folds of the training patients. The same command goes on with an unfinished run.",
    "",
    "  --sweep    methods x label fractions x seeds of the `sweep` section, side by side in one table",
)


def load() -> tuple[type[BaseModel], Callable[..., object]]:
    """The stage, imported late: torch takes seconds, and a queue's signal may come meanwhile."""
    from .classify.config import FinetuneConfig
    from .classify.stage import finetune

    return FinetuneConfig, finetune


def start(command: str, arguments: Sequence[str]) -> None:
    """Read the command line and tune."""
    start_stage(command, arguments, load, ("--sweep", "sweeps"), ABOUT)


def main() -> None:
    """What a launcher starts on every rank."""
    start("python -m miram.finetune", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
