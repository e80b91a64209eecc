"""CMMD: the real table gives the published counts; in a small archive only the breast that it tells of is labelled."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from numpy.typing import NDArray

from miram.data.archive import SourceOptions
from miram.data.image import UnreadableImage
from miram.data.phantom import PhantomSettings, render
from miram.data.record import Record
from miram.data.sources.cmmd import find_table, read, read_table
from miram.data.sources.tables import decade
from miram.engine.errors import UserError

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere")) / "metadata_csv"
real = pytest.mark.skipif(not REAL.is_dir(), reason="MIRAM_REAL_DATA names no folder with metadata_csv")
TABLE = "CMMD_clinicaldata_revision.csv"
HEADER = "ID1,LeftRight,Age,number,abnormality,classification,subtype\n"
ROWS = """D1-0001,R,44,2,calcification,Benign,
D2-0002,L,93,2,mass,Malignant,Luminal B
D2-0002,R,93,2,both,Benign,
D1-0003,L,38,2,mass,Benign,
"""


def write_image(src: Path, patient: str, number: int, side: str | None, view: str, **tags: object) -> Path:
    """One 8-bit image in the archive's layout; the number is the image's in the archive."""
    folder = src / "CMMD" / patient / "07-18-2010-NA-NA-79377" / "1.000000-NA-70244"
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"PatientID": patient, "SOPInstanceUID": f"1.2.3.{number}", "StudyInstanceUID": f"1.2.4.{int(patient[-4:])}"}
    sent = {"ImageLaterality": side, "ViewPosition": view, "ImagerPixelSpacing": [0.094, 0.094]} | ids | tags
    return write_dicom(folder / f"1-{number}.dcm", pixels(side, view), **sent)


def pixels(side: str | None, view: str) -> NDArray[np.uint8]:
    return (render(PhantomSettings(size=96), 1, side or "L", view).pixels // 16).astype(np.uint8)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """D1-0001 with two breasts of which one is in the table, D2-0002 with two in it, D1-0003 missing."""
    src = tmp_path_factory.mktemp("cmmd")
    (src / TABLE).write_text(HEADER + ROWS, encoding="utf-8-sig")
    number = 0
    for patient in ("D1-0001", "D2-0002"):
        for side in "LR":
            for view in ("CC", "MLO"):
                number += 1
                write_image(src, patient, number, side, view)
    return src


def by_breast(records: list[Record]) -> dict[tuple[str, str, str], Record]:
    return {(record.patient_id, record.laterality, record.view): record for record in records}


def test_only_the_breast_of_the_table_is_labelled(archive: Path) -> None:
    found = by_breast(list(read(archive, SourceOptions()).records))
    assert len(found) == 8
    for view in ("CC", "MLO"):
        told = found["D1-0001", "R", view].labels
        assert told == {"pathology": "Benign", "abnormality": "calcification", "age": "40-49"}
        assert found["D1-0001", "L", view].labels == {"age": "40-49"}  # unknown, not benign
        told = found["D2-0002", "L", view].labels
        assert told == {"pathology": "Malignant", "abnormality": "mass", "subtype": "Luminal B", "age": "80+"}
        assert found["D2-0002", "R", view].labels["pathology"] == "Benign"


def test_records_have_pixels_ids_and_no_split(archive: Path) -> None:
    archived = read(archive, SourceOptions())
    one = by_breast(list(archived.records))["D1-0001", "R", "MLO"]
    film = pickle.loads(pickle.dumps(one.read))()
    np.testing.assert_array_equal(film.pixels, pixels("R", "MLO"))
    assert (film.max_value, film.spacing_mm, one.split) == (255, 0.094, "")
    assert len({record.image_id for record in archived.records}) == 8
    assert len({record.exam_id for record in archived.records}) == 2
    assert (archived.licence, archived.breast) == ("CC BY 4.0", True)
    assert any(note.startswith("1 of the table's 3 patients") for note in archived.notes)
    assert archived.absent == ("D1-0003",)
    assert any(note.startswith("2 of 8 images have no pathology") for note in archived.notes)
    assert not any("D1-" in note for note in archived.notes)


def test_ids_do_not_depend_on_the_folder_that_is_named(archive: Path) -> None:
    whole = read(archive, SourceOptions())
    inside = read(archive / "CMMD" / "D1-0001", SourceOptions(labels=archive))
    assert {r.image_id for r in inside.records} == {r.image_id for r in whole.records if r.patient_id == "D1-0001"}
    assert {r.patient_id for r in inside.records} == {"D1-0001"}


def test_damaged_sideless_copied_and_unknown_files_are_counted(archive: Path, tmp_path: Path) -> None:
    write_image(tmp_path, "D1-0001", 1, None, "CC")
    write_image(tmp_path, "D1-0001", 2, "R", "CC")
    write_image(tmp_path, "D1-0009", 3, "R", "CC")
    write_image(tmp_path, "D1-0001", 2, "R", "CC", SOPInstanceUID="1.2.3.2").rename(
        tmp_path / "CMMD" / "D1-0001" / "copy.dcm"
    )
    write_image(tmp_path, "D1-0001", 2, "R", "CC")
    damaged = tmp_path / "CMMD" / "D1-0001" / "damaged.dcm"
    damaged.write_bytes(bytes(128) + b"DICM" + b"\xff" * 300)
    (tmp_path / "CMMD" / "LICENSE").write_text("not an image")
    archived = read(tmp_path, SourceOptions(labels=archive / TABLE))
    assert len(archived.records) == 4
    for start in ("1 files are copies", "1 files have no header", "1 headers name no side", "1 images are of patients"):
        assert any(note.startswith(start) for note in archived.notes), (start, archived.notes)
    (bad,) = (record for record in archived.records if record.name.endswith("damaged.dcm"))
    with pytest.raises(UnreadableImage):
        bad.read()
    (sideless,) = (r for r in archived.records if not r.laterality and r is not bad)
    assert "pathology" not in sideless.labels


def test_rows_that_contradict_each_other_lose_what_they_disagree_on(tmp_path: Path) -> None:
    table = tmp_path / TABLE
    table.write_text(
        HEADER + "D1-0001,L,40,2,mass,Benign,\nD1-0001,L,40,2,mass,Malignant,\nD1-0001,R,40,2,mass,Benign,\n"
    )
    got = read_table(table)
    assert got.conflicts == 1
    assert got.breasts == {
        ("D1-0001", "L"): {"abnormality": "mass"},
        ("D1-0001", "R"): {"abnormality": "mass", "pathology": "Benign"},
    }


@pytest.mark.parametrize(
    ("cell", "decades"), [("44", "40-49"), ("40", "40-49"), ("79", "70-79"), ("80", "80+"), ("101", "80+"), ("", "")]
)
def test_ages_become_decades_and_the_oldest_are_one(cell: str, decades: str) -> None:
    assert decade(cell) == decades


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "CMMD_clinicaldata_revision.xlsx").touch()
    with pytest.raises(UserError, match=r"holds no CMMD_clinicaldata_revision\.csv.*save the \.xlsx"):
        read(tmp_path, SourceOptions())
    (tmp_path / TABLE).write_text(HEADER + ROWS)
    with pytest.raises(UserError, match="CMMD/D1-0001"):
        read(tmp_path, SourceOptions())
    for text, complaint in ((HEADER, "no rows"), ("ID1,Age\n", "lacks"), (HEADER + "D1-0001,B,4,2,,,\n", "side 'B'")):
        (tmp_path / TABLE).write_text(text)
        with pytest.raises(UserError, match=complaint):
            read(tmp_path, SourceOptions())
    with pytest.raises(UserError, match="--level"):
        read(tmp_path, SourceOptions(level="roi"))


@real
def test_the_real_table_counts_as_published() -> None:
    table = read_table(find_table(REAL, None))
    assert (len(table.breasts), len(table.ages), table.conflicts) == (1872, 1775, 0)
    told = table.breasts.values()
    assert Counter(t["pathology"] for t in told) == {"Malignant": 1316, "Benign": 556}
    assert Counter(t["abnormality"] for t in told) == {"mass": 1149, "both": 461, "calcification": 262}
    assert sum("subtype" in t for t in told) == 749
    assert Counter(Counter(patient for patient, _ in table.breasts).values()) == {1: 1678, 2: 97}
    assert all("age" in t for t in table.ages.values())
