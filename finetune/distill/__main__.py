"""`python -m miram.finetune.distill CONFIG …`, what `accelerate launch -m` and `torchrun -m` start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pydantic import BaseModel

if not __package__:
    sys.exit("start this with `python -m miram.finetune.distill CONFIG …`, not by its file name")

from ...engine.command import start_stage
from ...engine.config import read_tree
from ...engine.errors import UserError, exit_code
from ..__main__ import start as start_tuning

ABOUT = (
    "Trains a small encoder to do as a large one does, on shards without labels. The same command goes on with an",
    "unfinished run, also on another number of ranks.",
    "",
    "  --dry-run    build everything, take one step, print what it costs, and leave nothing",
    "",
    "A CONFIG with a `finetune` section instead is a fine-tuning that learns from a tuned model's outputs",
    "(finetune.teacher); its keys are those of `miram finetune --help`.",
)


def load() -> tuple[type[BaseModel], Callable[..., object]]:
    """The stage, imported late: torch takes seconds, and a queue's signal may come meanwhile."""
    from .config import DistillConfig
    from .stage import distill

    return DistillConfig, distill


def start(command: str, arguments: Sequence[str]) -> None:
    """Read the command line and distil: an encoder, or a tuned model.

    Raises:
        UserError: there is no such configuration, or it tunes without a teacher.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    tuning = read_tree(arguments[0]).get("finetune") if named else None
    if not isinstance(tuning, dict):
        start_stage(command, arguments, load, ("--dry-run", "dry_run"), ABOUT)
    elif tuning.get("teacher") is None and not any(a.startswith("--finetune.teacher") for a in arguments):
        raise UserError(
            f"{arguments[0]}: finetune.teacher is not set; say whom to learn from: --finetune.teacher.run=RUN"
        )
    else:
        start_tuning(command, arguments)


def main() -> None:
    """What a launcher starts on every rank."""
    start("python -m miram.finetune.distill", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
