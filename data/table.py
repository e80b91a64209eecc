"""The index in memory: columns of bytes, not dictionaries; large ones are files that processes map and share.

CACHE/miram/index/<hash of index.csv>/<column number>.npy, columns.json     mapped by every process that reads the set
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

Row = dict[str, str]
Column = NDArray[np.bytes_]
MAPPED = 4 * 2**20  # bytes of CSV from which mapping files beats parsing in every process


class Table:
    """A CSV file's columns."""

    def __init__(self, columns: dict[str, Column]):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def row(self, i: int) -> Row:
        """Row i by column."""
        return {name: column[i].decode() for name, column in self.columns.items()}

    @classmethod
    def parse(cls, content: bytes) -> Table:
        """The table in a CSV file's bytes.

        Raises:
            ValueError: it is no UTF-8, no CSV, or a row has more or fewer fields than the header.
        """
        try:
            header, *rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        except csv.Error as error:
            raise ValueError(str(error)) from error
        if any(len(row) != len(header) for row in rows) or len(set(header)) < len(header):
            raise ValueError("its rows do not fit its header")
        cells = zip(*rows, strict=True) if rows else ((),) * len(header)
        return cls(
            {name: np.array([c.encode() for c in column], "S") for name, column in zip(header, cells, strict=True)}
        )

    @classmethod
    def read(cls, content: bytes) -> Table:
        """The same; a large table is kept as files that processes map instead of holding it each.

        Raises:
            ValueError: as `parse`.
        """
        if len(content) < MAPPED:
            return cls.parse(content)
        with suppress(OSError, ValueError, EOFError, RuntimeError):  # no home, no room, a damaged cache: do without
            return cls.map(cache_folder() / sha256(content).hexdigest()[:24])
        table = cls.parse(content)
        with suppress(OSError, RuntimeError):
            table.store(cache_folder() / sha256(content).hexdigest()[:24])
        return table

    def store(self, folder: Path) -> None:
        """Write the columns as files, whole or not at all."""
        fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
        fresh.mkdir(parents=True)
        for number, column in enumerate(self.columns.values()):
            np.save(fresh / f"{number}.npy", column, allow_pickle=False)
        (fresh / "columns.json").write_text(json.dumps(list(self.columns)))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            fresh.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(fresh)

    @classmethod
    def map(cls, folder: Path) -> Table:
        """The columns of a stored table, mapped."""
        names = json.loads((folder / "columns.json").read_text())
        files = (np.load(folder / f"{i}.npy", mmap_mode="r", allow_pickle=False) for i in range(len(names)))
        return cls(dict(zip(names, files, strict=True)))


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/miram/index or ~/.cache/miram/index."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miram" / "index"


class Rows(Sequence[Row]):
    """Chosen rows of several tables, made into dictionaries when asked for."""

    def __init__(self, tables: Sequence[Table], chosen: Sequence[tuple[int, int]] | NDArray[np.int64]):
        self.tables = tables
        self.chosen = np.array(chosen, np.int64).reshape(-1, 2)  # (n, 2): table, row

    @classmethod
    def all_of(cls, tables: Sequence[Table]) -> Rows:
        """Every row of every table."""
        return cls(
            tables, np.concatenate([np.stack([np.full(len(t), k), np.arange(len(t))], 1) for k, t in enumerate(tables)])
        )

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> Rows:
        """These rows alone."""
        return Rows(self.tables, self.chosen[np.asarray(numbers, np.int64)])

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        table, row = self.chosen[i]
        return self.tables[table].row(int(row))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def narrow(self, *names: str) -> list[Row]:
        """Every row, of these columns alone."""
        return [dict(zip(names, values, strict=True)) for values in zip(*map(self.column, names), strict=True)]

    @property
    def columns(self) -> list[str]:
        """Every column that any of the tables has."""
        return list(dict.fromkeys(name for table in self.tables for name in table.columns))

    def column(self, name: str) -> list[str]:
        """One column of all rows, empty where a table lacks it."""
        values = [table.columns.get(name) for table in self.tables]
        return ["" if (column := values[t]) is None else column[i].decode() for t, i in self.chosen]
