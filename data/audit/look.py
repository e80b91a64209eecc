"""Whether what was written tells whose images they are: data sets, run folders, and any folder that holds such.

Without the archive, by form: tar headers, chunks of PNGs, headers of .npy, fields of JSON and columns of the index are
those of `layout.py` and nothing else (forms.py), and no text has what looks like a UID, a date, a home folder or an
e-mail address.
With the archive, by content: no value of `search.py` occurs, after decompression, in any file or name.
What is not understood is a finding, too. A finding never quotes what was found.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tarfile import HeaderError, TarInfo
from typing import BinaryIO

from ...engine.errors import UserError, one_line
from ..image import decode_png
from ..packed import PackedPixels
from .forms import PLACES, chunks, foreign_columns, foreign_fields, hidden, tar_header
from .own import Own
from .search import Values, archive_values

NUMBERS = {*PLACES, "height", "width", "bits", "max_value", "spacing_mm"}  # cells of these are numbers and no more
TEXT = {*(".json", ".jsonl", ".csv", ".yaml", ".yml", ".txt", ".log", ".md", ".html", ".svg", ".out", ".err", "")}
BLOCK = 512
LARGEST = 2**30  # bytes of a member or a text that are held at once
STEP = 2**26

COUNTS = re.compile(rb'"(bytes|n|samples|parameters|step|steps|images|skipped|seed|pixels)": (\d+|\[[^\]"]*\])')
PATTERNS = {
    "what looks like a UID": re.compile(rb"(?<![\w.])[012](\.(0|[1-9]\d{0,38})){4,64}(?![\w]|\.\d)"),
    "an ISO date": re.compile(rb"(?<![\w.-])(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(?!\d)"),
    "what looks like a DICOM date": re.compile(
        rb"(?<![\w.])(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?![\w]|\.\d)"
    ),
    "a home folder": re.compile(rb"(?<![\w.])/(home|Users|root)/[\w.-]+|\b[A-Za-z]:\\+Users\\+[\w.-]+"),
    "an e-mail address": re.compile(rb"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,}"),
}
EMBEDDED = re.compile(rb"data:image/png;base64,([A-Za-z0-9+/=]+)")
NUMBER = re.compile(r"(-?\d+(\.\d+)?(e-?\d+)?)?")
ATTRIBUTE = re.compile(rb'="[-\d. ]*"')


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that should not be there. No part of it is the value itself."""

    file: str
    place: str  # in the file; empty for all of it
    what: str

    def __str__(self) -> str:
        return f"{self.file}{', ' if self.place else ''}{self.place}: {self.what}"


@dataclass
class Searched:
    """How much was looked at, for how much."""

    files: int = 0
    bytes: int = 0
    values: int = 0
    own: Own = field(default_factory=Own)

    def __str__(self) -> str:
        values = f"none of {self.values} values of the archive in" if self.values else "nothing in"
        passed = [f"{n} that {'are' if n > 1 else 'is'} {reason}" for reason, n in self.own.passed.items()]
        left_out = f"; names of files and folders not searched for: {', '.join(passed)}" if passed else ""
        return f"{values} {self.files} files, {self.bytes / 1e6:.1f} MB after decompression{left_out}"


def audit(
    folder: Path, source: Path | None = None, allow: Iterable[str] = (), searched: Searched | None = None
) -> Iterator[Finding]:
    """Everything below a folder that may tell whose images it holds.

    Args:
        folder: a data set, a run, or a folder of such.
        source: the archive that it was made of; its header values are searched for.
        allow: texts that are no finding.
        searched: counts what was done.

    Raises:
        UserError: a folder is missing.
    """
    for path in (folder, source):
        if path is not None and not path.is_dir():
            raise UserError(f"the folder {path} is not there; name the folder to audit, and with --source its archive")
    unread: list[Path] = []
    searched = searched or Searched()
    searched.own = Own.of(folder)
    found = archive_values(source.absolute(), folder.absolute(), unread) if source else ()
    values = Values(searched.own.secret(found), allow)
    for path in unread:
        yield Finding(file=str(path), place="", what="cannot be read, so its values were not searched for")
    yield from _Audit(folder, values, searched).run()


class _Audit:
    """The way through the files of a folder, each by its format."""

    def __init__(self, folder: Path, values: Values, searched: Searched):
        self.folder, self.values, self.searched = folder, values, searched
        searched.values = values.count

    def run(self) -> Iterator[Finding]:
        paths = sorted(self.folder.rglob("*"))
        if not any(path.is_file() for path in paths):
            raise UserError(f"{self.folder} holds no file; name a data set or a run")
        for number, path in enumerate(paths, 1):
            parts = path.relative_to(self.folder).parts
            shown = "/".join("…" if any(self._name(part)) else part for part in parts)
            shown += f" (entry {number})" if "…" in shown else ""
            yield from (Finding(file=shown, place="its name", what=what) for what in set(self._name(path.name)))
            if path.is_symlink():
                yield Finding(file=shown, place="", what="is a link; what it leads to was not searched")
            elif path.is_file():
                self.searched.files += 1
                yield from (Finding(file=shown, place=place, what=what) for place, what in self._file(path))

    def _name(self, name: str) -> Iterator[str]:
        yield from (what for _, what in self._text(f'"{name}"'.encode()))

    def _file(self, path: Path) -> Iterator[tuple[str, str]]:
        if path.suffix == ".tar":
            with path.open("rb") as file:
                yield from self._tar(file, path.stat().st_size)
        elif path.suffix == ".safetensors":
            yield from self._safetensors(path)
        elif path.stat().st_size > LARGEST:
            yield "", "is too large to be searched"
        else:
            yield from self._small_file(path)

    def _small_file(self, path: Path) -> Iterator[tuple[str, str]]:
        content = path.read_bytes()
        if path.suffix == ".png":
            yield from self._png(content, drawn=True)
        elif path.suffix == ".npy":
            yield from self._npy(content)
        elif path.name == "index.csv":
            yield from self._index(content)
        elif path.suffix == ".html":
            yield from self._html(content)
        elif path.suffix in TEXT:
            yield from self._text(content)
        else:
            yield "", "is of no kind that miram writes and was not searched"

    # ------------------------------------------------------------------------------------------ shards

    def _tar(self, file: BinaryIO, size: int) -> Iterator[tuple[str, str]]:
        number = 0
        while len(header := file.read(BLOCK)) == BLOCK and any(header):
            number += 1
            try:
                member = TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except HeaderError:
                yield f"member {number}", "is no tar header, so that nothing from here on was searched"
                return
            if not 0 <= member.size <= min(size - file.tell(), LARGEST):
                yield f"member {number}", "is cut short or too large, so that nothing from here on was searched"
                return
            content, padding = file.read(member.size), file.read(-member.size % BLOCK)
            for what in (*tar_header(member, header), *self._name(member.name), *hidden(padding, "the padding")):
                yield f"header of member {number}", what
            kind = member.name.partition(".")[2]
            yield from ((f"member {number} ({place})", what) for place, what in self._member(kind, content))
        while rest := header:
            yield from (("end", what) for what in hidden(rest, "the end"))
            header = file.read(STEP)

    def _member(self, kind: str, content: bytes) -> Iterator[tuple[str, str]]:
        if kind in ("png", "mask.png"):
            found = self._png(content)
        elif kind == "npy":
            found = self._npy(content)
        elif kind == "json":
            found = self._sample(content)
        else:
            kind, found = "of another kind", self._text(content)
        yield from ((f"{kind}{', ' if place else ''}{place}", what) for place, what in found)

    def _png(self, content: bytes, *, drawn: bool = False) -> Iterator[tuple[str, str]]:
        """A sample's image, or a figure that matplotlib has drawn."""
        try:
            yield from chunks(content, drawn=drawn)
            if self.values.count:
                pixels = decode_png(content, "")
                yield from self._binary(pixels.tobytes(), "pixels")
                if pixels.itemsize > 1:
                    yield from self._binary(pixels.byteswap().tobytes(), "pixels")
        except (ValueError, UserError, zlib.error):
            yield "", "is no sound PNG and was not searched"
        yield from self._binary(content, "file")

    def _npy(self, content: bytes) -> Iterator[tuple[str, str]]:
        try:
            PackedPixels(lambda offset, size: content[offset : offset + size], len(content))
        except ValueError:
            yield "header", "is not the plain one of 8- or 16-bit pixels"
        yield from self._binary(content, "pixels")

    def _sample(self, content: bytes) -> Iterator[tuple[str, str]]:
        try:
            yield from (("", what) for what in foreign_fields(json.loads(content)))
        except (ValueError, RecursionError):
            yield "", "is no JSON"
        yield from self._text(content)

    def _index(self, content: bytes) -> Iterator[tuple[str, str]]:
        try:
            rows = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
            header = next(rows, [])
            yield from ((f"column {i}", what) for i, what in foreign_columns(header))
            texts = []
            for number, row in enumerate(rows, 2):
                cells = list(zip_longest(header, row, fillvalue=""))
                texts.append(" ".join(f'"{one_line(cell)}"' for name, cell in cells if name not in NUMBERS))
                if not all(NUMBER.fullmatch(cell) for name, cell in cells if name in NUMBERS):
                    yield f"line {number}", "has text where numbers belong"
            yield from self._text("\n".join([" ".join(header), *texts]).encode())
        except (csv.Error, UnicodeDecodeError):
            yield "", "is no CSV"
            yield from self._text(content)

    # ------------------------------------------------------------------------------------------ other files

    def _html(self, content: bytes) -> Iterator[tuple[str, str]]:
        for number, found in enumerate(EMBEDDED.finditer(content), 1):
            try:
                image = base64.b64decode(found[1])
            except binascii.Error:
                image = b""
            yield from ((f"picture {number}", what) for _, what in self._png(image, drawn=True))
        yield from self._text(ATTRIBUTE.sub(b"", EMBEDDED.sub(b"", content)))

    def _safetensors(self, path: Path) -> Iterator[tuple[str, str]]:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size or length > LARGEST:
                yield "header", "is damaged; the file was not searched"
                return
            header = re.sub(rb'"data_offsets":\[[^\]"]*\]', b"", file.read(length))
            yield from (("header", what) for _, what in self._text(header))
            tail = b""
            while self.values.count and (step := file.read(STEP)):
                yield from self._binary(tail + step, "weights")
                tail = step[-1024:]

    # ------------------------------------------------------------------------------------------ contents

    def _text(self, content: bytes) -> Iterator[tuple[str, str]]:
        """Line and kind of everything in a text that tells, once a line."""
        self.searched.bytes += len(content)
        plain = COUNTS.sub(b"", content)
        found = list(_lines(content, ((place, f"the value of {o}") for place, o in self.values.in_text(content))))
        for what, pattern in PATTERNS.items():
            places = (m.start() for m in pattern.finditer(plain) if not self._allowed(m[0]))
            found += _lines(plain, ((place, what) for place in places))
        yield from ((f"line {line}", what) for line, what in sorted(set(found)))
        if b"\0" in content:
            yield "", "is no text"

    def _allowed(self, text: bytes) -> bool:
        return text.decode("utf-8", "replace").casefold() in self.values.allowed

    def _binary(self, content: bytes, where: str) -> Iterator[tuple[str, str]]:
        self.searched.bytes += len(content)
        found = {origin for _, origin in self.values.in_binary(content)}
        yield from ((where, f"the value of {origin}") for origin in sorted(found))


def _lines(content: bytes, places: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The line that each place is in, counted from 1."""
    found = list(places)
    ends = [match.start() for match in re.finditer(b"\n", content)] if found else []
    yield from ((bisect_left(ends, place) + 1, what) for place, what in found)
