"""The four tables of CBIS-DDSM: what each abnormality is, and where its film and its mask lie.

    mass_case_description_train_set.csv, mass_…_test_set.csv, calc_…_train_set.csv, calc_…_test_set.csv

    patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,mass shape,mass margins,
        assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path
    P_00001,3,LEFT,CC,1,mass,IRREGULAR-ARCHITECTURAL_DISTORTION,SPICULATED,4,MALIGNANT,4,
        Mass-Training_P_00001_LEFT_CC/<study>/<series>/000000.dcm,…_CC_1/<study>/<series>/000000.dcm,"…/000001.dcm
    "

A row is an abnormality. The calc tables write `breast density`, and have `calc type` and `calc distribution` instead of
the mass columns. Paths may end in a line break, and say which file is the mask wrongly: only the folder's name (which
tells kind, split, patient, side and view) and the series are used. Missing is `N/A`, in density and subtlety also 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ...engine.errors import UserError
from ..reading import walk_files
from ..record import Label
from .tables import Row, each_row, given, known, numbered_density, whole

TABLE = re.compile(r"(mass|calc)_case_description_(train|test)_set.*\.csv", re.IGNORECASE)
FOLDER = re.compile(r"(Mass|Calc)-(Training|Test)_(P_\d{5})_(LEFT|RIGHT)_(CC|MLO)")
FILM, CROP, MASK = "image file path", "cropped image file path", "ROI mask file path"
COLUMNS = ("patient_id", "abnormality id", "assessment", "pathology", "subtlety", FILM, CROP, MASK)
DENSITY = ("breast_density", "breast density")
TERMS = {
    "mass_shape": "mass shape",
    "mass_margins": "mass margins",
    "calc_type": "calc type",
    "calc_distribution": "calc distribution",
}
SEVERITY = ("BENIGN_WITHOUT_CALLBACK", "BENIGN", "MALIGNANT")  # from harmless to severe
PARTS = tuple((kind, split) for kind in ("mass", "calc") for split in ("train", "test"))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: an abnormality on a film."""

    kind: str  # "mass" or "calc"
    split: str  # "train" or "test"
    patient: str
    side: str  # "LEFT" or "RIGHT"
    view: str
    number: int  # on its film, from 1, for masses and calcifications apart
    pathology: str
    assessment: int | None
    subtlety: int | None
    density: str
    film: str  # name of the film's folder
    film_series: str
    mask_series: tuple[str, ...]  # of mask and crop, which are often one
    terms: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def mask(self) -> str:
        """Name of the folder of its mask and its crop."""
        return f"{self.film}_{self.number}"

    @property
    def film_key(self) -> str:
        """What the same film is called in the mass and in the calc tables."""
        return f"{self.patient}_{self.side}_{self.view}"


def read_tables(folder: Path) -> list[Finding]:
    """The abnormalities of all tables below the folder, by film; masses first, then calcifications.

    Raises:
        UserError: there is no table, or one is not as published.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name with --labels the folder that holds the CBIS-DDSM tables")
    paths = [path for path in walk_files(folder) if TABLE.fullmatch(path.name)]
    if not paths:
        raise UserError(
            f"{folder} holds no table such as mass_case_description_train_set.csv; download the four tables of "
            "CBIS-DDSM beside the images, or name their folder with --labels"
        )
    found: dict[str, Finding] = {}  # a table that lies there twice counts once
    for path in paths:
        for row in each_row(path, COLUMNS, optional=(*DENSITY, *TERMS.values())):
            one = finding(row, path)
            found.setdefault(one.mask, one)
    if not found:
        raise UserError(f"the tables in {folder} have no rows; get undamaged copies")
    return sorted(found.values(), key=lambda f: (f.film_key, f.kind != "mass", f.number))


def finding(row: Row, path: Path) -> Finding:
    """The abnormality in a row.

    Raises:
        UserError: it has no folder, number or pathology as published.
    """
    folder, film_series = _place(row[FILM])
    match, number = FOLDER.fullmatch(folder), whole(row["abnormality id"])
    if match is None or match[3] != row["patient_id"] or number is None or row["pathology"] not in SEVERITY:
        raise UserError(
            f"the table {path} has a row that is not as published (patient {row['patient_id'][:40]!r}, abnormality "
            f"{row['abnormality id'][:40]!r}, pathology {row['pathology'][:40]!r}); get an undamaged copy"
        )
    return Finding(
        kind=match[1].lower(),
        split="train" if match[2] == "Training" else "test",
        patient=match[3],
        side=match[4],
        view=match[5],
        number=number,
        pathology=row["pathology"],
        assessment=whole(row["assessment"]),
        subtlety=whole(row["subtlety"]) or None,
        density=numbered_density(row[DENSITY[0]] or row[DENSITY[1]]),
        film=folder,
        film_series=film_series,
        mask_series=tuple(sorted({_place(row[MASK])[1], _place(row[CROP])[1]})),
        terms={task: frozenset(known(row[column]).split("-")) - {""} for task, column in TERMS.items()},
    )


def _place(path: str) -> tuple[str, str]:
    """First folder and series of `folder/study/series/file`; nothing where the path is shorter."""
    parts = PurePosixPath(path).parts
    return (parts[0] if parts else "", parts[2] if len(parts) > 3 else "")


def labels(findings: Sequence[Finding]) -> dict[str, Label]:
    """The labels of one abnormality, or of a film with several.

    The severest decides pathology, binary and four_class (of equals the one with the higher assessment, then a mass).
    Assessment and subtlety are the highest, terms the union of all, sorted and joined by `|`.
    """
    worst = max(findings, key=lambda f: (SEVERITY.index(f.pathology), f.assessment or 0))
    binary = "malignant" if worst.pathology == "MALIGNANT" else "benign"
    kinds = {f.kind for f in findings}
    terms = {task: "|".join(sorted(frozenset().union(*(f.terms.get(task, ()) for f in findings)))) for task in TERMS}
    known_labels = given(
        pathology=worst.pathology,
        binary=binary,
        four_class=f"{binary}_{worst.kind}".upper(),
        abnormality=worst.kind if len(kinds) == 1 else "both",
        density=max(f.density for f in findings),
        assessment=_highest(f.assessment for f in findings),
        subtlety=_highest(f.subtlety for f in findings),
        **terms,
    )
    return dict(known_labels)


def _highest(numbers: Iterable[int | None]) -> int | None:
    return max((n for n in numbers if n is not None), default=None)
