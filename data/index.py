"""What a data set says of itself, read and checked: manifest.json and index.csv. (Layout: layout.py.)"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt

from ..engine.errors import UserError
from .layout import DESCRIBED, IMAGES, MEMBERS, partial_folder
from .store.local import check_scheme, is_remote, join, read_text
from .table import Row, Rows, Table


class _Shard(BaseModel):
    name: str
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str | None  # unknown of shards that were adopted where they are


class _Index(BaseModel):
    samples: NonNegativeInt
    sha256: str


class _Pixels(BaseModel):
    n: float
    mean: float
    std: float


class _Manifest(BaseModel):
    form: Literal["miram.shards/1"] = Field(alias="schema")
    dataset: str
    licence: str
    records: str
    skipped: NonNegativeInt
    pixels: _Pixels
    index: _Index
    shards: list[_Shard]


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a data set.

    Raises:
        UserError: the folder is missing or holds no shards of ours.
    """
    if not is_remote(str(folder)):
        if not Path(folder).is_dir():
            check_scheme(str(folder))
            if partial_folder(Path(folder).absolute()).exists():
                raise UserError(f"{folder} is not finished: repeat the command that was writing it, and it goes on")
            raise UserError(
                f"the data folder {folder} is not there; make one with `miram data phantom` or `miram data ingest`"
            )
        if not (Path(folder) / "manifest.json").exists():
            raise UserError(f"{folder} holds no manifest.json, so it is no data set; make one with `miram data ingest`")
    try:
        manifest: dict[str, Any] = json.loads(read_text(str(folder), "manifest.json"))
        _Manifest.model_validate(manifest, strict=True)
    except (ValueError, RecursionError) as error:
        place = join(str(folder), "manifest.json")
        raise UserError(f"{place} is damaged, or of another program or version; ingest the data set again") from error
    return manifest


def read_table(folder: Path | str, manifest: Mapping[str, Any]) -> Table:
    """The index of a data set, in the shards' order.

    Raises:
        UserError: it is missing, damaged, changed since the manifest was written, or lacks columns.
    """
    path = join(str(folder), "index.csv")
    if not is_remote(path) and not Path(path).exists():
        raise UserError(f"{path} is not there; ingest the data set again")
    content = read_text(str(folder), "index.csv")
    if sha256(content).hexdigest() != manifest["index"]["sha256"]:
        raise UserError(f"{path} was changed after it was written; ingest again (labels of your own go into --labels)")
    try:
        table = Table.read(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); ingest the data set again") from error
    missing = {"key", "shard", *DESCRIBED} - set(table.columns)
    for member in MEMBERS:
        pair = {f"{member}_offset", f"{member}_size"}
        missing |= pair - set(table.columns) if pair & set(table.columns) else set()
    if len(table) and not any(f"{kind}_offset" in table.columns for kind in IMAGES):
        missing.add("png_offset")
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(sorted(missing))}; ingest the data set again")
    return table


def read_index(folder: Path | str) -> list[Row]:
    """The rows of index.csv as text.

    Raises:
        UserError: it is missing, damaged, or lacks columns.
    """
    return list(Rows.all_of([read_table(folder, read_manifest(folder))]))
