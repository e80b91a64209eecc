"""One small module an archive layout, each with `read(src, options) -> Archive`; listed here, `ingest` can name it."""

from __future__ import annotations

from dataclasses import asdict, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from ...engine.errors import UserError, did_you_mean
from ..archive import Archive, SourceOptions

SOURCES = {
    "cbis-ddsm": "cbis",
    "vindr-mammo": "vindr",
    "rsna": "rsna",
    "inbreast": "inbreast",
    "mias": "mias",
    "embed": "embed",
    "cmmd": "cmmd",
    "busi": "busi",
    "folder": "folder",
}


def read_archive(source: str, src: Path, options: SourceOptions = SourceOptions()) -> Archive:
    """The records of an archive on disk.

    Raises:
        UserError: unknown source, missing folder, or nothing in it that the source can use.
    """
    if source not in SOURCES:
        raise UserError(f"{source!r} is no source{did_you_mean(source, list(SOURCES))}")
    if not src.is_dir():
        fault = "is a file" if src.exists() else f"is not there{_nearest(src)}"
        raise UserError(f"the folder {src} {fault}; name the folder that holds the archive's files")
    read = import_module(f".{SOURCES[source]}", __package__).read
    archive: Archive = read(src, options)
    asked = {name: value for name, value in asdict(options).items() if name not in ("labels", "masks")}
    return replace(archive, settings={**archive.settings, **asked})


def _nearest(src: Path) -> str:
    """The folder beside it that is called almost so."""
    try:
        siblings = [path.name for path in src.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near = get_close_matches(src.name, siblings, n=1, cutoff=0.7)
    return f" (did you mean {src.parent / near[0]}?)" if near else ""
