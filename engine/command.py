"""The command line of a stage: CONFIG, then --section.key=value; `--help` lists every key."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from .config import keys, presets
from .errors import FAILED, INTERRUPTED, UserError
from .signals import StopSignals


def start_stage(
    command: str,
    arguments: Sequence[str],
    load: Callable[[], tuple[type[BaseModel], Callable[..., object]]],
    flag: tuple[str, str],
    about: Sequence[str],
) -> None:
    """Read the command line of a stage that trains, and run it; signals are heeded from before it is imported.

    Args:
        command: as the user starts it.
        arguments: CONFIG, and what follows.
        load: imports the stage: its schema, and the function that takes CONFIG, arguments, the flag and `signals`.
        flag: on the command line, and what the function calls it.
        about: lines of help.
    """
    try:
        with StopSignals() as signals:
            schema, stage = load()
            rest = [argument for argument in arguments if argument != flag[0]]
            asked: dict[str, Any] = {flag[1]: len(rest) < len(arguments), "signals": signals}
            run_stage(command, schema, partial(stage, **asked), rest, about)
    except KeyboardInterrupt:
        print(f"miram: {INTERRUPTED}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # at once: torch's clean-up of what was interrupted may crash


def run_stage(
    command: str,
    schema: type[BaseModel],
    stage: Callable[[str, Sequence[str]], object],
    arguments: Sequence[str],
    about: Sequence[str] = (),
) -> None:
    """Show the help, with the lines `about` the command, or run the stage.

    Raises:
        UserError: no configuration was named, and whatever the stage raises.
    """
    if "--help" in arguments or "-h" in arguments:
        print(usage(command, schema, about))
    elif not arguments or arguments[0].startswith("-"):
        raise UserError(f"name a configuration first: {command} CONFIG …; presets: {', '.join(presets())}")
    else:
        stage(arguments[0], arguments[1:])


def usage(command: str, schema: type[BaseModel], about: Sequence[str] = ()) -> str:
    """`COMMAND CONFIG [--key=value …]`, lines about the command, and the keys one may set."""
    lines = [f"usage: {command} CONFIG [--section.key=value …]", ""]
    lines += [*about, ""] if about else []
    lines += [
        f"CONFIG is a YAML file or a preset: {', '.join(presets())}",
        "",
        "keys (items of lists by number, e.g. --model.scales.1.depth=4):",
    ]
    return "\n".join([*lines, *listed(schema)])


def listed(schema: type[BaseModel], but: str = "") -> Iterator[str]:
    """Two lines a key: its type and default, its meaning; of all `but` one."""
    for key, kind, default, meaning in keys(schema):
        if key != but:
            yield from (f"  --{key}  {kind}  [{default}]", f"      {meaning}")
