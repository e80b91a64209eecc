"""Stored integers out of DICOM files, uncompressed or not, within bounds of memory that the header sets.

    preamble (128 bytes)  "DICM"  group 0002: transfer syntax  |  data set … Rows, Columns, bits …  (7FE0,0010) pixels

The pixels are one uncompressed block, or items that hold the frame's code stream. Deflated files are compressed from
the bar on.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.tag import BaseTag
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from ..image import UnreadableImage
from ..record import Pixels
from .voi import numbers

SMALLEST = 64  # pixels on the shorter side: a thumbnail
BESIDE = 256 << 20  # bytes of anything else that a file may hold beside its pixels
LARGE = 1 << 20  # header elements beyond this are passed over unread; no lookup table is larger
LOSSY = (JPEGBaseline8Bit, JPEGLSNearLossless, JPEG2000)
DECODING = ["Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BitsAllocated"]
DECODING += ["BitsStored", "HighBit", "PixelRepresentation", "PixelData"]


@contextmanager
def guarded(part: str) -> Iterator[None]:
    """Turn whatever pydicom raises at damage into UnreadableImage, without its words: they may quote the header."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage:
        raise
    except Exception as error:  # pydicom raises nearly every kind
        raise UnreadableImage(f"its {part} cannot be read ({type(error).__name__})") from error
    finally:
        logger.disabled = was_disabled


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a frame's pixels are stored."""

    rows: int
    columns: int
    allocated: int  # bits a pixel takes
    bits: int  # of them in use
    shift: int  # how far above the lowest bit they begin
    signed: bool

    @classmethod
    def of(cls, header: Dataset) -> Layout:
        """The layout a header describes.

        Raises:
            UnreadableImage: it is missing, impossible, or of a size or depth that is not read.
        """
        rows, columns, allocated, bits = (
            _whole(header, keyword) for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored")
        )
        if not rows * columns <= Image.MAX_IMAGE_PIXELS:  # type: ignore[operator]
            raise UnreadableImage(f"it has {rows} x {columns} pixels, more than any plate scanner writes")
        if min(rows, columns) < SMALLEST:
            raise UnreadableImage(f"it has {rows} x {columns} pixels, too few for a mammogram")
        high = _whole(header, "HighBit", bits - 1)
        if allocated not in (8, 16) or not 8 <= bits <= high + 1 <= allocated:
            raise UnreadableImage(f"it has {bits} of {allocated} bits a pixel; 8 to 16 bits are read")
        signed = _whole(header, "PixelRepresentation", 0) == 1
        return cls(rows=rows, columns=columns, allocated=allocated, bits=bits, shift=high + 1 - bits, signed=signed)

    @property
    def size(self) -> int:
        """Bytes of the uncompressed frame."""
        return self.rows * self.columns * self.allocated // 8


def _whole(header: Dataset, keyword: str, default: int | None = None) -> int:
    found = numbers(header, keyword) or ([] if default is None else [float(default)])
    if len(found) != 1 or not found[0].is_integer() or found[0] < 0:
        raise UnreadableImage(f"its {keyword} is missing or no whole number")
    return int(found[0])


def read_dataset_of(path: Path, *, pixels: bool) -> Dataset:
    """A file's header without its pixels, or just what decoding needs. The syntax is `file_meta`'s and always set."""
    with path.open("rb") as file:
        read_preamble(file, force=True)
        meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            return _inflated(file.read(BESIDE), pixels=pixels)
    tags: Any = DECODING if pixels else None
    later = None if pixels else LARGE
    found = pydicom.dcmread(path, defer_size=later, stop_before_pixels=not pixels, force=True, specific_tags=tags)
    if "TransferSyntaxUID" not in found.file_meta:
        implicit, little = found.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        found.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return found


def _inflated(content: bytes, *, pixels: bool) -> Dataset:
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0) if pixels else BESIDE
    plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, most)
    stop = None if pixels else _at_pixels
    found = read_dataset(io.BytesIO(plain), False, True, stop_when=stop)
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return found


def _at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag.group >= 0x7FE0


def uncompressed(path: Path, layout: Layout) -> Pixels:
    """(rows, columns) words of a file without compression: all the bits that were allocated.

    Raises:
        UnreadableImage: there are fewer than the header says.
    """
    frame = _frame(path, layout)
    if len(frame.PixelData) >= layout.size + layout.size // layout.rows:
        raise UnreadableImage("it has more rows of pixels than its header says")
    words: dict[str, Any] = {"bits_stored": layout.allocated, "pixel_representation": 0}
    pixels, _ = get_decoder(frame.file_meta.TransferSyntaxUID).as_array(frame, raw=True, **words)
    native: Pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return native


def decode_frame(path: Path, layout: Layout) -> Pixels:
    """(rows, columns) pixels of a compressed file. Damage may end the process: see `dicom_decoder`.

    Raises:
        UnreadableImage: the stream is damaged, of another size than the header says, or of a transfer syntax that
            nothing installed decodes; names that and the plugin.
    """
    frame = _frame(path, layout)
    syntax = frame.file_meta.TransferSyntaxUID
    _check_stream(syntax, get_frame(frame.PixelData, 0, number_of_frames=1), layout)
    try:
        return get_decoder(syntax).as_array(frame, raw=True)[0]
    except Exception as error:  # decoders raise nearly every kind
        raise UnreadableImage(_why_not(syntax)) from error


def _frame(path: Path, layout: Layout) -> Dataset:
    if path.stat().st_size > 2 * layout.size + BESIDE:
        raise UnreadableImage("its file is far larger than its pixels")
    frame = read_dataset_of(path, pixels=True)
    if "PixelData" not in frame:
        raise UnreadableImage("it holds no pixels, or was cut short")
    return frame


def codes_of(pixels: Pixels, layout: Layout, syntax: str) -> NDArray[np.integer[Any]]:
    """Just the bits in use of each pixel, two's complement where signed.

    Raises:
        UnreadableImage: the pixels are of another size than the header says.
    """
    if pixels.shape != (layout.rows, layout.columns):
        raise UnreadableImage("its pixels are not of the size its header says")
    words: NDArray[np.integer[Any]] = pixels.view(np.uint8 if pixels.itemsize == 1 else np.uint16)
    most = (1 << layout.bits) - 1
    if syntax in LOSSY and not layout.signed:  # what overshoots the range is bright, not what is left of it
        return np.minimum(words, most)
    return (words >> layout.shift) & most


def _why_not(syntax: pydicom.uid.UID) -> str:
    """Why pixels of a syntax were not decoded, as far as the plugins tell."""
    named = f"its pixels ({syntax.name}, {syntax}) cannot be decoded"
    try:
        missing = get_decoder(syntax).missing_dependencies
    except NotImplementedError:
        return f"{named}: no plugin of pydicom does"
    wanted = ", ".join(plugin.replace(" - requires ", " (") + ")" for plugin in missing)
    return f"{named}: they are damaged" + (f", or need what is not installed: {wanted}" if missing else "")


def _check_stream(syntax: str, stream: bytes, layout: Layout) -> None:
    """Refuse a code stream of another size than the header's before memory is taken for it."""
    if len(stream) > 2 * layout.size + 65536:
        raise UnreadableImage("its compressed pixels are larger than they would be uncompressed")
    if layout.shift:
        raise UnreadableImage("its compressed pixels are said to begin above the lowest bit")
    if syntax in JPEG2000TransferSyntaxes:
        found = _size_of_j2k(stream)
    elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
        found = _size_of_jpeg(stream)
    elif syntax == RLELossless:
        found = _rows_of_rle(stream, layout), layout.columns, 1
    else:
        return
    if found != (layout.rows, layout.columns, 1):
        raise UnreadableImage("its compressed pixels are damaged, in colour, or of another size than its header says")


def _rows_of_rle(stream: bytes, layout: Layout) -> int:
    """Whole rows in the longest segment of an RLE frame (PS3.5 annex G), counting no further than one too many."""
    segments, *offsets = struct.unpack_from("<16I", stream)
    longest, most = 0, (layout.rows + 1) * layout.columns
    for place, end in zip(offsets[:segments], [*offsets[1:segments], len(stream)], strict=False):
        length = 0
        while place < min(end, len(stream)) and length < most:
            head = stream[place]
            length += head + 1 if head < 128 else 257 - head if head > 128 else 0
            place += head + 2 if head < 128 else 2 if head > 128 else 1
        longest = max(longest, length)
    return longest // layout.columns


def _size_of_j2k(stream: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components from the SIZ marker of a JPEG 2000 stream (ISO 15444-1, A.5.1)."""
    start = stream[:4096].find(b"\xff\x4f\xff\x51")  # some writers put a box before it
    if start < 0 or len(stream) < start + 42:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", stream, start + 8)
    return bottom - top, right - left, struct.unpack_from(">H", stream, start + 40)[0]


def _size_of_jpeg(stream: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components from the frame header of a JPEG or JPEG-LS stream (ISO 10918-1, B.2.2)."""
    place = 2 if stream[:2] == b"\xff\xd8" else len(stream)
    while place + 10 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, components = struct.unpack_from(">HHB", stream, place + 5)
            return rows, columns, components
        else:
            place += 2 + struct.unpack_from(">H", stream, place + 2)[0]
    return None
