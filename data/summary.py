"""What is in a data set, as a table for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from rich.table import Table

from .index import read_index, read_manifest
from .layout import LABEL
from .table import Row


def summary(folder: Path | str) -> Table:
    """Counts of images, patients, views and labels; sizes and grey levels.

    Raises:
        UserError: the folder is missing or is no data set.
    """
    manifest, rows = read_manifest(folder), read_index(folder)
    table = Table(title=f"{Path(folder).name} ({manifest['dataset']})", show_header=False, title_justify="left")
    table.add_row("images", str(len(rows)))
    table.add_row("patients", str(len({row["patient"] for row in rows})))
    table.add_row("left out at ingest", str(manifest["skipped"]))
    table.add_row("shards", f"{len(manifest['shards'])} ({sum(s['bytes'] for s in manifest['shards']) / 1e6:.1f} MB)")
    for side in ("height", "width"):
        table.add_row(f"{side} (min, median, max)", _spread([int(row[side]) for row in rows]))
    table.add_row("mm a pixel", counts(rows, "spacing_mm"))
    table.add_row("grey levels", "{mean:.4f} ± {std:.4f} of the largest".format(**manifest["pixels"]))
    for column in ("bits", "laterality", "view", "split", *(c for c in rows[0] if c.startswith(LABEL))):
        table.add_row(column.removeprefix(LABEL), counts(rows, column))
    table.add_row("licence", manifest["licence"])
    return table


def counts(rows: list[Row], column: str) -> str:
    """The values of a column and how often each occurs."""
    found = Counter(row[column] or "-" for row in rows)
    return ", ".join(f"{value}: {n}" for value, n in sorted(found.items())[:12]) + (" …" if len(found) > 12 else "")


def _spread(values: list[int]) -> str:
    return f"{min(values)}, {int(np.median(values))}, {max(values)}"
