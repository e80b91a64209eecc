"""EMBED: an archive in the original layout becomes the right records; findings stay with their breast."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.record import Box, Record
from miram.data.sources import embed
from miram.engine.errors import UserError

HEIGHT, WIDTH = 100, 80
UID = "1.2.840.113681.2750824997.787.3596559977."
CLINICAL = """\
empi_anon,acc_anon,study_date_anon,desc,RACE_DESC,ETHNIC_GROUP_DESC,tissueden,numfind,side,asses,bside,path_severity
100,9001,2015-04-16,MG Screen,White,Non-Hispanic,2.0,1,L,S,L,1.0
100,9001,2015-04-16,MG Screen,White,Non-Hispanic,2.0,2,L,A,L,4.0
100,9001,2015-04-16,MG Screen,White,Non-Hispanic,2.0,3,R,N,,
100,9002,2016-05-01,MG Diag,White,Non-Hispanic,5.0,1,B,K,R,0.0
200,9003,2017-01-01,MG Screen,Asian,Hispanic,,1,,B,,
200,9004,2018-01-01,MG Screen,Asian,Hispanic,4.0,1,R,P,,
300,9003,2018-01-01,MG Screen,Asian,Hispanic,1.0,1,L,M,,
"""
HEADER = (
    "Manufacturer,empi_anon,acc_anon,anon_dicom_path,FinalImageType,ImageLateralityFinal,ViewPosition,spot_mag,"
    "num_roi,ROI_coords,DCM_ROI_coords\n"
)
MOUNT = "/mnt/storage/mammo/anon_dicom"
Row = tuple[int, int, int, str, str, str, str, str, str]
ROWS: list[Row] = [
    # number, patient, exam, type, side, view, spot_mag, ROI_coords, DCM_ROI_coords
    (1, 100, 9001, "2D", "L", "CC", "", '"[[5, 2, 15, 12], [20, 3, 30, 90]]"', ""),
    (2, 100, 9001, "2D", "R", "MLO", "0.0", '"((5, 2, 15, 12),)"', ""),
    (3, 100, 9001, "cview", "R", "MLO", "", "()", ""),
    (4, 100, 9002, "2D", "L", "ML", "0", "()", ""),
    (5, 100, 9002, "2D", "R", "CC", "", '"[[[5, 2, 15, 12]]]"', '"[[[5, 67, 15, 77]]]"'),
    (6, 100, 9002, "2D", "R", "CC", "1.0", "()", ""),
    (7, 200, 9003, "2D", "L", "CC", "", "()", ""),
    (8, 200, 9004, "2D", "L", "CC", "", "()", ""),
    (9, 200, 9004, "2D", "R", "CC", "", "()", ""),
    (10, 300, 9003, "2D", "", "CC", "", "", ""),
]


def path_of(number: int, patient: int, exam: int) -> str:
    return f"cohort_{1 + patient // 300}/{patient}/1.2.{exam}/{UID}{number}"


def metadata(rows: list[Row]) -> str:
    lines = [
        f"HOLOGIC,{patient},{exam},{MOUNT}/{path_of(n, patient, exam)}.dcm,{kind},{side},{view},{spot},1,{roi},{dcm}"
        for n, patient, exam, kind, side, view, spot, roi, dcm in rows
    ]
    return HEADER + "\n".join(lines) + "\n"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """All files but the ninth; left breasts lie at the left edge, right ones at the right."""
    folder = tmp_path / "embed"
    (folder / "tables").mkdir(parents=True)
    (folder / "tables/EMBED_OpenData_clinical.csv").write_text(CLINICAL)
    (folder / "tables/EMBED_OpenData_metadata.csv").write_text(metadata(ROWS))
    for number, patient, exam, _, side, *_ in ROWS:
        pixels = np.zeros((HEIGHT, WIDTH), np.uint16)
        pixels[:, :50] = 60_000
        path = folder / "images" / f"{path_of(number, patient, exam)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number != 9:
            Image.fromarray(pixels[:, ::-1] if side == "R" else pixels).save(path)
    return folder


def read(src: Path, **options: object) -> Archive:
    return embed.read(src, SourceOptions(**options))  # type: ignore[arg-type]


def records(src: Path) -> dict[int, Record]:
    return {int(record.image_id.rsplit(".", 1)[1]): record for record in read(src).records}


def test_records_say_who_and_what_an_image_is(src: Path) -> None:
    found = records(src)
    assert {n: (r.patient_id, r.exam_id, r.laterality, r.view) for n, r in found.items()} == {
        1: ("100", "9001", "L", "CC"),
        2: ("100", "9001", "R", "MLO"),
        4: ("100", "9002", "L", "ML"),
        5: ("100", "9002", "R", "CC"),
        7: ("200", "9003", "L", "CC"),
        8: ("200", "9004", "L", "CC"),
        10: ("300", "9003", "", "CC"),
    }
    assert found[1].name == f"images/{path_of(1, 100, 9001)}.png"
    assert found[1].image_id == path_of(1, 100, 9001)


@pytest.mark.parametrize(
    ("number", "labels"),
    [
        (1, {"birads": 4, "path_severity": 1, "density": "B"}),  # S is severer than A, 1 than 4
        (2, {"birads": 1, "density": "B"}),  # the findings of the left breast are not its own
        (4, {"birads": 6}),  # side B, but the biopsy was on the right; density 5 is a man's
        (5, {"birads": 6, "path_severity": 0}),
        (7, {"birads": 2}),  # no side: both breasts
        (8, {"density": "D"}),  # only the right breast has a row: unlabelled, not negative
        (10, {"density": "A"}),  # no laterality: findings of one side are not its own; exam 9003 of another patient
    ],
)
def test_findings_stay_with_their_breast(src: Path, number: int, labels: dict[str, str | int]) -> None:
    assert records(src)[number].labels == labels


@pytest.mark.parametrize(
    ("letters", "birads"), [("NB", 2), ("BP", 3), ("PA", 0), ("AS", 4), ("SM", 5), ("MK", 6), ("X", None), ("", None)]
)
def test_the_severest_assessment_counts(letters: str, birads: int | None) -> None:
    rows = [dict.fromkeys(("tissueden", "path_severity", "bside"), "") | {"side": "L", "asses": x} for x in letters]
    assert embed.labels(rows, "L").get("birads") == birads


def test_licence_and_notes_carry_clause_5(src: Path) -> None:
    archive = read(src)
    for text in (archive.licence, archive.notes[0]):
        assert "written permission" in text
        assert "clause 5" in text
    assert archive.notes[1].startswith("the boxes of 2 images")
    assert "mirrored back" in archive.notes[1]
    assert archive.settings == {"boxes": "mirrored back"}
    assert archive.absent == (path_of(9, 200, 9004),)
    assert archive.notes[2:] == (
        "2 images have no assessment of their side: they are unlabelled, not negative",
        "1 image left out: they are no 2D mammograms (FinalImageType)",
        "1 image left out: spot compression or magnification",
        "1 image left out: the table lists them, the folder lacks them",
    )


def test_race_and_ethnicity_are_not_copied(src: Path) -> None:
    for word in ("White", "Asian", "Hispanic"):
        assert word not in repr(read(src))


def test_boxes_are_ymin_xmin_ymax_xmax_and_cut_at_the_frame(src: Path) -> None:
    film = pickle.loads(pickle.dumps(records(src)[1])).read()
    assert film.boxes == (Box(left=2, top=5, right=12, bottom=15), Box(left=3, top=20, right=79, bottom=30))


def test_boxes_drawn_with_the_chest_wall_left_are_mirrored_onto_a_film_with_it_right(src: Path) -> None:
    """Columns 2 to 12 from the chest wall are columns 67 to 77 of 80 from the other side."""
    assert records(src)[2].read().boxes == (Box(left=67, top=5, right=77, bottom=15),)


@pytest.mark.parametrize(("number", "wall_right"), [(1, False), (1, True), (2, False), (2, True)])
def test_the_box_lies_on_the_lesion_whichever_way_the_file_lies(src: Path, number: int, wall_right: bool) -> None:
    """Either breast may be stored either way; the table's boxes have the chest wall on the left."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint16)
    pixels[:, :50] = 1500
    pixels[5:16, 2:13] = 3000
    path = src / "images" / f"{path_of(number, 100, 9001)}.dcm"
    path.with_suffix(".png").unlink()
    write_dicom(path, np.ascontiguousarray(pixels[:, ::-1]) if wall_right else pixels)
    film = records(src)[number].read()
    box = film.boxes[0]
    lesion = np.argwhere(film.pixels == film.pixels.max())
    assert lesion.min(axis=0).tolist() == [box.top, box.left]
    assert lesion.max(axis=0).tolist() == [box.bottom, box.right]


def test_boxes_told_for_the_dicom_file_stay_where_they_are(src: Path) -> None:
    assert records(src)[5].read().boxes == (Box(left=67, top=5, right=77, bottom=15),)


@pytest.mark.parametrize(
    "cell",
    ["((1,2,3),(10,20,30,40))", "[[10 20 30 40] [1 2]]", "[(10.0, 20, 3e1, 40,)]", "((1,nan,3,4),(10,20,30,40))"],
)
def test_a_box_that_is_not_whole_does_not_take_from_the_next(cell: str) -> None:
    assert embed.parse_boxes(cell) == (Box(left=20, top=10, right=40, bottom=30),)


@pytest.mark.parametrize("cell", ["", "()", "[]", "nan", "[[1, 2, 3]]", "[1, 2, 3, 4, 5]"])
def test_cells_without_a_whole_box(cell: str) -> None:
    assert embed.parse_boxes(cell) == ()


def test_tables_may_lie_elsewhere_and_lack_what_is_optional(src: Path, tmp_path: Path) -> None:
    (src / "tables").rename(tmp_path / "tables")
    table = tmp_path / "tables/EMBED_OpenData_metadata.csv"
    table.write_text(table.read_text().replace("DCM_ROI_coords", "unused"))
    assert len(read(src, labels=tmp_path / "tables").records) == 7
    with pytest.raises(UserError, match=r"no table EMBED_OpenData_clinical\.csv"):
        read(src)


def test_the_folder_images_may_be_left_out(src: Path) -> None:
    for cohort in (src / "images").iterdir():
        cohort.rename(src / cohort.name)
    found = records(src)
    assert len(found) == 7
    assert found[1].image_id == path_of(1, 100, 9001)


def test_a_file_listed_twice_is_one_image(src: Path) -> None:
    (src / "tables/EMBED_OpenData_metadata.csv").write_text(metadata([*ROWS, ROWS[0]]))
    assert len(read(src).records) == 7


def test_paths_out_of_the_archive_are_not_followed(src: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "secret.png")
    outside = [f"{tmp_path}/secret.dcm", "../secret.dcm", "x/cohort_1/../../secret.dcm"]
    assert [embed.image_path(src, name) for name in outside] == [None] * 3


def test_an_archive_without_plain_images_is_refused(src: Path) -> None:
    rows = [(*row[:3], "cview", *row[4:]) for row in ROWS]
    (src / "tables/EMBED_OpenData_metadata.csv").write_text(metadata(rows))
    with pytest.raises(UserError, match="no plain 2D image"):
        read(src)
