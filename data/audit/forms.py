"""The form of what a data set holds: whether a tar header, a PNG, a sample's JSON or an index has room for more.

Each function yields a clause for everything that a file of `layout.py` has not.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from tarfile import GNU_FORMAT, REGTYPE, USTAR_FORMAT, TarInfo
from typing import Any

from ..geometry import Geometry
from ..identifying import identifies
from ..image import MAX_PIXELS
from ..layout import DESCRIBED, KEY_PATTERN, LABEL, MEMBERS
from ..record import Box, Circle, Polygon

FIELDS: Mapping[str, set[str]] = {
    # What a sample's JSON may hold, beside DESCRIBED and labels; and what each of these.
    "schema": set(),
    "mask_kind": set(),
    "geometry": {field.name for field in fields(Geometry)},
    "circles": {field.name for field in fields(Circle)},
    "boxes": {field.name for field in fields(Box)},
    "polygons": {field.name for field in fields(Polygon)},
    "facts": {"photometric", "presentation", "manufacturer", "voi", "masks"},
}
PLACES = [f"{member}_{what}" for member in MEMBERS for what in ("offset", "size")]
KINDS = [kind for kind in MEMBERS if kind not in ("jpg", "jpeg")]  # foreign sets may hold those
OWNERS = ("", "root")
NAME = re.compile(r"[A-Za-z][A-Za-z_]{0,30}")
MODES = (0o444, 0o644)


def tar_header(member: TarInfo, header: bytes) -> Iterator[str]:
    """What a header holds beside name and size."""
    kind = member.name.partition(".")[2]
    if not KEY_PATTERN.fullmatch(member.name.partition(".")[0]) or kind not in KINDS:
        yield f"its name is not KEY.{'|'.join(KINDS)}"
    if (member.uid, member.gid) != (0, 0):
        yield "names a user or group by number"
    if member.uname not in OWNERS or member.gname not in OWNERS:
        yield "names a user or group"
    if member.mtime:
        yield "says when"
    if member.type != REGTYPE:
        yield "is of no plain file"
    plain = TarInfo(member.name)
    for field in ("size", "mode", "uid", "gid", "uname", "gname", "mtime", "type"):
        setattr(plain, field, getattr(member, field))
    written = [plain.tobuf(form, "utf-8", "surrogateescape") for form in (USTAR_FORMAT, GNU_FORMAT)]
    if member.mode not in MODES or header not in written:
        yield "has more than a name and a size"


def hidden(content: bytes, where: str) -> Iterator[str]:
    """Bytes where zeros belong."""
    if any(content):
        yield f"{where} is not empty"


def chunks(content: bytes, *, drawn: bool) -> Iterator[tuple[str, str]]:
    """Chunks of a PNG that a sample's has not (PNG 1.2, 3.2), and what lies behind its end or its pixels."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG")
    place, kind, packed = 8, b"", []
    while kind != b"IEND":
        length, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        body = content[place + 8 : place + 8 + length]
        if len(kind) < 4 or len(body) < length:
            raise ValueError("cut short")
        packed += [body] if kind == b"IDAT" else []
        made_by = drawn and (kind == b"pHYs" or (kind == b"tEXt" and body.startswith(b"Software\0Matplotlib version")))
        if not (kind in (b"IHDR", b"IDAT", b"IEND") or made_by):
            yield "", f"has a chunk {kind.decode('ascii') if kind.isalpha() and kind.isascii() else 'of no known kind'}"
        place += 12 + length
    if place != len(content):
        yield "", "has bytes behind its end"
    yield from (("", what) for what in _behind_pixels(content[16:29], packed))


def _behind_pixels(head: bytes, packed: list[bytes]) -> Iterator[str]:
    """Whether the compressed stream holds more than the image needs."""
    width, height = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(head[9], 0)
    needed = height * (1 + -(-width * channels * head[8] // 8))
    if width * height > MAX_PIXELS or not needed:
        raise ValueError("a size that no film has")
    stream = zlib.decompressobj()
    found = len(stream.decompress(b"".join(packed), needed + 1))
    if found != needed or stream.unused_data or not stream.eof:
        yield "has more or fewer bytes than its pixels need"


def foreign_fields(sample: Any) -> Iterator[str]:
    """What a sample's JSON has beside `FIELDS`, `DESCRIBED` and labels."""
    if not isinstance(sample, dict):
        yield "is no object"
        return
    for name, value in sample.items():
        if name in FIELDS:
            parts = value if isinstance(value, list) else [value]
            keys = {key for part in parts if isinstance(part, dict) for key in part}
            if keys - FIELDS[name] or (FIELDS[name] and not all(isinstance(part, dict) for part in parts)):
                yield f"{name} has a field that no sample has"
        elif fault := _unlisted(name) or ("has a field that no sample has" if isinstance(value, dict | list) else ""):
            yield fault


def foreign_columns(header: list[str]) -> Iterator[tuple[int, str]]:
    """Number of every column that no index has."""
    for i, name in enumerate(header, 1):
        if name not in ("key", "shard", *PLACES) and (fault := _unlisted(name)):
            yield i, fault if name.startswith(LABEL) else "is no column of an index"


def _unlisted(name: str) -> str:
    """Why a name does not belong into a sample, or nothing. Long ones are not quoted: they may be what they hide."""
    task = name.removeprefix(LABEL)
    if name in DESCRIBED or (name != task and not identifies(task)):
        return ""
    if name == task:
        return "has a field that no sample has"
    return f"label {task if NAME.fullmatch(task) else '…'} looks identifying"
