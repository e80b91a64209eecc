"""What a data set says openly, and an archive may say as well without telling anything of a patient.

CBIS-DDSM lies in folders called CBIS-DDSM, class folders are called as the label that comes of them, and headers hold
defined terms of the standard. Looked for like anything else, these would be found in every data set.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..dicom.reader import MANUFACTURERS, VIEWS
from ..layout import LABEL
from ..sources import SOURCES

Value = tuple[str, str]  # the text, and what it is
FOLDER, FILE = "a folder's name", "a file's name"  # what a value may be, beside header tags and tables
CLASSES = 20  # a column with more different values than that is none of classes
PUBLIC = frozenset(SOURCES)  # collections write their own name into trial tags
WORDS = re.compile(
    "all|annotations?|archive|asymmetry|benign|birads|breast|calc|calcifications?|circles|csv|data(set)?|density|dicoms?"
    "|diagnosis|exams?|facts|false|female|film|full|geometry|group|images?|jpegs?|labels?|laterality|left|malignant"
    "|mammo(gra(m|ms|phy))?|masks?|mass|none|normal|nothing|patients?|phantoms?|pixels|right|roi|samples?|screening"
    r"|(info|licen[cs]e|metadata|readme)(\.\w+)?|cc[ -]by([ -](nc|sa|nd))*( \d\.\d)?"
    "|series|shards?|split|study|tables?|test(ing)?|train(ing)?|true|unknown|valid(ation)?|view|"
    + "|".join(set(MANUFACTURERS.values()))
)
# Defined terms of code words (PS3.3, VR CS) that may stand in a manifest, a configuration or a report by chance.
_TERMS = """
    ABSENT ACTIVE ADDITION ALL APPROVED AUTO AUTOMATIC AVERAGE AXIAL BILATERAL BOTH BREAST CALIBRATION CENTER COARSE
    COLLIMATOR COLOR COMBINED COMPLETE COMPUTED CONTRAST CROSSED DAMAGED DERIVED DETECTOR DIAGNOSTIC DIGITIZED DIRECT
    DISPLAY DYNAMIC ELLIPSE EMPTY ENABLED ENERGY EXPOSURE FEMALE FILM FILTERED FINAL FINE FIXED FLAT FLATTENED FOCUSED
    FRAME FULL GAMMA GAMUT GENERATED_2D GRAPHIC GRAY GRAYSCALE GRID HIGH HIGH_ENERGY IDENTITY IMAGE INDIRECT INTERVAL
    INVALID INVERSE LABEL LEFT LINEAR LINEAR_EXACT LOCAL LOCALIZER LOG LOSSLESS LOSSY LOW LOW_ENERGY MAGNIFICATION MALE
    MANUAL MASK MATRIX MAXIMUM MEAN MEDIAN MEDIUM MINIMUM MIXED MODIFIED MOLYBDENUM MONOCHROME1 MONOCHROME2 NONE NORMAL
    OPEN ORIGINAL OTHER PARALLEL PARTIAL PATIENT PHANTOM PIXEL PLANE POINT POLYLINE POSITIVE PREVIEW PRIMARY PROCESSED
    PROJECTION PROSPECTIVE QUALITY RECTANGLE RECTANGULAR REFORMATTED REGION RELATIVE RESEARCH RESULT RHODIUM RIGHT ROUND
    SAMPLE SCINTILLATOR SCREENING SECONDARY SERIES SHAPE SIGMOID SILVER SINGLE SOFT SQUARE STANDARD STATIC STATIONARY
    STEREOTACTIC STUDY SUBTRACTION TEXT TIME TISSUE TOMO TOMOSYNTHESIS TRUE TUNGSTEN UNDEFINED UNIFORM UNKNOWN
    UNMODIFIED UNSPECIFIED VALID VALUE VERIFIED VOLUME WEIGHTED WINDOW
"""
TERMS = {*_TERMS.split(), *VIEWS, "FOR PRESENTATION", "FOR PROCESSING"}


def is_open(text: str) -> bool:
    """Whether a text, in small letters, is a word that data sets and runs use of themselves."""
    return text in PUBLIC or WORDS.fullmatch(text) is not None


@dataclass
class Own:
    """What the audited data sets are called, and their labels; `passed` counts what was let through for these."""

    names: frozenset[str] = frozenset()  # of data sets and licences
    labels: Mapping[str, str] = field(default_factory=dict)  # value -> column, of columns with few values
    passed: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, folder: Path) -> Own:
        """What the manifests and indexes below a folder say, as far as they can be read; the audit reports others."""
        names = {str(text).casefold() for path in folder.rglob("manifest.json") for text in _names(path)}
        labels = {value: column for path in folder.rglob("index.csv") for value, column in _labels(path)}
        return cls(frozenset(names), labels)

    def secret(self, values: Iterable[Value]) -> Iterator[Value]:
        """The values but for names of files and folders that say no more than the data set does.

        Header values are never let through here, whatever the data set is called.
        """
        let: set[str] = set()
        for text, origin in values:
            reason = self._reason(text.casefold(), origin)
            if not reason:
                yield text, origin
            elif text not in let:
                let.add(text)
                self.passed[reason] += 1

    def _reason(self, text: str, origin: str) -> str:
        if origin in (FOLDER, FILE) and text in self.names:
            return "the data set's own name"
        return f"a value of {self.labels[text]}" if origin == FOLDER and text in self.labels else ""


def _names(path: Path) -> list[str]:
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return []
    return [manifest.get(key, "") for key in ("dataset", "licence")] if isinstance(manifest, dict) else []


def _labels(path: Path) -> Iterator[tuple[str, str]]:
    """The values of the columns of classes, in small letters, with the column."""
    found: dict[str, set[str]] = defaultdict(set)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for column, cell in row.items():
                    if isinstance(cell, str) and len(found[column]) <= CLASSES:
                        found[column].add(cell.casefold())
    except (csv.Error, OSError, UnicodeDecodeError):
        return
    for column, values in found.items():
        if isinstance(column, str) and (column.startswith(LABEL) or column in ("split", "view")):
            yield from ((value, column) for value in values if len(values) <= CLASSES and value)
