"""A map: what parts of a stored image are worth.

Legend: r and c rows and columns of a map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...engine.metrics import Floats
from ..said import Said


@dataclass(frozen=True)
class Map:
    """What parts of a stored image are worth.

    Attributes:
        values: (r, c) of a grid that divides the image evenly.
        said: what they are worth it to.
        scale: what the values are.
        faintest: values below it stay pale.
        how: how to read them.
    """

    values: Floats
    said: Said
    scale: str
    faintest: float
    how: str

    @property
    def empty(self) -> bool:
        """Whether no value is worth a colour."""
        return float(np.abs(self.values).max()) < self.faintest

    @property
    def caption(self) -> str:
        """What was said, and how to read the map."""
        nothing = f" No place reaches {self.faintest:g}, so nothing is coloured." * self.empty
        return f"{self.said.sentence} {self.how}{nothing}"
