"""A file of tensors whose rows come a batch at a time, and whose number of rows nobody knows before the last."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..engine.tensors import form_of, in_file_order, write_tensors


class Columns:
    """Rows that come a batch at a time, put aside on disk until all are there and their number is known."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._forms: dict[str, tuple[torch.dtype, torch.Size]] = {}  # of one row

    def add(self, name: str, rows: Tensor) -> None:
        """Add (m, …) rows to a column."""
        self._forms.setdefault(name, (rows.dtype, rows.shape[1:]))
        with self._place(name).open("ab") as file:
            file.write(rows.contiguous().numpy().data)

    def write(self, path: Path) -> str:
        """Write all columns into one file, and return its sha256."""
        columns = {name: self._mapped(name) for name in self._forms}
        order = in_file_order(columns)
        forms = {name: form_of(columns[name]) for name in order}
        return write_tensors(path, forms, (columns[name] for name in order))

    def _mapped(self, name: str) -> Tensor:
        dtype, shape = self._forms[name]
        size = self._place(name).stat().st_size // dtype.itemsize
        return torch.from_file(str(self._place(name)), size=size, dtype=dtype).reshape(-1, *shape)

    def _place(self, name: str) -> Path:
        return self.folder / name.replace("/", " ")
