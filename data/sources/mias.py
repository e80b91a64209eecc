"""mini-MIAS (Suckling et al. 1994): 322 films, 1024 x 1024 at 0.2 mm a pixel, 8 bits.

    SRC/mdb001.pgm …
    SRC/Info.txt or README      lines `mdb005 F CIRC B 477 133 30`: film, tissue, finding, severity, x, y, radius

y counts from the bottom; films 2k-1 and 2k are one patient; a film with several findings has several lines; a finding
without coordinates is spread over the breast. All are MLO.

Odd films are left breasts, even ones right. The archive's README says the opposite; the markers on the films say this,
on each of the 22 where we could read one: L on 13 odd films, R on 9 even ones. They are mirrored, so the films were
scanned from behind, which makes a left breast look like a right one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..image import UnreadableImage, read_film, stamp
from ..reading import walk_files
from ..record import Circle, Film, Record

SIDE = 1024
SPACING_MM = 0.2
FILM = re.compile(r"mdb\d{3}\.pgm", re.IGNORECASE)
LINE = re.compile(r"^(mdb(\d{3}))\s+([FGD])\s+([A-Z]{4})(?:\s+([BM]))?(?:\s+(\d+)\s+(\d+)\s+(\d+))?")
NOTE = "odd films are left breasts here, as the markers on the films say, and against the archive's README"
LICENCE = "MIAS licence agreement: research only, not to be passed on"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    tissue: str
    kind: str
    severity: str
    circle: Circle | None


def read(src: Path, options: SourceOptions) -> Archive:
    """The films that are there, with the table's labels.

    Raises:
        UserError: no film or no table in the folder, or an option was given (the archive's table is the labels).
    """
    options.only("mias")
    films = {p.stem.lower(): p for p in walk_files(src) if FILM.fullmatch(p.name)}
    if not films:
        raise UserError(f"{src} holds no mdbNNN.pgm; name the folder of the mini-MIAS films")
    table = read_table(src)
    records = [record(path, table[name]) for name, path in films.items() if name in table]
    unknown = [path.name for name, path in films.items() if name not in table]
    notes = (NOTE, *((f"not in the table and left out: {', '.join(unknown)}",) if unknown else ()))
    absent = tuple(f"{name}.pgm" for name in table if name not in films)
    return Archive(dataset="mias", licence=LICENCE, records=records, notes=notes, absent=absent)


def read_table(src: Path) -> dict[str, list[Finding]]:
    """Findings by film, from the first file in the folder that holds lines of the table.

    Raises:
        UserError: no file does.
    """
    for path in (p for p in walk_files(src) if p.suffix.lower() in ("", ".txt")):
        table = defaultdict(list)
        for line in path.read_text(errors="replace").splitlines():
            if match := LINE.match(line.strip()):
                table[match[1]].append(finding(match))
        if table:
            return dict(table)
    raise UserError(
        f"{src} holds no table of findings (Info.txt or README with lines like `mdb001 G CIRC B 535 425 197`)"
    )


def finding(match: re.Match[str]) -> Finding:
    """One matched line; x, y become pixels from the top left."""
    circle = None
    if match[6]:
        x, y, radius = float(match[6]), float(match[7]), float(match[8])
        circle = Circle(x=x, y=SIDE - 1 - y, radius=radius, label=match[4])
    return Finding(tissue=match[3], kind=match[4], severity=match[5] or "N", circle=circle)


def record(path: Path, findings: list[Finding]) -> Record:
    """A film's record: the severest finding decides `severity`, findings of several kinds are joined by `+`."""
    number = int(path.stem[3:])
    circles = tuple(f.circle for f in findings if f.circle is not None)
    return Record(
        read=partial(read_with_circles, path, circles),
        name=path.name,
        stamp=f"{stamp(path)} {circles}",  # a corrected table makes another set
        image_id=path.stem.lower(),
        patient_id=f"pair{(number + 1) // 2:03d}",
        laterality="L" if number % 2 else "R",
        view="MLO",
        labels={
            "tissue": findings[0].tissue,
            "finding": "+".join(sorted({f.kind for f in findings})),
            "severity": max((f.severity for f in findings), key="NBM".index),
            "abnormal": int(findings[0].kind != "NORM"),
        },
    )


def read_with_circles(path: Path, circles: tuple[Circle, ...]) -> Film:
    """The film and its findings.

    Raises:
        UnreadableImage: the file cannot be decoded or has another size than the table's coordinates assume.
    """
    film = read_film(path)
    if film.pixels.shape != (SIDE, SIDE):
        raise UnreadableImage(
            f"it has {film.pixels.shape[1]} x {film.pixels.shape[0]} pixels, mini-MIAS has {SIDE} x {SIDE}"
        )
    return Film(pixels=film.pixels, max_value=film.max_value, spacing_mm=SPACING_MM, circles=circles)
