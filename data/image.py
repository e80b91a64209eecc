"""Image files in and out without losing a grey level. (Pillow's convert("L") clips 16 bits at 255: never used.)"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..engine.errors import UserError, one_line
from .record import Film, Pixels

Image.MAX_IMAGE_PIXELS = 300_000_000  # the largest plate scanners stay below; beyond lies a decompression bomb
SUFFIXES = {".png", ".pgm", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}


DAMAGE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombWarning,
    Image.DecompressionBombError,
)


def stamp(path: Path) -> str:
    """Size and time of a file: enough to notice that it was replaced."""
    found = path.stat()
    return f"{found.st_size} {int(found.st_mtime)}"


class UnreadableImage(Exception):
    """A file that cannot be decoded: recorded and skipped where others are good."""


def read_film(path: Path, spacing_mm: float | None = None) -> Film:
    """A grayscale film from an image file; colour files are taken if their channels are equal.

    Raises:
        UnreadableImage: not an image, cut short, or in real colour.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = decode(image)
    except DAMAGE as error:
        raise UnreadableImage(one_line(str(error).replace(str(path), path.name))) from error
    return Film(pixels=pixels, max_value=int(np.iinfo(pixels.dtype).max), spacing_mm=spacing_mm)


def decode(image: Image.Image) -> Pixels:
    """The pixels of an opened image, refusing what Pillow would alter on the way.

    Raises:
        ValueError: more than 8 bits in several channels, which Pillow cuts to 8; real colours.
    """
    bits = stored_bits(image)
    pixels = to_gray(np.asarray(image.convert({"P": "RGB", "1": "L"}.get(image.mode, image.mode))))
    if bits > 8 and len(image.getbands()) > 1:
        raise ValueError(f"it has {bits} bits in several channels; save it as grayscale")
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
    return np.iinfo(np.uint16).max - pixels if white_is_zero and pixels.dtype == np.uint16 else pixels


def stored_bits(image: Image.Image) -> int:
    """Bits a channel in the file, as far as its header tells without decoding: PNG's IHDR, TIFF's tag 258."""
    file = getattr(image, "fp", None)
    if image.format == "PNG" and file is not None:
        place = file.tell()
        file.seek(24)
        bits = file.read(1)[0]
        file.seek(place)
        return int(bits)
    return max(getattr(image, "tag_v2", {}).get(258, (8,)))


def to_gray(array: np.ndarray) -> Pixels:
    """(H, W) uint8 or uint16 from what Pillow decoded, exactly.

    Raises:
        ValueError: the channels differ, or the values are no unsigned 8 or 16 bits.
    """
    if array.ndim == 3:
        colour = array[..., : 3 if array.shape[2] >= 3 else 1]
        if (colour != colour[..., :1]).any():
            raise ValueError("it is a colour image; miram reads grayscale")
        array = colour[..., 0]
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # TIFF may be big-endian
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)  # Pillow's mode I holds 16-bit PGM and TIFF
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its pixels are {array.dtype}, not unsigned 8 or 16 bits")
    return array


def encode_png(pixels: Pixels) -> bytes:
    """PNG bytes at compression level 1: 12 % larger than level 6 and four times faster to write."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def decode_png(content: bytes, source: str) -> Pixels:
    """(H, W) pixels of a shard's PNG.

    Raises:
        UserError: the bytes are no sound PNG; `source` is named.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["png"]) as image:
            return to_gray(np.asarray(image))
    except DAMAGE as error:
        raise UserError(f"{source} cannot be decoded; run `miram data verify` on its folder") from error
