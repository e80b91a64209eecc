"""One small module an archive layout, each with `read(src, labels) -> Archive`; listed here, `ingest` can name it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...engine.errors import UserError, did_you_mean
from ..ingest import Archive
from . import folder, mias

SOURCES: dict[str, Callable[[Path, Path | None], Archive]] = {"folder": folder.read, "mias": mias.read}


def read_archive(source: str, src: Path, labels: Path | None = None) -> Archive:
    """The records of an archive on disk.

    Raises:
        UserError: unknown source, missing folder, or nothing in it that the source can use.
    """
    if source not in SOURCES:
        raise UserError(f"{source!r} is no source{did_you_mean(source, list(SOURCES))}")
    if not src.is_dir():
        raise UserError(f"the folder {src} is not there; name the folder that holds the archive's files")
    return SOURCES[source](src, labels)
