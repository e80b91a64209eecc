"""`python -m miram.pretrain CONFIG --section.key=value …`, what `accelerate launch -m` and `torchrun -m` start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pydantic import BaseModel

if not __package__:
    sys.exit("start this with `python -m miram.pretrain CONFIG …`, not by its file name")

from ..engine.command import start_stage
from ..engine.errors import exit_code

ABOUT = (
    "Trains an encoder on shards. The same command goes on with an unfinished run, also on another number of ranks.",
    "",
    "  --dry-run    build everything, take one step, print what it costs, and leave nothing",
)


def load() -> tuple[type[BaseModel], Callable[..., object]]:
    """The stage, imported late: torch takes seconds, and a queue's signal may come meanwhile."""
    from .config import PretrainConfig
    from .stage import pretrain

    return PretrainConfig, pretrain


def start(command: str, arguments: Sequence[str]) -> None:
    """Read the command line and train."""
    start_stage(command, arguments, load, ("--dry-run", "dry_run"), ABOUT)


def main() -> None:
    """What a launcher starts on every rank."""
    start("python -m miram.pretrain", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
