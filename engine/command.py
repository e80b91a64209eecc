"""The command line of a stage: CONFIG, then --section.key=value; `--help` lists every key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pydantic import BaseModel

from .config import keys, presets
from .errors import UserError


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
