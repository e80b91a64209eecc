"""K x K regions of a token grid, all of one size, in raster order.

7 x 7 tokens, K = 2        rows 0 1 2 3      columns 0 1 2 3 | 0 1 2 3   regions  1 | 2
regions of 4 x 4                3 4 5 6              3 4 5 6 |   3 4 5 6          3 | 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...engine.errors import UserError


@dataclass(frozen=True)
class Regions:
    """K x K rectangles that cover a grid; where K does not divide a side, neighbours overlap.

    Of n rows each region has S = ceil(n / K), the i-th from row round(i (n - S) / (K - 1)), halves up: every row is in
    one region at least.

    Raises:
        UserError: the grid has fewer than K rows or columns.
    """

    grid: tuple[int, int]
    K: int

    def __post_init__(self) -> None:
        if min(self.grid) < self.K:
            raise UserError(
                f"a grid of {self.grid[0]} x {self.grid[1]} tokens cannot be cut into {self.K} x {self.K} regions; "
                "take a larger image, smaller patches or fewer regions"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a region."""
        height, width = (-(-side // self.K) for side in self.grid)
        return height, width

    @property
    def windows(self) -> list[tuple[slice, slice]]:
        """Rows and columns of every region, in raster order."""
        rows, columns = (self._slices(n, S) for n, S in zip(self.grid, self.size, strict=True))
        return [(row, column) for row in rows for column in columns]

    def _slices(self, n: int, S: int) -> list[slice]:
        gaps = max(self.K - 1, 1)
        starts = [(2 * i * (n - S) + gaps) // (2 * gaps) for i in range(self.K)]
        return [slice(start, start + S) for start in starts]

    def cut(self, x: Tensor) -> list[Tensor]:
        """(B, H, W, …) -> K^2 tensors (B, h, w, …)."""
        return [x[:, rows, columns] for rows, columns in self.windows]

    def put_back(self, parts: Sequence[Tensor]) -> Tensor:
        """K^2 tensors (B, h, w, D) -> (B, H, W, D), the mean where regions overlap."""
        batch, _, _, dim = parts[0].shape
        total = parts[0].new_zeros(batch, *self.grid, dim)
        times = parts[0].new_zeros(*self.grid, 1)
        for (rows, columns), part in zip(self.windows, parts, strict=True):
            total[:, rows, columns] += part
            times[rows, columns] += 1
        return total / times
