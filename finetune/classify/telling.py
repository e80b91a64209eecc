"""A run's figures on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .units import counted


def say(result: Mapping[str, Any]) -> None:
    """The rows of a result.json as a few lines, and its differences where it has some."""
    of = f"{counted(result['n_images'], 'image')} of {counted(result['n_patients'], 'patient')}"
    print(f"{result['metric']} of {result['task']}, {of}:")
    told = [*result["rows"], *result.get("differences", [])]
    width = max(len(row["name"]) for row in told) + 2
    for row in told:
        interval = "" if row["interval"] is None else "  [{:.3f}, {:.3f}]".format(*row["interval"])
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        print(f"  {row['name']:<{width}}{value}{interval}")
