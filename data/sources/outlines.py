"""Outlines that OsiriX wrote as an Apple property list, without trusting it.

<plist><dict>
  <key>Images</key><array><dict>
    <key>ROIs</key><array><dict>
      <key>Name</key><string>Mass</string>
      <key>Point_px</key><array><string>(2121.5, 1451.9)</string> …</array>
    </dict> …
"""

from __future__ import annotations

import math
import plistlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from ..image import UnreadableImage
from ..record import Polygon

LARGEST = 32 * 2**20  # bytes; hundreds of outlines take one or two millions
POINT = re.compile(r"\(\s*(-?[\d.]+(?:e[+-]?\d+)?)\s*,\s*(-?[\d.]+(?:e[+-]?\d+)?)\s*\)", re.IGNORECASE)
DAMAGE = (ExpatError, plistlib.InvalidFileException, ValueError, LookupError, TypeError, AttributeError, OSError)


def read_outlines(path: Path) -> tuple[Polygon, ...]:
    """The outlines in a file, in its order, labelled with their names; those without a point are left out.

    plistlib refuses entity declarations and never fetches what a file refers to.

    Raises:
        UnreadableImage: too large, no property list, or one of another form.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UnreadableImage(f"its outlines take more than {LARGEST // 2**20} MiB; no film has that many")
        content = plistlib.loads(path.read_bytes(), fmt=plistlib.FMT_XML)
        return tuple(polygon for polygon in _polygons(content) if polygon.points)
    except DAMAGE as error:
        raise UnreadableImage("its outlines cannot be read; get an undamaged copy of the XML file") from error


def _polygons(content: Any) -> Iterator[Polygon]:
    for image in content["Images"]:
        for roi in image.get("ROIs", ()):  # an image without outlines may lack the list, too
            yield Polygon(points=tuple(_point(text) for text in roi["Point_px"]), label=str(roi.get("Name", "")))


def _point(text: str) -> tuple[float, float]:
    match = POINT.fullmatch(text.strip())
    if match is None:
        raise ValueError("no point")
    x, y = float(match[1]), float(match[2])
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError("no finite point")
    return x, y
