"""`python -m miram.finetune.segment CONFIG …`, what `accelerate launch -m` and `torchrun -m` start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pydantic import BaseModel

if not __package__:
    sys.exit("start this with `python -m miram.finetune.segment CONFIG …`, not by its file name")

from ...engine.command import start_stage
from ...engine.errors import exit_code

ABOUT = (
    "Trains a model that says which pixels are a finding, and judges it on patients that it never saw. The same",
    "command goes on with an unfinished run.",
    "",
    "  --sweep    the models of the `sweep` section x seeds, side by side in one table",
)


def load() -> tuple[type[BaseModel], Callable[..., object]]:
    """The stage, imported late: torch takes seconds, and a queue's signal may come meanwhile."""
    from .config import SegmentConfig
    from .stage import segment

    return SegmentConfig, segment


def start(command: str, arguments: Sequence[str]) -> None:
    """Read the command line and segment."""
    start_stage(command, arguments, load, ("--sweep", "sweeps"), ABOUT)


def main() -> None:
    """What a launcher starts on every rank."""
    start("python -m miram.finetune.segment", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
