"""`python -m miram.pretrain CONFIG --section.key=value …`, what `accelerate launch -m` and `torchrun -m` start."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

if not __package__:
    sys.exit("start this with `python -m miram.pretrain CONFIG …`, not by its file name")

from ..engine.command import run_stage
from ..engine.errors import FAILED, INTERRUPTED, exit_code
from ..engine.signals import StopSignals

ABOUT = (
    "Trains an encoder on shards. The same command goes on with an unfinished run, also on another number of ranks.",
    "",
    "  --dry-run    build everything, take one step, print what it costs, and leave nothing",
)


def start(command: str, arguments: Sequence[str]) -> None:
    """Read the command line and train."""
    try:
        with StopSignals() as signals:
            from .config import PretrainConfig
            from .stage import pretrain

            rest = [argument for argument in arguments if argument != "--dry-run"]
            stage = partial(pretrain, dry_run=len(rest) < len(arguments), signals=signals)
            run_stage(command, PretrainConfig, stage, rest, ABOUT)
    except KeyboardInterrupt:
        print(f"miram: {INTERRUPTED}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # at once: torch's clean-up of what was interrupted may crash


def main() -> None:
    """What a launcher starts on every rank."""
    start("python -m miram.pretrain", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
