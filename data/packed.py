"""Pixels of which a crop can be read without the rest: a `.npy` member as it lies in a tar shard.

KEY.npy   \\x93NUMPY 1 0 | header length (2 bytes, little-endian) | header, padded with blanks to 64 bytes, \\n | rows
          {'descr': '<u2', 'fortran_order': False, 'shape': (3000, 1500), }         top row first, rows without gaps

Any numpy reads it. Of what the format allows only this is taken: version 1.0, `|u1` or `<u2`, C order, (H, W) or
(H, W, C).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .image import MAX_PIXELS
from .record import Pixels

HEADER_BYTES = 256  # enough for any header that numpy writes for such an array
DTYPES: dict[bytes, np.dtype[Any]] = {b"|u1": np.dtype(np.uint8), b"<u2": np.dtype("<u2")}
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '(?P<dtype>\|u1|<u2)', 'fortran_order': False, 'shape': \((?P<shape>\d+, \d+(?:, \d+)?)\), \} *\n",
    re.DOTALL,
)

Shape = tuple[int, ...]
Read = Callable[[int, int], bytes]  # offset from the member's first byte, size -> just these bytes


def encode_npy(pixels: Pixels) -> bytes:
    """(H, W) or (H, W, C) uint8 or uint16 pixels as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    little = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def parse_header(first_bytes: bytes, size: int) -> tuple[Shape, np.dtype[Any], int]:
    """Shape, dtype and the offset of the first row, from the first HEADER_BYTES of a member of `size` bytes.

    Raises:
        ValueError: no such `.npy`, more pixels than Pillow would decode, or not as many bytes as its shape needs.
    """
    found = HEADER.match(first_bytes)
    if not found:
        raise ValueError("it is no .npy of 8- or 16-bit pixels in C order")
    offset = 10 + int.from_bytes(found["length"], "little")
    shape, dtype = tuple(int(side) for side in found["shape"].split(b", ")), DTYPES[found["dtype"]]
    if offset != found.end() or offset + math.prod(shape) * dtype.itemsize != size or not math.prod(shape):
        raise ValueError(f"its header promises other than its {size} bytes")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ValueError(f"its {shape[0]} x {shape[1]} pixels are more than {MAX_PIXELS}")
    return shape, dtype, offset


class PackedPixels:
    """(H, W) or (H, W, C) pixels on disk that read like an array: `pixels[top:bottom, left:right]`, `pixels[rows]`.

    Each row slice is one call of `read`. Memory is taken by what was asked for, never by the image.

    Args:
        read: bytes of the member by offset and size; raises if there are not as many.
        size: of the member.

    Raises:
        ValueError: as `parse_header`.
    """

    def __init__(self, read: Read, size: int):
        self.read = read
        self.shape, self.dtype, self.offset = parse_header(read(0, min(size, HEADER_BYTES)), size)

    @property
    def ndim(self) -> int:
        """2, or 3 with channels."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels, as `ndarray.nbytes`."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, place: slice | NDArray[np.integer] | tuple[slice, slice]) -> NDArray[Any]:
        """Rows by slice or by number, and a slice of columns. Only these rows are read."""
        rows, columns = place if isinstance(place, tuple) else (place, slice(None))
        if not isinstance(rows, slice):
            return self.rows_at(rows)[:, columns]
        first, end, step = rows.indices(self.shape[0])
        assert step == 1, "rows are read as they lie"
        return self._rows(first, max(end, first))[:, columns]

    def rows_at(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """(n, W, …): these rows, one read each."""
        return np.concatenate([self._rows(int(row), int(row) + 1) for row in rows])

    def _rows(self, first: int, end: int) -> NDArray[Any]:
        stride = self.nbytes // self.shape[0]
        content = self.read(self.offset + first * stride, (end - first) * stride)
        return np.frombuffer(content, self.dtype).reshape(end - first, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All pixels, for numpy."""
        return np.asarray(self[:], dtype=dtype)


Raster = Pixels | PackedPixels
