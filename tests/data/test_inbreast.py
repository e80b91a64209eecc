"""INbreast: an archive in the original layout becomes the right records, outlines and masks."""

from __future__ import annotations

import pickle
import plistlib
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from numpy.typing import NDArray
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.image import UnreadableImage
from miram.data.record import Polygon, Record
from miram.data.sources import inbreast, outlines
from miram.engine.errors import UserError

HEIGHT, WIDTH = 120, 90
TABLE = """\
Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads
removed;removed;R;CC;201001;1001;4;1
removed;removed;R;MLO;201001;1002;4;4a
removed;removed;L;MLO;201001;1003;2; 3
removed;removed;L;CC;200905;1004;;5
removed;removed;L;CC;200905;1005;1;2
removed;removed;L;CC;200905;1006;1;6
"""
FILES = [
    "1001_6c613a14b80a8591_MG_R_CC_ANON.png",
    "1002_6c613a14b80a8591_MG_R_ML_ANON.png",
    "1003_6c613a14b80a8591_MG_L_ML_ANON.png",
    "1004_5eae9beae14d26fd_MG_L_CC_ANON.png",
    "1006_5eae9beae14d26fd_MG_L_CC_ANON.png",
    "9999_5eae9beae14d26fd_MG_L_CC_ANON.png",
]
MASS = [(20.0, 30.0), (60.0, 30.0), (60.0, 80.0), (20.0, 80.0)]
SPOT = [(40.4, 50.6)]
Roi = tuple[str, list[tuple[float, float]]]


def plist(*rois: Roi) -> bytes:
    """Outlines as OsiriX wrote them."""
    listed = [
        {
            "Area": 1.5,
            "Name": name,
            "NumberOfPoints": len(points),
            "Point_mm": ["(1.0, 2.0, 0.0)"] * len(points),
            "Point_px": [f"({x:f}, {y:f})" for x, y in points],
        }
        for name, points in rois
    ]
    return plistlib.dumps({"Images": [{"ImageIndex": 0, "NumberOfROIs": len(listed), "ROIs": listed}]})


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Five of the table's six films and a stranger; three have outlines, those of 1004 are damaged."""
    folder = tmp_path / "inbreast"
    (folder / "AllDICOMs").mkdir(parents=True)
    (folder / "AllXML").mkdir()
    (folder / "INbreast.csv").write_text(TABLE)
    for name in FILES:
        Image.fromarray(np.full((HEIGHT, WIDTH), 500, np.uint16)).save(folder / "AllDICOMs" / name)
    (folder / "AllDICOMs" / "20586908.dcm").touch()
    (folder / "AllXML" / "1002.xml").write_bytes(plist(("Calcifications", SPOT), ("Mass", MASS)))
    (folder / "AllXML" / "1003.xml").write_bytes(plist(("Assymetry", MASS), ("Unnamed", SPOT), ("Point 1", [])))
    (folder / "AllXML" / "1004.xml").write_bytes(plist(("Mass", MASS))[:300])
    return folder


def read(src: Path, **options: object) -> Archive:
    return inbreast.read(src, SourceOptions(**options))  # type: ignore[arg-type]


def records(src: Path) -> dict[str, Record]:
    return {record.image_id: record for record in read(src).records}


def test_records_take_the_patient_from_the_file_and_the_view_from_the_table(src: Path) -> None:
    assert [(r.image_id, r.patient_id, r.exam_id, r.laterality, r.view) for r in read(src).records] == [
        ("1001", "6c613a14b80a8591", "201001", "R", "CC"),
        ("1002", "6c613a14b80a8591", "201001", "R", "MLO"),
        ("1003", "6c613a14b80a8591", "201001", "L", "MLO"),
        ("1004", "5eae9beae14d26fd", "200905", "L", "CC"),
        ("1006", "5eae9beae14d26fd", "200905", "L", "CC"),
    ]


def test_where_table_and_file_differ_the_table_is_right(src: Path) -> None:
    table = src / "INbreast.csv"
    table.write_text(table.read_text().replace("L;MLO;201001;1003", "R;FB;201001;1003"))
    assert (records(src)["1003"].laterality, records(src)["1003"].view) == ("R", "FB")


def test_what_the_table_lacks_comes_from_the_file(src: Path) -> None:
    table = src / "INbreast.csv"
    table.write_text(table.read_text().replace("removed;removed;R;MLO;201001", "removed;removed;removed;;removed"))
    found = records(src)["1002"]
    assert (found.laterality, found.view, found.exam_id) == ("R", "MLO", "")


def test_labels(src: Path) -> None:
    assert {name: record.labels for name, record in records(src).items()} == {
        "1001": {"birads": "1", "suspicious": 0, "density": "D", "mass": 0, "calcification": 0},
        "1002": {"birads": "4a", "suspicious": 1, "density": "D", "mass": 1, "calcification": 1},
        "1003": {"birads": "3", "density": "B", "mass": 0, "calcification": 0},
        "1004": {"birads": "5", "suspicious": 1},
        "1006": {"birads": "6", "suspicious": 1, "density": "A", "mass": 0, "calcification": 0},
    }


def test_notes_state_the_choice_and_the_losses(src: Path) -> None:
    notes = read(src).notes
    assert "films of BI-RADS 3 have no such label" in notes[0]
    assert "1 of the files in AllXML cannot be read" in notes[1]
    assert notes[2:] == (
        "1 image left out: the table lists them, the folder lacks them",
        "1 image left out: they are not in the table",
    )
    assert read(src).absent == ("AllDICOMs/1005",)


def test_outlines_become_polygons_and_a_mask_of_classes(src: Path) -> None:
    film = pickle.loads(pickle.dumps(records(src)["1002"])).read()
    assert film.polygons == (
        Polygon(points=tuple(SPOT), label="calcification"),
        Polygon(points=tuple(MASS), label="mass"),
    )
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[30:81, 20:61] = 1
    expected[51, 40] = 2  # on top of the mass it lies in, though it comes first
    assert film.mask_kind == "classes"
    assert film.mask is not None
    np.testing.assert_array_equal(film.mask, expected)


def test_a_dicom_file_wins_over_a_picture_and_shows_the_mass_in_its_outline(src: Path) -> None:
    pixels = np.full((HEIGHT, WIDTH), 200, np.uint16)
    pixels[30:81, 20:61] = 3000
    write_dicom(src / "AllDICOMs" / FILES[1].replace(".png", ".dcm"), pixels)
    film = records(src)["1002"].read()
    assert film.mask is not None
    np.testing.assert_array_equal(film.mask > 0, film.pixels == film.pixels.max())
    assert film.spacing_mm == pytest.approx(0.07)


def test_other_spellings_and_names_have_classes_too(src: Path) -> None:
    film = records(src)["1003"].read()
    assert [polygon.label for polygon in film.polygons] == ["asymmetry", "other"]
    assert film.mask is not None
    assert sorted(np.unique(film.mask)) == [0, 5, 7]
    assert inbreast.class_of(" Espiculated  Region") == inbreast.class_of("Spiculated region") == "spiculated region"


def test_a_film_without_a_file_of_outlines_has_an_empty_mask(src: Path) -> None:
    film = records(src)["1001"].read()
    assert film.polygons == ()
    assert film.mask is not None
    assert not film.mask.any()


def test_an_image_without_a_list_of_outlines_has_none(src: Path) -> None:
    (src / "AllXML" / "1001.xml").write_bytes(plistlib.dumps({"Images": [{"ImageIndex": 0, "NumberOfROIs": 0}]}))
    record = records(src)["1001"]
    assert record.labels["mass"] == 0
    assert record.read().polygons == ()


def test_without_any_outlines_nothing_is_said_of_findings(src: Path) -> None:
    (src / "AllXML").rename(src / "elsewhere")
    archive = read(src)
    assert all("mass" not in record.labels for record in archive.records)
    assert archive.records[1].read().mask is None
    assert any("no folder AllXML" in note for note in archive.notes)


def test_a_film_changes_its_stamp_with_its_outlines(src: Path) -> None:
    before = records(src)["1002"].stamp
    (src / "AllXML" / "1002.xml").write_bytes(plist(("Mass", MASS)))
    assert records(src)["1002"].stamp != before


def test_outlines_on_a_film_of_another_size_make_it_unusable(src: Path) -> None:
    Image.fromarray(np.zeros((40, 30), np.uint16)).save(src / "AllDICOMs" / FILES[1])
    with pytest.raises(UnreadableImage, match="outside of the frame"):
        records(src)["1002"].read()


# ---------------------------------------------------------------------------------------------- painting


def inside(points: list[tuple[float, float]]) -> NDArray[np.bool_]:
    """Pixels whose centres lie inside an outline, by counting crossings to the left."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    odd = np.zeros((HEIGHT, WIDTH), bool)
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        crosses = (y1 > y) != (y2 > y)
        if y1 != y2:
            odd ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return odd


def test_a_painted_outline_covers_what_lies_inside_to_within_a_pixel() -> None:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = 25 + 8 * np.sin(3 * angles)
    points = list(zip(45 + radii * np.cos(angles), 60 + radii * np.sin(angles), strict=True))
    mask = inbreast.paint((Polygon(points=tuple(points), label="mass"),), HEIGHT, WIDTH) == 1
    exact = inside(points)
    rim = np.zeros_like(exact)
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)):
        rim |= np.roll(exact, (dy, dx), (0, 1)) != exact
    assert exact.sum() > 1500
    assert (mask == exact)[~rim].all()
    assert mask[exact].mean() > 0.99


@pytest.mark.parametrize("points", [[(7.4, 8.6)], [(7.0, 9.0), (7.3, 9.2)], [(6.8, 9.1), (7.2, 8.9), (7.1, 9.3)]])
def test_the_smallest_outlines_mark_their_pixel(points: list[tuple[float, float]]) -> None:
    mask = inbreast.paint((Polygon(points=tuple(points), label="calcification"),), HEIGHT, WIDTH)
    assert np.argwhere(mask).tolist() == [[9, 7]]
    assert mask[9, 7] == 2


def test_more_outlines_than_a_mask_could_count_are_all_painted() -> None:
    dots = tuple(Polygon(points=((float(x), float(y)),), label="calcification") for x in range(30) for y in range(20))
    assert (inbreast.paint(dots, HEIGHT, WIDTH) == 2).sum() == 600


# ---------------------------------------------------------------------------------------------- damaged outlines

BOMB = b"""<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<plist version="1.0"><dict><key>Images</key><string>&b;</string></dict></plist>"""
OUTSIDE = b"""<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a SYSTEM "file:///etc/hostname">]>
<plist version="1.0"><dict><key>Images</key><string>&a;</string></dict></plist>"""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no xml",
        BOMB,
        OUTSIDE,
        b'<?xml version="1.0" encoding="TF-8"?><plist><dict/></plist>',
        b"<plist><array/></plist>",
        b"<plist><dict><key>Images</key><integer>3</integer></dict></plist>",
        b"<plist>" + b"<array>" * 20_000,
        plist(("Mass", MASS)).replace(b"(20.000000, 30.000000)", b"(20.000000)"),
        plist(("Mass", MASS)).replace(b"20.000000", b"1e999"),
        plist(("Mass", MASS)).replace(b"20.000000", b"__import__('os')"),
        plist(("Mass", MASS)).replace(b"Point_px", b"Points"),
        plistlib.dumps({"Images": []}, fmt=plistlib.FMT_BINARY),
    ],
)
def test_damaged_or_hostile_outlines_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match="cannot be read"):
        outlines.read_outlines(path)


def test_outlines_of_absurd_size_are_not_even_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    with path.open("wb") as file:
        file.truncate(outlines.LARGEST + 1)
    with pytest.raises(UnreadableImage, match="32 MiB"):
        outlines.read_outlines(path)


# ---------------------------------------------------------------------------------------------- refusals


def test_an_archive_without_table_films_or_original_names_is_refused(src: Path) -> None:
    for name in FILES:
        (src / "AllDICOMs" / name).unlink()
    with pytest.raises(UserError, match="none of the 6 films"):
        read(src)
    (src / "INbreast.csv").write_text(TABLE.replace(";", ","))
    with pytest.raises(UserError, match="lacks the columns"):
        read(src)
    (src / "INbreast.csv").unlink()
    with pytest.raises(UserError, match=r"no table INbreast\.csv"):
        read(src)
