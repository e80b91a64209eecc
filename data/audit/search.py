"""What an archive tells of its patients, and a search for all of it at once.

Taken from an archive: every header value of its DICOM files (nested, private, file meta and preamble too), the names of
its files and folders, and the cells of those columns of its tables whose names identify (identifying.py).

Not looked for, as nothing could be told from finding them, and so not found where they do tell something:
- values of fewer than 4 characters or of one repeated; numbers of fewer than 8, in tags that measure (DS, IS, US …);
- words of closed lists (own.py): names of public collections and makers, words that data sets use of themselves (a Mrs
  Mass or Mr Train is one), and, in tags for code words (CS), defined terms of the standard; UIDs of the standard;
- numbers in the tags of SPACING, which a data set stores;
- names of folders or files that are the data set's own, or a label's value: these are counted and said.
Looked for in text alone: values of fewer than 8 characters, as whole words, numbers of these only in quotes or between
slashes; in pixels and weights only values from 10 characters (numbers: 14) on.
"""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom._uid_dict import UID_dictionary
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ..dicom.pixels import LARGE, guarded, read_dataset_of
from ..dicom.reader import is_dicom
from ..identifying import identifies
from ..image import UnreadableImage
from .own import FILE, FOLDER, TERMS, Value, is_open

SPACING = {  # a sample's spacing_mm comes of them
    *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "EstimatedRadiographicMagnificationFactor")
}
NUMERIC = {"DS", "IS", "FL", "FD", "US", "SS", "UL", "SL", "UV", "SV", "AT"}
RAW = {"OB", "OW", "OD", "OF", "OL", "OV", "UN"}
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?")
PRINTABLE = re.compile(rb"[\x20-\x7e]{8,}")
SHORT = 8  # shorter values are looked for as whole words, and only in text
# In 0.5 GB of decoded films 20,000 made-up dates of 8 digits were found 246 times by chance, ids with letters once.
PIXELS, PIXELS_NUMBER = 10, 14  # shortest text, and number, that is looked for in pixels


# ---------------------------------------------------------------------------------------------- values of an archive


def archive_values(source: Path, apart: Path, unread: list[Path]) -> Iterator[Value]:
    """Every value below a folder but for what lies in `apart`. Files of which part cannot be read go to `unread`."""
    for path in sorted(source.rglob("*")):
        if apart in (path, *path.parents):
            continue
        yield from ((name, FOLDER if path.is_dir() else FILE) for name in {path.name, path.stem})
        try:
            yield from _content(path)
        except (UnreadableImage, OSError, UnicodeDecodeError, csv.Error):
            unread.append(path)


def _content(path: Path) -> Iterator[Value]:
    if path.is_dir():
        return
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from table_values(path)
    elif is_dicom(path):
        yield from dicom_values(path)
    elif path.suffix.lower() in (".dcm", ".dicom"):
        raise UnreadableImage("it is no DICOM file")


def table_values(path: Path) -> Iterator[Value]:
    """The cells of a table's identifying columns, whole and, of paths, part by part."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=first.count))
        telling = {i: name for i, name in enumerate(next(reader, [])) if identifies(name)}
        for row in reader:
            for i, name in telling.items():
                cell = row[i].strip() if i < len(row) else ""
                *folders, last = re.split(r"[/\\]", cell)
                yield from ((part, FOLDER) for part in folders)
                yield from ((text, f"column {name!r} of a table") for text in {cell, last})


def dicom_values(path: Path) -> Iterator[Value]:
    """Every value of a DICOM file's header, with the keyword and number of its tag.

    Raises:
        UnreadableImage: part of it cannot be read; what can was yielded before.
    """
    found: list[Value] = []
    try:
        with guarded("header"):
            with path.open("rb") as file:
                found += ((text, "preamble") for text in _printable(read_preamble(file, force=True) or b""))
                meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)
            deflated = meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
            # Large values are passed over, pixels among them; what lies behind the pixels is read.
            header = read_dataset_of(path, pixels=False) if deflated else dcmread(path, defer_size=LARGE, force=True)
            for part in (meta, header):
                found.extend(_elements(part, ["iso8859"]))
    finally:
        yield from found


def _elements(dataset: Dataset, encodings: Sequence[str]) -> Iterator[Value]:
    encodings = _encodings(dataset) or encodings
    for tag in sorted(dataset.keys()):
        if keyword_for_tag(tag) == "PixelData" or not tag.element:
            continue
        raw: Any = dataset.get_item(tag)
        if _vr(raw) == "SQ":
            for item in dataset[tag].value or ():
                yield from _elements(item, encodings)
            continue
        if isinstance(raw, RawDataElement):
            texts = element_values(_vr(raw), raw.value or b"", encodings)
        else:  # pydicom has looked at it while reading, or there is none
            measure = raw is None or raw.VR in NUMERIC - {"DS", "IS"}
            texts = iter(()) if measure else text_values(raw.VR, str(raw.value))
        stored = keyword_for_tag(tag) in SPACING
        yield from ((text, _called(tag)) for text in texts if not (stored and NUMBER.fullmatch(text)))


def _encodings(dataset: Dataset) -> list[str]:
    try:
        named = dataset.get("SpecificCharacterSet")
        return convert_encodings(named) if named else []
    except (LookupError, ValueError):
        return []


def _vr(element: Any) -> str:
    if element.VR and element.VR != "UN":
        return str(element.VR)
    try:
        return dictionary_VR(element.tag)
    except KeyError:
        return "UN"


def _called(tag: BaseTag) -> str:
    return f"{'private' if tag.is_private else keyword_for_tag(tag) or 'unknown'} {tag}"


def element_values(vr: str, content: bytes, encodings: Sequence[str]) -> Iterator[str]:
    """The texts in an element's bytes."""
    short = content.rstrip(b"\0 ")
    if len(short) > LARGE or (
        vr in RAW and not (len(short) <= 64 and short.isascii() and short.decode().isprintable())
    ):
        yield from _printable(short)
    elif vr not in NUMERIC - {"DS", "IS"}:
        try:
            text = decode_bytes(short, list(encodings), set(b"\\^=\n\r\f\t"))
        except (LookupError, UnicodeError):
            text = short.decode("latin-1")
        yield from text_values(vr, text)


def text_values(vr: str, text: str) -> Iterator[str]:
    """A text whole, value by value, line by line; a person's name part by part, a date as ISO writes it, too."""
    lines = [part.strip(" \0") for part in re.split(r"[\\\r\n]", text)]
    for value in {text.strip(" \0"), *lines}:
        measured = vr in ("DS", "IS") and len(value) < SHORT and NUMBER.fullmatch(value)
        if not (measured or (vr == "CS" and value.upper() in TERMS)):
            yield value
        if vr == "PN":
            parts = [part for part in re.split(r"[\^= ]", value) if part]
            yield from (*value.split("="), *parts, " ".join(parts), " ".join(parts[1::-1]))
        if vr in ("DA", "DT") and re.fullmatch(r"\d{8}.*", value):
            yield from (value[:8], f"{value[:4]}-{value[4:6]}-{value[6:8]}")


def _printable(content: bytes) -> list[str]:
    return [run.decode("ascii").strip() for run in PRINTABLE.findall(content)]


# ---------------------------------------------------------------------------------------------- the search


class Windows:
    """Finds many byte strings in one pass: their last bytes, read as one number, behind a table of hashes."""

    STEP = 2**18  # places at a time: what is held for them stays in the processor's cache

    def __init__(self, needles: Iterable[bytes], width: int):
        self.width = width
        self.lengths: dict[int, set[int]] = {}
        self.needles = {needle for needle in needles if len(needle) >= width}
        for needle in self.needles:
            self.lengths.setdefault(int.from_bytes(needle[-width:], "little"), set()).add(len(needle))
        self.sorted = np.array(sorted(self.lengths), f"<u{width}")
        self.table = np.zeros(2**22, np.bool_)
        self.table[self._hash(self.sorted)] = True

    def _hash(self, windows: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
        return ((windows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(42)).astype(np.int64)

    def find(self, content: bytes | memoryview) -> Iterator[tuple[int, int]]:
        """(begin, end) of every needle in the content."""
        places = len(content) - self.width + 1
        for start in range(0, places if self.needles else 0, self.STEP):
            count = min(self.STEP, places - start)
            windows = np.ndarray((count,), self.sorted.dtype, buffer=content, offset=start, strides=(1,))
            maybe = np.flatnonzero(self.table[self._hash(windows)])
            nearest = np.searchsorted(self.sorted[:-1], windows[maybe])
            for place in maybe[self.sorted[nearest] == windows[maybe]]:
                end = start + int(place) + self.width
                for length in self.lengths[int(windows[place])]:
                    if length <= end and bytes(content[end - length : end]) in self.needles:
                        yield end - length, end


class Values:
    """What must not be found, and where it came from.

    Args:
        allow: texts that may be found; the case does not matter.
    """

    def __init__(self, values: Iterable[Value] = (), allow: Iterable[str] = ()):
        self.allowed = {text.casefold() for text in allow}
        self.text: dict[bytes, str] = {}
        self.binary: dict[bytes, str] = {}
        self.count = 0
        for value, origin in values:
            self._add(value, origin)
        self._long = Windows((t for t in self.text if len(t) >= SHORT), 8)
        self._short = Windows((t for t in self.text if len(t) < SHORT), 4)
        self._binary = Windows(self.binary, 8)

    def _add(self, value: str, origin: str) -> None:
        if len(value) < 4 or len(set(value)) < 2 or value in UID_dictionary:
            return
        if value.casefold() in self.allowed or is_open(value.casefold()):
            return
        self.count += value.lower().encode("utf-8", "replace") not in self.text
        spelled = (
            form for text in (value, value.lower()) for form in (text, json.dumps(text)[1:-1], html.escape(text))
        )
        for form in spelled:  # as JSON and HTML write it
            self.text.setdefault(form.lower().encode("utf-8", "replace"), origin)
        if len(value) >= (PIXELS_NUMBER if not re.search(r"[^\W\d]", value) else PIXELS):
            forms = (value.encode("utf-8", "replace"), value.encode("latin-1", "replace"), value.encode("utf-16-le"))
            self.binary.update(dict.fromkeys(forms, origin))

    def in_text(self, content: bytes) -> Iterator[tuple[int, str]]:
        """Place and origin of every value in a text, whatever the case."""
        lower = content.decode("utf-8", "surrogateescape").lower().encode("utf-8", "surrogateescape")
        for windows in (self._long, self._short):
            for begin, end in windows.find(lower):
                if _stands_alone(lower, begin, end):
                    yield begin, self.text[lower[begin:end]]

    def in_binary(self, content: bytes | memoryview) -> Iterator[tuple[int, str]]:
        """Place and origin of every value among pixels or weights, as the archive writes it."""
        for begin, end in self._binary.find(content):
            yield begin, self.binary[bytes(content[begin:end])]


def _stands_alone(text: bytes, begin: int, end: int) -> bool:
    """Whether a value was not found by chance inside of another word or number."""
    value, before, after = text[begin:end], text[max(begin - 2, 0) : begin], text[end : end + 2]
    number = NUMBER.fullmatch(value.decode("utf-8", "surrogateescape")) is not None
    if number and (re.search(rb"\d\.\Z", before) or re.match(rb"\.\d", after)):
        return False
    if not number and len(value) >= SHORT:
        return True
    if number and len(value) < SHORT and not _quoted(before[-1:], after[:1]):
        return False  # step 1200 of 2000 is no patient
    return not (re.search(rb"[0-9a-z\x80-\xff]\Z", before) or re.match(rb"[0-9a-z\x80-\xff]", after))


def _quoted(before: bytes, after: bytes) -> bool:
    return before in (b'"', b"'", b"_") or after in (b'"', b"'", b"_") or before == after == b"/"
