"""`python -m miram.pretrain CONFIG --section.key=value …`, what `accelerate launch -m` and `torchrun -m` start."""

from __future__ import annotations

import sys

if not __package__:
    sys.exit("start this with `python -m miram.pretrain CONFIG …`, not by its file name")

from ..engine.command import run_stage
from ..engine.errors import exit_code


def main() -> None:
    """Read the command line and train."""
    from .config import PretrainConfig
    from .stage import pretrain

    run_stage("python -m miram.pretrain", PretrainConfig, pretrain, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
