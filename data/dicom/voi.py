"""What each stored number of a DICOM image means: modality, VOI, inversion and padding, as one table.

    stored code -> modality LUT or rescale -> VOI LUT or window -> inversion -> padding to 0 -> 0 … max_value
    (C.11.1)                                 (C.11.2)              (C.7.6.3.1.2)  (C.7.5.1.1.2)

max_value is what the stored bits hold, or a lookup table's, or 65535 where a window is so wide or so curved that fewer
bits would lose grey levels. There are at most 65536 codes, so all of it is computed once for each code and the image
only looks itself up. Numbers in brackets are sections of DICOM PS3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy.special import expit

from ..image import UnreadableImage
from ..record import Pixels

Values = NDArray[np.float64]
Voi = Literal["lut", "window", "none"]
Choice = Literal["auto", "window", "none"]


@dataclass(frozen=True, kw_only=True)
class Grey:
    """What becomes of the stored codes: `table[code]` is 0 … max_value, dark to bright."""

    table: Pixels
    max_value: int
    voi: Voi


def grey(
    header: Dataset, bits: int, *, signed: bool, negative: bool = True, voi: Choice = "auto", index: int = 0
) -> Grey:
    """The table for images of so many stored bits; two's complement codes if signed, and whether any is `negative`.

    Where neither a VOI nor a modality LUT is applied, the range of the codes becomes 0 … 2**bits - 1: stored integers
    survive exactly under any rescale, which is but another name for them (turned round where its slope is negative).
    Of signed codes without a negative one, that range is the upper half: else black would be a middle grey.

    Raises:
        UnreadableImage: a number of the header is missing, not finite or makes no sense.
    """
    codes = np.arange(1 << bits, dtype=np.int64)
    stored = np.where(codes >> (bits - 1), codes - (1 << bits), codes) if signed else codes
    values, lut_bits = _modality(header, stored)
    used: Voi = "none"
    lut = _item(header, "VOILUTSequence", index) if voi == "auto" else None
    window = _window(header, index) if voi != "none" and lut is None else None
    if lut is not None:
        (values, bits), used = _looked_up(values, lut), "lut"
    elif window is not None:
        values, used = _windowed(values, *window), "window"
        bits = bits if _keeps_levels(values, bits) else 16
        values = values * ((1 << bits) - 1)
    elif lut_bits:
        bits = lut_bits
    else:
        bits -= signed and not negative
        taken = values[: 1 << bits]
        values = (values - taken.min()) / np.ptp(taken) * ((1 << bits) - 1)
    max_value = (1 << bits) - 1
    levels = np.rint(values).clip(0, max_value)
    levels = max_value - levels if is_inverted(header) else levels
    levels[_is_padding(header, stored)] = 0
    table = levels.astype(np.uint8) if max_value <= 255 else levels.astype(np.uint16)
    return Grey(table=table, max_value=max_value, voi=used)


def is_inverted(header: Dataset) -> bool:
    """Whether small numbers are bright once modality and VOI are done.

    MONOCHROME1 says so (C.7.6.3.1.2: "displayed as white after any VOI gray scale transformations"). For DX and MG the
    Presentation LUT Shape says the same again: INVERSE belongs to MONOCHROME1, IDENTITY to MONOCHROME2 (C.8.11.3), so
    the usual pair is one inversion, not two. Of the two pairs that the standard bars, MONOCHROME2 with INVERSE is
    inverted, as the shape was put there on purpose; MONOCHROME1 with IDENTITY too, as IDENTITY is what a writer leaves
    in that never thought of the shape, and every reader that knows photometric interpretation alone inverts it.
    """
    return (
        text(header, "PhotometricInterpretation") == "MONOCHROME1" or text(header, "PresentationLUTShape") == "INVERSE"
    )


def _modality(header: Dataset, stored: NDArray[np.int64]) -> tuple[Values, int]:
    """Stored values in the units of the modality, and the bits of a modality LUT or 0."""
    lut = _item(header, "ModalityLUTSequence", 0)
    if lut is not None:
        return _looked_up(stored.astype(np.float64), lut)
    slope = (numbers(header, "RescaleSlope") or [1.0])[0]
    intercept = (numbers(header, "RescaleIntercept") or [0.0])[0]
    values = stored.astype(np.float64) * slope + intercept
    if not np.isfinite(values).all() or not np.ptp(values):
        raise UnreadableImage("its rescale slope or intercept makes no sense")
    return values, 0


def _item(header: Dataset, keyword: str, index: int) -> Dataset | None:
    items = header.get(keyword) or []
    return items[_place(index, len(items))] if len(items) else None


def _place(index: int, count: int) -> int:
    """Which of several tables or windows is meant: the one asked for, or the first where there are fewer."""
    return index if 0 <= index < count else 0


def _looked_up(values: Values, item: Dataset) -> tuple[Values, int]:
    """Values through a LUT (C.11.1.1.1, C.11.2.1.1), its first and last entries going on beyond its ends; its bits."""
    descriptor = [int(number) for number in numbers(item, "LUTDescriptor")]
    if len(descriptor) != 3 or not 8 <= descriptor[2] <= 16:
        raise UnreadableImage("a lookup table of its header is not described as the standard asks")
    count, first, bits = descriptor
    entries = _entries(item, count % 65536 or 65536)
    if values.min() < 0 and first >= 32768:
        first -= 65536  # signed, and written as if it were not
    place = np.rint(values - first).clip(0, entries.size - 1).astype(np.intp)
    # Some writers understate their bits; the values themselves are trusted.
    return entries[place].astype(np.float64), max(bits, int(entries.max()).bit_length())


def _entries(item: Dataset, count: int) -> NDArray[np.int64]:
    """The LUT's entries, in whichever of its legal forms they are written."""
    data = item.get("LUTData")
    if isinstance(data, bytes):
        order = "<" if item.original_encoding[1] is not False else ">"
        data = np.frombuffer(data, np.uint8 if len(data) in (count, count + count % 2) else order + "u2")
    entries = np.atleast_1d(np.asarray([] if data is None else data)).astype(np.int64)[:count]
    if entries.size != count or entries.min() < 0 or entries.max() > 65535:
        raise UnreadableImage("a lookup table of its header does not hold the entries it announces")
    return entries


def _window(header: Dataset, index: int) -> tuple[float, float, str] | None:
    """Centre, width and function of the window asked for, or of the first where there are fewer."""
    centres, widths = numbers(header, "WindowCenter"), numbers(header, "WindowWidth")
    if not centres and not widths:
        return None
    if len(centres) != len(widths):
        raise UnreadableImage("its windows lack a centre or a width")
    place = _place(index, len(centres))
    return centres[place], widths[place], text(header, "VOILUTFunction") or "LINEAR"


def _windowed(values: Values, centre: float, width: float, function: str) -> Values:
    """Values through a window, as parts of the output range (C.11.2.1.2 and C.11.2.1.3)."""
    if width < (1 if function == "LINEAR" else np.finfo(np.float32).tiny):
        raise UnreadableImage("its window has no width")
    if function == "SIGMOID":
        sigmoid: Values = expit(4 * (values - centre) / width)
        return sigmoid
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if function != "LINEAR":
        raise UnreadableImage("its window has a function that the standard does not know")
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _keeps_levels(parts: Values, bits: int) -> bool:
    """Whether parts of the output range that differ still do so in so many bits."""
    return np.unique(np.rint(parts * ((1 << bits) - 1))).size == np.unique(parts).size


def _is_padding(header: Dataset, stored: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which stored values fill up the frame: one, or the range between two in either order (C.7.5.1.1.2)."""
    limits = numbers(header, "PixelPaddingValue")[:1]
    if not limits:
        return np.zeros(stored.shape, np.bool_)
    limits += numbers(header, "PixelPaddingRangeLimit")[:1]
    if stored.min() < 0:
        limits = [limit - 65536 if limit >= 32768 else limit for limit in limits]  # written as if it were unsigned
    return (stored >= min(limits)) & (stored <= max(limits))


def text(header: Dataset, keyword: str) -> str:
    """An attribute's first value in capitals, or nothing."""
    value = header.get(keyword)
    value = value[0] if not isinstance(value, str) and hasattr(value, "__len__") and len(value) else value
    return "" if value is None else str(value).strip().upper()


def numbers(header: Dataset, keyword: str) -> list[float]:
    """An attribute's values; none where it is missing or empty.

    Raises:
        UnreadableImage: one is not a finite number.
    """
    try:
        value = header.get(keyword)
        single = isinstance(value, (str, bytes)) or not hasattr(value, "__iter__")
        parts = [] if value is None or value == "" else [value] if single else value
        found = [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UnreadableImage(f"its {keyword} is not a number")
    return found
