"""What words of the command line mean."""

from __future__ import annotations

import re

from ..engine.errors import UserError
from .masks import IGNORED_NAME


def parse_fractions(text: str) -> tuple[float, ...]:
    """`0.1,0.25` as numbers.

    Raises:
        UserError: they are none.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"--fractions {text!r}: give numbers between 0 and 1, such as 0.1,0.25") from error


def parse_partition(text: str | None) -> tuple[int, int] | None:
    """`3/8` as (3, 8).

    Raises:
        UserError: it is no part of a whole.
    """
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--partition {text!r}: give i/n with i from 1 to n, such as 3/8")
    return int(index), int(count)


def parse_classes(text: str | None) -> dict[str, tuple[int, ...]] | None:
    """`background=0,fat=128,gland=192+255,ignored=64` as values by name.

    Raises:
        UserError: it is no such list, or a value is in two classes.
    """
    if text is None:
        return None
    named: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, _, listed = part.strip().partition("=")
        if not re.fullmatch(r"\d{1,3}(\+\d{1,3})*", listed) or not name or name in named:
            raise UserError(f"--classes {text!r}: give names and values, such as background=0,fat=128,gland=192+255")
        named[name] = tuple(map(int, listed.split("+")))
    values = [value for of in named.values() for value in of]
    once = len(set(values)) == len(values) and max(values) <= 255
    if not once or len(named.keys() - {IGNORED_NAME}) < 2 or next(iter(named)) == IGNORED_NAME:
        raise UserError(f"--classes {text!r}: background comes first, another class follows, each value is in one only")
    return named
