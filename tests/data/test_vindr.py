"""VinDr-Mammo: an archive in the original layout becomes the right records."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.image import UnreadableImage
from miram.data.record import Box
from miram.data.sources import vindr
from miram.engine.errors import UserError

BREASTS = """\
study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split
s1,e1,aa01,L,CC,90,70,BI-RADS 4,DENSITY C,training
s1,e1,aa02,L,MLO,90,70,BI-RADS 4,DENSITY C,training
s1,e1,aa03,R,CC,90,70,BI-RADS 1,DENSITY C,training
s2,e2,bb01,R,MLO,90,70,BI-RADS 3,DENSITY A,test
s2,e2,bb02,L,MLO,90,70,BI-RADS 2,DENSITY A,test
"""
FINDINGS = """\
image_id,study_id,series_id,laterality,view_position,height,width,breast_birads,breast_density,\
finding_categories,finding_birads,xmin,ymin,xmax,ymax,split
aa01,s1,e1,L,CC,90,70,BI-RADS 4,DENSITY C,"['Suspicious Calcification', 'Mass']",BI-RADS 4,5.5,10.25,20,30.5,training
aa01,s1,e1,L,CC,90,70,BI-RADS 4,DENSITY C,['Skin Thickening'],BI-RADS 3,-2,0,10,94.2,training
aa02,s1,e1,L,MLO,90,70,BI-RADS 4,DENSITY C,['Mass'],BI-RADS 4,1,2,3,4,training
aa03,s1,e1,R,CC,90,70,BI-RADS 1,DENSITY C,['No Finding'],,,,,,training
bb01,s2,e2,R,MLO,90,70,BI-RADS 3,DENSITY A,['No Finding'],,nan,nan,nan,nan,test
"""


def film(path: Path, height: int = 90, width: int = 70) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width), 1000, np.uint16)).save(path)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four of the tables' five images: original name, other suffixes; aa02 has been made smaller."""
    folder = tmp_path / "vindr"
    film(folder / "images/s1/aa01.png")
    film(folder / "images/s1/aa02.png", 45, 35)
    (folder / "images/s1/aa03.dicom").touch()
    (folder / "images/s2").mkdir()
    (folder / "images/s2/bb01.dcm").touch()
    (folder / "breast-level_annotations.csv").write_text(BREASTS)
    (folder / "finding_annotations.csv").write_text(FINDINGS)
    return folder


def read(src: Path, **options: object) -> Archive:
    return vindr.read(src, SourceOptions(**options))  # type: ignore[arg-type]


def test_records_say_who_and_what_an_image_is(src: Path) -> None:
    archive = read(src)
    assert [(r.image_id, r.patient_id, r.exam_id, r.laterality, r.view, r.split, r.name) for r in archive.records] == [
        ("aa01", "s1", "s1", "L", "CC", "train", "images/s1/aa01.png"),
        ("aa02", "s1", "s1", "L", "MLO", "train", "images/s1/aa02.png"),
        ("aa03", "s1", "s1", "R", "CC", "train", "images/s1/aa03.dicom"),
        ("bb01", "s2", "s2", "R", "MLO", "test", "images/s2/bb01.dcm"),
    ]
    assert (archive.dataset, archive.licence) == ("vindr-mammo", "PhysioNet Restricted Health Data License 1.5.0")
    assert archive.breast
    assert all(record.stamp for record in archive.records)


@pytest.mark.parametrize(
    ("i", "labels"),
    [
        (
            0,
            {"birads": 4, "suspicious": 1, "density": "C", "findings": "Mass|Skin Thickening|Suspicious Calcification"},
        ),
        (1, {"birads": 4, "suspicious": 1, "density": "C", "findings": "Mass"}),
        (2, {"birads": 1, "suspicious": 0, "density": "C", "findings": "No Finding"}),
        (3, {"birads": 3, "suspicious": 0, "density": "A", "findings": "No Finding"}),
    ],
)
def test_labels(src: Path, i: int, labels: dict[str, str | int]) -> None:
    assert read(src).records[i].labels == labels


def test_notes_tell_of_patients_and_missing_images(src: Path) -> None:
    patients, missing = read(src).notes
    assert "study counts as a patient" in patients
    assert missing.startswith("1 image left out")
    assert read(src).absent == ("images/s2/bb02",)


def test_boxes_come_with_the_film_cut_at_its_edge(src: Path) -> None:
    record = pickle.loads(pickle.dumps(read(src).records[0]))
    film = record.read()
    assert (film.pixels.shape, film.pixels.dtype) == ((90, 70), np.uint16)
    assert film.boxes == (
        Box(left=5.5, top=10.25, right=20, bottom=30.5, label="Suspicious Calcification+Mass"),
        Box(left=0, top=0, right=10, bottom=89, label="Skin Thickening"),
    )


def test_a_dicom_file_shows_its_finding_in_the_box(src: Path) -> None:
    """Bright is low in MONOCHROME1, which the archive has too."""
    pixels = np.full((90, 70), 3000, np.uint16)
    pixels[2:5, 1:4] = 10
    (src / "images/s1/aa02.png").unlink()
    write_dicom(
        src / "images/s1/aa02.dicom", pixels, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape=None
    )
    film = read(src).records[1].read()
    (box,) = film.boxes
    found = film.pixels == film.pixels.max()
    assert np.argwhere(found).min(axis=0).tolist() == [box.top, box.left] == [2, 1]
    assert np.argwhere(found).max(axis=0).tolist() == [box.bottom, box.right] == [4, 3]


def test_an_image_of_another_size_with_boxes_cannot_be_used(src: Path) -> None:
    with pytest.raises(UnreadableImage, match="35 x 45 pixels, and its boxes were drawn on 70 x 90"):
        read(src).records[1].read()


def test_an_image_without_a_row_of_findings_has_no_such_label(src: Path) -> None:
    film(src / "images/s2/bb02.png")
    assert read(src).records[-1].labels == {"birads": 2, "suspicious": 0, "density": "A"}


def test_tables_may_lie_elsewhere(src: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    for table in src.glob("*.csv"):
        table.rename(elsewhere / table.name)
    assert len(read(src, labels=elsewhere).records) == 4
    assert len(read(src, labels=elsewhere / "breast-level_annotations.csv").records) == 4
    with pytest.raises(UserError, match="--labels"):
        read(src)


@pytest.mark.parametrize("cell", ["__import__('os').system('true')", "Mass", "[1]", "[" * 900, "('Mass',)", ""])
def test_categories_are_data_never_code(src: Path, cell: str) -> None:
    table = src / "finding_annotations.csv"
    table.write_text(table.read_text().replace("['Skin Thickening']", f'"{cell}"'))
    with pytest.raises(UserError, match="no list of texts"):
        read(src)


def test_an_archive_without_images_is_refused(src: Path) -> None:
    (src / "images").rename(src / "pictures")
    with pytest.raises(UserError, match="none of the 5 images"):
        read(src)


def test_a_table_without_its_columns_is_refused(src: Path) -> None:
    (src / "breast-level_annotations.csv").write_text(BREASTS.replace("breast_density", "density"))
    with pytest.raises(UserError, match="lacks the columns breast_density"):
        read(src)


def test_options_of_other_sources_are_refused(src: Path) -> None:
    with pytest.raises(UserError, match="--masks"):
        read(src, masks=src)
