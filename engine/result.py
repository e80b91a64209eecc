"""An evaluation's figures as the report reads them, leniently: what a stage left out is unstated, and NaN is no figure.

RUN/result.json   {"schema": "miram.result/1", "stage", "task", "split", "metric", "value", "interval": [low, high],
                   "n_images", "n_patients", "classes": {name: images}, "notes": [text, …],
                   "rows" and "differences": [{"name", "value", "interval", "detail"}, …],
                   "tables": [{"title", "columns": [text, …], "rows": [[cell, …], …], "note"}, …]}

A cell is text, a number, null, or {"value", "interval"}, with "signed": true where it is a difference.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, StrictFloat, StrictInt, StrictStr, ValidationError
from pydantic import model_validator as validator


def _finite(value: Any) -> Any:
    return value if value is not None and np.isfinite(value).all() else None


class Estimate(BaseModel):
    """A value with its 95 % interval: one row of a table, one dot and whisker."""

    name: str = ""
    value: Annotated[float | None, AfterValidator(_finite)]
    interval: Annotated[tuple[float, float] | None, AfterValidator(_finite)] = None
    detail: str = ""


class Figure(BaseModel):
    """A value with its interval in a cell of a table."""

    value: Annotated[float | None, AfterValidator(_finite)]
    interval: Annotated[tuple[float, float] | None, AfterValidator(_finite)] = None
    signed: bool = False


class Table(BaseModel):
    """Rows of cells under the same columns."""

    title: str = ""
    columns: list[str]
    rows: list[list[Figure | StrictStr | StrictInt | StrictFloat | None]]
    note: str = ""

    @validator(mode="after")
    def _even(self) -> Table:
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells under {len(self.columns)} columns")
        return self

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it holds a number."""
        cells = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        return [any(cell is not None and not isinstance(cell, str) for cell in column) for column in cells]


class Result(Estimate):
    """`result.json`: the figures of one evaluation, with the task and the n they stand on."""

    schema_: Literal["miram.result/1"] = Field("miram.result/1", alias="schema")
    stage: str = ""
    task: str = ""
    split: str | None = None
    metric: str = ""
    level: str = ""
    n_images: int | None = None
    n_patients: int | None = None
    classes: dict[str, int] = {}
    rows: list[Estimate] = []
    differences: list[Estimate] = []
    tables: list[Table] = []
    notes: list[str] = []


def parse_result(text: str, damage: list[str]) -> Result:
    """The result in the text; a table that cannot be read is left out, and `damage` gets a sentence about it.

    Raises:
        ValueError: the rest of it cannot be read.
    """
    content = json.loads(text)
    found = content.pop("tables", []) if isinstance(content, dict) else []
    tables = [_table(table, number, damage) for number, table in enumerate(found, 1)] if isinstance(found, list) else []
    if not isinstance(found, list):
        damage.append("result.json: tables is no list and is left out")
    result = Result.model_validate(content)
    result.tables = [table for table in tables if table]
    return result


def _table(content: Any, number: int, damage: list[str]) -> Table | None:
    try:
        return Table.model_validate(content)
    except ValidationError as problem:
        damage.append(f"result.json: table {number} could not be read and is left out: {why(problem)}")
    return None


def why(problem: Exception) -> str:
    """One line of what is wrong with a file."""
    if not isinstance(problem, ValidationError):
        return str(problem).partition("\n")[0]
    first = problem.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]))
