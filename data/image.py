"""Image files in and out without losing a grey level. (Pillow's convert("L") clips 16 bits at 255: never used.)

Films are (H, W) of 8 or 16 bits, or (H, W, 3) of 8 bits where colour is asked for. Transparency is dropped, palettes
are looked up. An EXIF orientation in a file is obeyed, as viewers do: photographs carry one, films do not. Images in
shards are taken as stored, since every other reader of the shard takes them so.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..engine.errors import UserError
from .record import Film, Pixels

MAX_PIXELS = 300_000_000  # the largest plate scanners stay below; beyond lies a decompression bomb
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
SUFFIXES = {".png", ".pgm", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}
DENSEST = 8 * 1100  # pixels a byte of PNG: deflate gives at most 1032 bytes, of 8 pixels each
FORMATS = ("PNG", "PPM", "TIFF", "JPEG", "BMP")  # Pillow tries all it knows, and some of those start other programs
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "I", "I;16", "I;16B", "I;16L"}
EXPANDED = {"1": "L", "P": "RGB", "PA": "RGB"}
ZERO_IS_WHITE = 0  # in TIFF's tag 262


def stamp(path: Path) -> str:
    """Size and time of a file: enough to notice that it was replaced."""
    found = path.stat()
    return f"{found.st_size} {int(found.st_mtime)}"


class UnreadableImage(Exception):
    """A file that cannot be used, and why; no name or value from it. Recorded and skipped where others are good."""


# ---------------------------------------------------------------------------------------------- files


def read_film(path: Path, spacing_mm: float | None = None, *, channels: Literal[1, 3] = 1) -> Film:
    """A film from an image file: grayscale, also from equal channels; with 3 channels (H, W, 3) of 8 bits.

    Raises:
        UnreadableImage: no image, cut short, of real colour or more bits than the channels asked for can keep.
    """
    with opened(path) as image:
        pixels, max_value = as_stored(image, upright=True)
        pixels = in_colour(pixels) if channels == 3 else in_gray(pixels)
    return Film(pixels=pixels, max_value=max_value, spacing_mm=spacing_mm)


@contextmanager
def opened(file: Path | io.BytesIO, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """An image of a size and mode that we take. Pillow's complaints get reasons of ours, as its own may quote the file.

    Raises:
        UnreadableImage: also for whatever goes wrong with the image while it is open.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _stream(file) as stream:
                size = stream.seek(0, io.SEEK_END)
                stream.seek(0)
                with Image.open(stream, formats=formats) as image:
                    check(image, size)
                    yield image
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(BOMB) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"it is no sound image of the kinds {', '.join(formats).upper()}") from error
    except Exception as error:  # on hostile bytes, decoders raise anything from struct.error to TypeError
        known = isinstance(error, OSError) and error.strerror
        raise UnreadableImage(f"it cannot be read: {known}" if known else "it is damaged or cut short") from error


def _stream(file: Path | io.BytesIO) -> BinaryIO:
    """The file as a stream: given a path, Pillow maps it, and turned TIFF come out scrambled (Pillow 13.0)."""
    return file.open("rb") if isinstance(file, Path) else file


BOMB = f"it claims more than {MAX_PIXELS} pixels, which looks like a decompression bomb"


def check(image: Image.Image, size: int) -> None:
    """Refuse what Pillow would allocate, alter or leave out, of a file of that many bytes.

    Raises:
        UnreadableImage: too many pixels, several pages, or colours that are neither gray nor RGB.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(BOMB)
    if image.mode not in MODES:
        raise UnreadableImage(f"its pixels are {image.mode}; save it as grayscale of 8 or 16 bits, or as RGB")
    if image.format == "TIFF" and getattr(image, "is_animated", False):
        raise UnreadableImage("it has several pages; save each as a file")
    if image.format == "PNG" and image.width * image.height > DENSEST * size:
        raise UnreadableImage("it claims more pixels than its bytes can hold")


def stored_range(image: Image.Image) -> int:
    """The largest value that its header allows a channel; ask before its pixels are loaded."""
    assert isinstance(image, ImageFile.ImageFile)
    bits = 8
    if image.format == "PNG" and image.fp is not None:  # IHDR
        place = image.fp.tell()
        image.fp.seek(24)
        bits = image.fp.read(1)[0]
        image.fp.seek(place)
    elif image.format == "TIFF":
        bits = max(getattr(image, "tag_v2", {}).get(258, (8,)))
    elif image.format == "PPM" and image.mode != "1":
        arguments = image.tile[0].args  # of Pillow's decoder: (mode, largest), or the mode of 255 or 65535
        return int(arguments[1]) if isinstance(arguments, tuple) else 2**16 - 1 if "16" in str(arguments) else 255
    return int(2 ** min(max(bits, 8), 16) - 1)


# ---------------------------------------------------------------------------------------------- pixels


def as_stored(image: Image.Image, *, upright: bool) -> tuple[Pixels, int]:
    """(H, W) or (H, W, 3), exactly, and the largest value they could have; turned `upright` as EXIF says, or not.

    Raises:
        UnreadableImage: more than 8 bits in several channels, which Pillow cuts; values that are no 8 or 16 bits.
    """
    largest = stored_range(image)
    if largest > 255 and len(image.getbands()) > 1:
        raise UnreadableImage("it has more than 8 bits in several channels; save it as grayscale, or with 8 bits")
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    array: NDArray[Any] = np.asarray(image.convert(EXPANDED[image.mode]) if image.mode in EXPANDED else image)
    if array.ndim == 3:
        array = np.ascontiguousarray(array[..., :3] if array.shape[2] >= 3 else array[..., 0])
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)  # Pillow's mode I holds 16-bit PGM and TIFF
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # TIFF may be big-endian
    if array.dtype not in (np.uint8, np.uint16):
        raise UnreadableImage(f"its pixels are {array.dtype}, not unsigned 8 or 16 bits")
    return undone(array, image, largest), largest


def undone(array: NDArray[Any], image: Image.Image, largest: int) -> Pixels:
    """The values in the file: Pillow stretches those of PGM to 8 or 16 bits, and leaves 16 bits of TIFF inverted."""
    full = int(np.iinfo(array.dtype).max)
    if image.format == "PPM" and largest < full:
        return ((array.astype(np.uint32) * largest + full // 2) // full).astype(array.dtype)
    if array.dtype == np.uint16 and getattr(image, "tag_v2", {}).get(262) == ZERO_IS_WHITE:
        return np.subtract(largest, array, dtype=np.uint16)
    return array


def in_gray(pixels: Pixels) -> Pixels:
    """(H, W) of the same.

    Raises:
        UnreadableImage: the channels differ.
    """
    if pixels.ndim == 2:
        return pixels
    if (pixels != pixels[..., :1]).any():
        raise UnreadableImage("it is a colour image; --channels 3 keeps colour")
    return pixels[..., 0].copy()


def in_colour(pixels: Pixels) -> Pixels:
    """(H, W, 3) of the same.

    Raises:
        UnreadableImage: it has 16 bits, and colour is kept with 8 only.
    """
    if pixels.dtype != np.uint8:
        raise UnreadableImage("it has more than 8 bits, which --channels 3 does not keep; leave out --channels")
    return pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=2).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- members of shards


def encode_png(pixels: Pixels) -> bytes:
    """PNG bytes of (H, W) or (H, W, 3): header, data, end, and nothing that tells where or when it was made.

    Compression level 1 gives files 12 % larger than level 6 and is four times faster to write.
    """
    assert pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and pixels.ndim == 2), pixels.dtype
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def decode_png(content: bytes, source: str) -> Pixels:
    """(H, W) or (H, W, 3) pixels of a shard's PNG.

    Raises:
        UserError: the bytes are no sound PNG; `source` is named.
    """
    return decode_image(content, source, ("PNG",))


def decode_image(content: bytes, source: str, formats: tuple[str, ...] = ("PNG", "JPEG")) -> Pixels:
    """(H, W) or (H, W, 3) pixels of a PNG or JPEG, as other programs write them into shards.

    Raises:
        UserError: the bytes are neither, damaged, or of a kind that miram does not take; `source` is named.
    """
    try:
        with opened(io.BytesIO(content), formats) as image:
            return as_stored(image, upright=False)[0]
    except UnreadableImage as error:
        raise UserError(f"{source} cannot be decoded ({error}); run `miram data verify` on its folder") from error
