"""The members of a tar, found by hopping from header to header, strictly.

    512 bytes   header: name, size, type, checksum
    size        content, filled up to a multiple of 512
    …
    2 x 512     zeros: the end; more zeros may follow

Readers that stream (tarfile, webdataset) take a damaged or zeroed header for the end and lose what follows without a
word. Here a tar ends where its end mark says so and nothing comes behind it, or it is refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from ...engine.errors import UserError
from ..store.local import Store, display

BLOCK = tarfile.BLOCKSIZE
AHEAD = 16 * 1024  # read at a time: small members and their headers come as one request
EXTENDED_LIMIT = 2**20  # bytes of a long name or of PAX records
END_LIMIT = 2**20  # zeros behind the end; writers fill up to their record, 10 kB as a rule
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED = (*PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, where its content lies; `plain` is False for links and devices."""

    name: str
    offset: int
    size: int
    plain: bool


class Window:
    """A shard read here and there: what follows is fetched along."""

    def __init__(self, store: Store, shard: str):
        self.store, self.shard, self.size = store, shard, store.size(shard)
        self._start, self._block = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """These bytes, fewer at the shard's end."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if offset < self._start or offset + size > self._start + len(self._block):
            ahead = min(max(size, AHEAD), self.size - offset)
            self._start, self._block = offset, self.store.read(self.shard, offset, ahead)
        return self._block[offset - self._start : offset - self._start + size]

    def damage(self, what: str, offset: int) -> UserError:
        """What to say where the tar is not one."""
        return UserError(f"the shard {display(self.shard)} {what} at byte {offset}; get or write it again")


def members(tar: Window) -> Iterator[Member]:
    """Every file of a tar, in its order; folders are left out.

    Raises:
        UserError: it is no tar, is compressed, damaged or cut short; names shard and offset.
    """
    offset, told = 0, dict[str, str]()  # what extended headers tell of the next member
    while header := _header(tar, offset):
        start = offset + BLOCK
        size = _size(tar, offset, header, told)
        offset = start + -(-size // BLOCK) * BLOCK
        if start + size > tar.size:
            raise tar.damage(f"is cut short: {size} bytes of a member should follow", start)
        if header.type in EXTENDED:
            told |= _extended(tar, start, size, header.type)
            continue
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in told):
            raise tar.damage("holds a sparse file (write it without tar --sparse)", start)
        if header.type != tarfile.DIRTYPE:
            yield Member(told.get("path", header.name), start, size, header.type in tarfile.REGULAR_TYPES)
        told = {}
    if told:
        raise tar.damage("ends after an extended header", offset)


def _header(tar: Window, offset: int) -> tarfile.TarInfo | None:
    block = tar.read(offset, BLOCK)
    if block == bytes(BLOCK):
        _check_end(tar, offset)
        return None
    for magic, method in COMPRESSED.items():
        if offset == 0 and block.startswith(magic):
            raise UserError(f"the shard {display(tar.shard)} is compressed with {method}; unpack it to a plain .tar")
    if len(block) < BLOCK:
        raise tar.damage("ends without an end mark (it is cut short)" if offset else "is no tar", offset)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise tar.damage("has a damaged header" if offset else "is no tar", offset) from error


def _size(tar: Window, offset: int, header: tarfile.TarInfo, told: dict[str, str]) -> int:
    """Bytes of content behind a header: none for links, folders and devices, whatever they claim."""
    if header.type in EMPTY:
        return 0
    size = header.size
    if header.type not in EXTENDED and "size" in told:
        size = int(told["size"]) if told["size"].isdecimal() and len(told["size"]) < 20 else -1
    if size < 0:
        raise tar.damage("has a damaged header", offset)
    return size


def _extended(tar: Window, start: int, size: int, kind: bytes) -> dict[str, str]:
    """What a long name or PAX records tell of the next member, of what matters here."""
    if size > EXTENDED_LIMIT:
        raise tar.damage(f"has an extended header of {size} bytes", start)
    content = tar.read(start, size)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind not in PAX:
        return {}
    try:
        return _records(content)
    except ValueError as error:
        raise tar.damage("has a damaged extended header", start) from error


def _records(content: bytes) -> dict[str, str]:
    """PAX records, each `LENGTH KEY=VALUE` and a line feed, the length counting all of it.

    Raises:
        ValueError: the lengths do not fit.
    """
    records, at = dict[str, str](), 0
    while at < len(content):
        blank = content.index(b" ", at, at + 10)
        end = at + int(content[at:blank])
        key, equals, value = content[blank + 1 : end - 1].partition(b"=")
        if not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise ValueError("record")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def _check_end(tar: Window, offset: int) -> None:
    rest = tar.size - offset
    if rest > END_LIMIT or any(tar.read(offset, rest)):
        raise tar.damage("goes on behind its end mark (a zeroed header, or tars put one after another)", offset)
