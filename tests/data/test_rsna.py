"""RSNA 2022: an archive in the original layout becomes the right records."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.sources import rsna
from miram.engine.errors import UserError

HEADER = (
    "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id,"
    "difficult_negative_case\n"
)
TABLE = f"""{HEADER}\
2,10006,462822612,L,CC,61.0,0,0,0,,0,,29,False
2,10006,1459541791,L,MLO,61.0,0,0,0,,0,,29,False
1,10011,541722628,R,CC,89.0,1,1,0,0.0,1,C,49,False
1,10011,1031443799,L,AT,,0,1,0,2.0,1,C,49,True
1,10038,1350492010,L,CC,80.0,0,0,0,1.0,0,A,170,False
"""


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four of the five images."""
    folder = tmp_path / "rsna"
    for name in ("10006/462822612.dcm", "10011/541722628.dcm", "10011/1031443799.dcm"):
        (folder / "train_images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train_images" / name).touch()
    (folder / "train_images/10038").mkdir()
    Image.fromarray(np.full((6, 4), 7, np.uint16)).save(folder / "train_images/10038/1350492010.png")
    (folder / "train.csv").write_text(TABLE)
    (folder / "test.csv").write_text("site_id,patient_id\n2,10008\n")
    return folder


def read(src: Path, **options: object) -> Archive:
    return rsna.read(src, SourceOptions(**options))  # type: ignore[arg-type]


def test_records_say_who_and_what_an_image_is(src: Path) -> None:
    archive = read(src)
    assert [(r.image_id, r.patient_id, r.laterality, r.view, r.name) for r in archive.records] == [
        ("462822612", "10006", "L", "CC", "train_images/10006/462822612.dcm"),
        ("541722628", "10011", "R", "CC", "train_images/10011/541722628.dcm"),
        ("1031443799", "10011", "L", "AT", "train_images/10011/1031443799.dcm"),
        ("1350492010", "10038", "L", "CC", "train_images/10038/1350492010.png"),
    ]
    assert {(r.split, r.exam_id) for r in archive.records} == {("", "")}
    assert archive.licence == "RSNA 2022 competition rules: non-commercial"


def test_labels_are_those_the_table_knows(src: Path) -> None:
    common = {"biopsy": 1, "invasive": 0, "density": "C", "implant": 1, "site": "1", "machine": "49"}
    healthy = {"cancer": 0, "biopsy": 0, "invasive": 0, "implant": 0, "difficult_negative_case": 0}
    assert [record.labels for record in read(src).records] == [
        {**healthy, "site": "2", "machine": "29", "age": "60-69"},
        {**common, "cancer": 1, "birads": 0, "difficult_negative_case": 0, "age": "80+"},
        {**common, "cancer": 0, "birads": 2, "difficult_negative_case": 1},
        {**healthy, "birads": 1, "density": "A", "site": "1", "machine": "170", "age": "80+"},
    ]


@pytest.mark.parametrize(
    ("cell", "decade"),
    [("39.0", "30-39"), ("40", "40-49"), ("79.9", "70-79"), ("80", "80+"), ("104", "80+"), ("", ""), ("-1", "")],
)
def test_ages_become_decades_capped_at_80(cell: str, decade: str) -> None:
    assert rsna.decade(cell) == decade


def test_images_that_are_not_there_are_named(src: Path) -> None:
    assert read(src).absent == ("train_images/10006/1459541791",)


def test_notes_tell_what_to_beware_of(src: Path) -> None:
    notes = " / ".join(read(src).notes)
    for part in ("per breast", "test.csv is not read", "machine", "1 image left out"):
        assert part in notes


def test_an_image_can_be_read_in_another_process(src: Path) -> None:
    film = pickle.loads(pickle.dumps(read(src).records[-1])).read()
    assert film.pixels.tolist() == [[7] * 4] * 6


@pytest.mark.parametrize("syntax", ["j2k", "jpeg-lossless"])
def test_the_archives_transfer_syntaxes_are_read(src: Path, syntax: str) -> None:
    pixels = (np.arange(80 * 64, dtype=np.uint16) * 4 // 5).reshape(80, 64)
    write_dicom(src / "train_images/10006/462822612.dcm", pixels, syntax=syntax)
    film = read(src).records[0].read()
    assert film.pixels.shape == (80, 64)
    assert (np.diff(film.pixels.astype(int).ravel()) >= 0).all()
    assert len(np.unique(film.pixels)) == 4096


def test_the_table_may_lie_elsewhere_under_any_name(src: Path, tmp_path: Path) -> None:
    (src / "train.csv").rename(tmp_path / "fold0.csv")
    assert len(read(src, labels=tmp_path / "fold0.csv").records) == 4
    with pytest.raises(UserError, match=r"train\.csv"):
        read(src)


def test_a_table_or_folder_without_what_is_needed_is_refused(src: Path) -> None:
    with pytest.raises(UserError, match=r"lacks the columns .*cancer"):
        read(src, labels=src / "test.csv")
    (src / "train_images").rename(src / "images")
    with pytest.raises(UserError, match="none of the 5 images"):
        read(src)
