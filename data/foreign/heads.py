"""What the head of an image file tells without decoding it: size, channels, largest value.

PNG     8 bytes, length "IHDR" width height depth colour …
JPEG    FFD8, then segments FFxx length …; SOF: precision height width channels
npy     as packed.py has it
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..image import BOMB, MAX_PIXELS, UnreadableImage
from ..packed import HEADER_BYTES, parse_header

Read = Callable[[int, int], bytes]  # offset in the file and size to bytes, fewer at its end

JPEG_SEGMENTS = 256  # before the frame header: comments, thumbnails, profiles
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}  # by colour type, once palettes are looked up and transparency dropped


@dataclass(frozen=True)
class Head:
    """Of an image: its shape, 1 or 3 channels, the largest value its format allows."""

    height: int
    width: int
    channels: int
    max_value: int


def image_head(kind: str, read: Read, size: int) -> Head:
    """The head of a `png`, `jpg` or `npy` file of `size` bytes.

    Raises:
        UnreadableImage: it is damaged, too large, or something that cannot be read without loss.
    """
    head = {"png": _png, "jpg": _jpeg, "npy": _npy}[kind](read, size)
    if head.height < 1 or head.width < 1:
        raise UnreadableImage("it has no pixels")
    if head.height * head.width > MAX_PIXELS:
        raise UnreadableImage(BOMB)
    return head


def _png(read: Read, size: int) -> Head:
    head = read(0, 26)
    if len(head) < 26 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise UnreadableImage("it is a PNG with a damaged header")
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    if colour not in PNG_CHANNELS or depth not in (1, 2, 4, 8, 16):
        raise UnreadableImage("it is a PNG with a damaged header")
    if depth == 16 and colour != 0:
        raise UnreadableImage("it has more than 8 bits in several channels")
    return Head(height, width, PNG_CHANNELS[colour], 65535 if depth == 16 else 255)


def _jpeg(read: Read, size: int) -> Head:
    at = 2 if read(0, 2) == b"\xff\xd8" else size
    for _ in range(JPEG_SEGMENTS):
        head = read(at, 10)
        if len(head) < 10 or head[0] != 0xFF:
            break
        marker, length, precision, height, width, channels = struct.unpack(">xBHBHHB", head)
        if marker in (0xC0, 0xC1, 0xC2):
            if precision != 8 or channels not in (1, 3):
                raise UnreadableImage(f"it is a JPEG of {precision} bits in {channels} channels")
            return Head(height, width, channels, 255)
        if 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            raise UnreadableImage("it is a lossless or arithmetic JPEG")
        at += 1 if marker == 0xFF else 2 + max(length, 2)  # FF: filling
    raise UnreadableImage("it is a JPEG with a damaged header")


def _npy(read: Read, size: int) -> Head:
    try:
        shape, dtype, _ = parse_header(read(0, HEADER_BYTES), size)
    except ValueError as error:
        raise UnreadableImage(str(error)) from error
    if shape[2:] not in ((), (1,), (3,)):
        raise UnreadableImage(f"it has {shape[2]} channels")
    return Head(shape[0], shape[1], shape[2] if len(shape) == 3 else 1, int(np.iinfo(dtype).max))
