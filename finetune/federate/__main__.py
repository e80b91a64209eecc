"""`python -m miram.finetune.federate CONFIG --section.key=value …`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pydantic import BaseModel

if not __package__:
    sys.exit("start this with `python -m miram.finetune.federate CONFIG …`, not by its file name")

from ...engine.command import start_stage
from ...engine.errors import exit_code

ABOUT = (
    "Tunes an encoder on several sites' images that stay where they are: adapters, prompts or heads travel, never",
    "images. Without --flower all sites are simulated in this process, and compared with each site alone and with all",
    "images in one place. The same command goes on with an unfinished run.",
    "",
    "  --flower    write a Flower app into RUN/app, for sites on machines of their own (docs/federate.md)",
)


def load() -> tuple[type[BaseModel], Callable[..., object]]:
    """The stage, imported late: torch takes seconds, and a queue's signal may come meanwhile."""
    from .config import FederateConfig
    from .stage import federate

    return FederateConfig, federate


def start(command: str, arguments: Sequence[str]) -> None:
    """Read the command line and federate."""
    start_stage(command, arguments, load, ("--flower", "flower"), ABOUT)


def main() -> None:
    """What a launcher starts."""
    start("python -m miram.finetune.federate", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
