"""CBIS-DDSM: the real tables give the published counts; a small archive in its layouts gives the right pixels."""

from __future__ import annotations

import csv
import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from numpy.typing import NDArray
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.geometry import Geometry
from miram.data.image import UnreadableImage
from miram.data.phantom import PhantomSettings, render
from miram.data.record import Film, Record
from miram.data.sources.cbis import read, square
from miram.data.sources.cbis_tables import Finding, labels, read_tables
from miram.engine.errors import UserError

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere")) / "metadata_csv"
real = pytest.mark.skipif(not REAL.is_dir(), reason="MIRAM_REAL_DATA names no folder with metadata_csv")
LAYOUTS = ("nbia", "original", "png", "jpeg", "series")
SHAPE = (200, 160)
Box = tuple[int, int, int, int]  # rows from … to, columns from … to


# ---------------------------------------------------------------------------------------------- a small archive


@dataclass
class Row:
    """An abnormality of the small archive: a filled rectangle on its film, and how its files lie on disk."""

    film: str
    number: int
    box: Box
    pathology: str = "BENIGN"
    density: str = "3"
    assessment: str = "3"
    subtlety: str = "4"
    terms: tuple[str, str] = ("N/A", "N/A")  # shape and margins, or type and distribution
    mask_shape: tuple[int, int] = SHAPE
    mask_first: bool = False
    apart: bool = False  # crop and mask in two series
    without: Sequence[str] = field(default=())  # "film", "mask", "crop": not on disk

    @property
    def folder(self) -> str:
        return f"{self.film}_{self.number}"


ROWS = (
    Row("Mass-Training_P_00001_LEFT_CC", 1, (40, 80, 20, 70), terms=("ROUND-OVAL", "SPICULATED-OBSCURED")),
    Row("Mass-Training_P_00001_LEFT_CC", 2, (60, 70, 60, 90), "MALIGNANT", assessment="5", subtlety="0", apart=True),
    Row("Mass-Training_P_00001_LEFT_CC", 3, (185, 200, 0, 30), "BENIGN_WITHOUT_CALLBACK", mask_first=True),
    Row("Mass-Training_P_00002_RIGHT_MLO", 1, (50, 90, 100, 150), mask_shape=(174, 139), density="1"),
    Row("Mass-Training_P_00003_LEFT_CC", 1, (50, 90, 30, 60), mask_shape=(200, 120)),
    Row("Mass-Training_P_00004_LEFT_MLO", 1, (50, 90, 30, 60), without=("film",)),
    Row("Mass-Training_P_00005_LEFT_CC", 1, (20, 60, 20, 60), "MALIGNANT", assessment="4", terms=("OVAL", "N/A")),
    Row("Mass-Training_P_00005_LEFT_MLO", 1, (90, 99, 20, 60), "MALIGNANT"),
    Row("Calc-Test_P_00005_LEFT_CC", 1, (100, 120, 20, 40), "BENIGN", "0", "2", terms=("COARSE", "REGIONAL-REGIONAL")),
    Row("Calc-Training_P_00006_LEFT_CC", 1, (100, 120, 20, 40), without=("mask", "crop")),
    Row("Calc-Training_P_00007_LEFT_CC", 1, (100, 120, 20, 40), without=("mask",)),
)
FIRST = "P_00001_LEFT_CC"


def pixels_of(film: str) -> NDArray[np.uint16]:
    """16 bits of a phantom, the same for both names of a film."""
    _, _, patient, side, view = film.split("_")
    return render(PhantomSettings(size=200, seed=3), int(patient), side[0], view).pixels.astype(np.uint16) * 16


def drawn(box: Box, shape: tuple[int, int] = SHAPE) -> NDArray[np.bool_]:
    """The rectangle on a frame of that shape, each pixel's centre looked up on the film's own."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    y, x = (y + 0.5) * SHAPE[0] / shape[0], (x + 0.5) * SHAPE[1] / shape[1]
    return (y > box[0]) & (y < box[1]) & (x > box[2]) & (x < box[3])


def write_tables(folder: Path, rows: Sequence[Row] = ROWS) -> None:
    """The four tables with their quirks: two spellings of density, and line breaks in paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, terms in (("mass", ("mass shape", "mass margins")), ("calc", ("calc type", "calc distribution"))):
        density = "breast_density" if kind == "mass" else "breast density"
        header = ["patient_id", density, "left or right breast", "image view", "abnormality id", "abnormality type"]
        header += [*terms, "assessment", "pathology", "subtlety"]
        header += ["image file path", "cropped image file path", "ROI mask file path"]
        for split, spelt in (("train", "Training"), ("test", "Test")):
            with (folder / f"{kind}_case_description_{split}_set.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(header)
                writer.writerows(cells(r) for r in rows if r.film.startswith(f"{kind.title()}-{spelt}"))


def cells(row: Row) -> list[str]:
    kind, _, patient, side, view = row.film.split("_")
    film = f"{row.film}/1.2.1/{series(row.film)}/000000.dcm"
    mask = f"{row.folder}/1.2.2/{series(row.folder)}/000000.dcm\n"  # that it is the first file is often wrong
    crop = f"{row.folder}/1.2.2/{series(row.folder, row.apart)}/000001.dcm"
    first = [f"P_{patient}", row.density, side, view, f" {row.number}", "mass" if kind[0] == "M" else "calcification"]
    return [*first, *row.terms, row.assessment, row.pathology, row.subtlety, film, crop, mask]


def series(folder: str, second: bool = False) -> str:
    """A series UID of its own for each folder."""
    return f"1.3.6.{int.from_bytes(folder.encode(), 'big')}{'.9' * second}"


def write_files(src: Path, rows: Sequence[Row] = ROWS, layout: str = "nbia") -> None:
    """Films, crops and masks on disk."""
    for film in {row.film for row in rows if "film" not in row.without}:
        write_one(src, layout, film, series(film), 0, pixels_of(film))
    for row in rows:
        top, bottom, left, right = row.box
        pair = {
            "crop": pixels_of(row.film)[top:bottom, left:right],
            "mask": drawn(row.box, row.mask_shape).astype(np.uint8) * 255,
        }
        for number, what in enumerate(sorted(pair, reverse=row.mask_first)):
            if what not in row.without:
                place = series(row.folder, row.apart and what == "crop")
                write_one(src, layout, row.folder, place, 0 if row.apart else number, pair[what])


def write_one(src: Path, layout: str, folder: str, uid: str, number: int, pixels: NDArray) -> None:
    path = {
        "nbia": src / "CBIS-DDSM" / folder / "08-07-2016-DDSM-NA-1" / f"1.0-images-{uid[-5:]}" / f"1-{number + 1}.dcm",
        "original": src / folder / "1.2.3" / uid / f"{number:06d}.dcm",
        "png": src / "png" / folder / f"{uid[-5:]}-{number}.png",
        "jpeg": src / "jpeg" / folder / f"{uid[-5:]}-{number}.jpg",
        "series": src / uid / f"1-{number}.png",
    }[layout]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".dcm":
        odd = {"Modality": "RG", "ImageType": ["DERIVED", "SECONDARY"], "ImagerPixelSpacing": None}
        odd |= {"WindowCenter": 128, "WindowWidth": 10, "ImageLaterality": None, "PatientID": folder}
        write_dicom(path, pixels, BitsStored=8 * pixels.dtype.itemsize, **odd)
    else:
        eight = (pixels // 256).astype(np.uint8) if layout == "jpeg" and pixels.dtype == np.uint16 else pixels
        Image.fromarray(eight).save(path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small archive as the NBIA Data Retriever leaves it."""
    src = tmp_path_factory.mktemp("cbis")
    write_tables(src / "tables")
    write_files(src)
    return src


def records(src: Path, **options: object) -> dict[str, Record]:
    return {record.image_id: record for record in read(src, SourceOptions(**options)).records}


def film(record: Record) -> Film:
    """Read as a worker does."""
    return pickle.loads(pickle.dumps(record.read))()


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


# ---------------------------------------------------------------------------------------------- whole films


def test_a_film_is_one_record_however_many_abnormalities_and_names_it_has(archive: Path) -> None:
    found = records(archive)
    names = ["P_00002_RIGHT_MLO", "P_00003_LEFT_CC", "P_00005_LEFT_CC", "P_00005_LEFT_MLO", "P_00006_LEFT_CC"]
    assert sorted(found) == sorted([FIRST, *names, "P_00007_LEFT_CC"])
    one = found["P_00002_RIGHT_MLO"]
    assert (one.patient_id, one.laterality, one.view, one.split) == ("P_00002", "R", "MLO", "train")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_and_masks_are_found_in_every_layout_in_any_order(tmp_path: Path, layout: str) -> None:
    write_tables(tmp_path)
    write_files(tmp_path, ROWS[:3], layout)
    got = film(records(tmp_path)[FIRST])
    expected = np.zeros(SHAPE, np.uint8)
    for k in (1, 3, 2):  # 2 is the smaller one of those that overlap
        expected[drawn(ROWS[k - 1].box)] = k
    assert got.mask is not None
    assert got.mask_kind == "instances"
    if layout == "jpeg":
        assert all(dice(got.mask == k, expected == k) > 0.98 for k in (1, 2, 3))
    else:
        np.testing.assert_array_equal(got.mask, expected)
        np.testing.assert_array_equal(got.pixels, pixels_of(ROWS[0].film))
        assert got.max_value == 65535


def test_the_severest_abnormality_names_the_film(archive: Path) -> None:
    got = records(archive)[FIRST].labels
    assert got == {
        "pathology": "MALIGNANT",
        "binary": "malignant",
        "four_class": "MALIGNANT_MASS",
        "abnormality": "mass",
        "density": "C",
        "assessment": 5,
        "subtlety": 4,
        "mass_shape": "OVAL|ROUND",
        "mass_margins": "OBSCURED|SPICULATED",
    }


def test_a_film_with_a_mass_and_a_calcification_is_both_and_in_test(archive: Path) -> None:
    found = records(archive)
    got = found["P_00005_LEFT_CC"]
    assert got.labels["abnormality"] == "both"
    assert (got.labels["four_class"], got.labels["calc_distribution"]) == ("MALIGNANT_MASS", "REGIONAL")
    assert "mass_margins" not in got.labels  # N/A
    assert got.labels["density"] == "C"  # its calcification's row says 0, which is no density
    assert got.split == "test"
    mask = film(got).mask
    assert mask is not None
    np.testing.assert_array_equal(mask, drawn(ROWS[6].box) + 2 * drawn(ROWS[8].box))
    assert found["P_00005_LEFT_MLO"].split == "train"


def test_disjoint_moves_a_patient_to_test_with_all_images(archive: Path) -> None:
    for level in ("image", "roi"):
        splits = defaultdict(set)
        for record in records(archive, level=level, disjoint=True).values():
            splits[record.patient_id].add(record.split)
        assert splits["P_00005"] == {"test"}
        assert splits["P_00001"] == {"train"}


def test_a_mask_of_a_smaller_scan_is_enlarged(archive: Path) -> None:
    mask = film(records(archive)["P_00002_RIGHT_MLO"]).mask
    assert mask is not None
    assert mask.shape == SHAPE
    assert dice(mask == 1, drawn(ROWS[3].box)) > 0.97


@pytest.mark.parametrize("name", ["P_00003_LEFT_CC", "P_00006_LEFT_CC", "P_00007_LEFT_CC"])
def test_a_film_without_a_usable_mask_is_kept_and_says_so(archive: Path, name: str) -> None:
    got = film(records(archive)[name])
    assert got.mask is None
    assert got.facts["masks"] == "none"


def test_a_film_that_lacks_one_of_its_masks_says_so(tmp_path: Path) -> None:
    write_tables(tmp_path)
    write_files(tmp_path, (ROWS[0], ROWS[2]))
    got = film(records(tmp_path)[FIRST])
    assert got.mask is not None
    assert set(np.unique(got.mask)) == {0, 1, 3}  # numbered as in the tables all the same
    assert got.facts["masks"] == "incomplete"


def test_a_dark_crop_with_one_bright_spot_is_no_mask(tmp_path: Path) -> None:
    write_tables(tmp_path)
    write_files(tmp_path, ROWS[:1], "png")
    (path,) = (p for p in tmp_path.rglob("*.png") if "_1/" in p.as_posix() and p.stem.endswith("-1"))
    dark = np.full(SHAPE, 900, np.uint16)  # in place of the mask
    dark[::7] += 40
    dark[50, 50] = 60000
    Image.fromarray(dark).save(path)
    assert film(records(tmp_path)[FIRST]).mask is None


def test_the_notes_count_what_is_missing_and_what_was_joined(archive: Path) -> None:
    told = read(archive, SourceOptions()).notes
    expected = (
        "1 of the tables' 8 films are not on disk",
        "1 abnormalities have no mask",
        "1 films are in the mass and in",
    )
    for start in (
        *expected,
        "1 films are in the official train and in test",
        "1 patients are in the official train and",
    ):
        assert any(note.startswith(start) for note in told), (start, told)
    assert any("--disjoint" in note and "miram data split" in note for note in told)
    assert not any("P_0" in note for note in told)
    assert not any("--disjoint" in note for note in read(archive, SourceOptions(disjoint=True)).notes)


def test_what_the_tables_list_and_the_disk_lacks_is_named(archive: Path) -> None:
    assert read(archive, SourceOptions()).absent == ("P_00004_LEFT_MLO", "Calc-Training_P_00006_LEFT_CC_1")
    squares = read(archive, SourceOptions(level="roi")).absent
    assert squares == ("Mass-Training_P_00004_LEFT_MLO_1", "Calc-Training_P_00006_LEFT_CC_1")


@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>"])
def test_a_damaged_film_is_no_absent_one(tmp_path: Path, content: bytes) -> None:
    """A download that failed: it is there, and ingest lists it with its reason."""
    write_tables(tmp_path)
    write_files(tmp_path, ROWS[:4])
    (path,) = (tmp_path / "CBIS-DDSM" / ROWS[0].film).rglob("*.dcm")
    path.write_bytes(content)
    told = read(tmp_path, SourceOptions())
    assert FIRST not in told.absent
    with pytest.raises(UnreadableImage, match=r"empty|no DICOM file"):
        film({record.name: record for record in told.records}[FIRST])


def test_linked_folders_are_part_of_the_archive(tmp_path: Path) -> None:
    write_tables(tmp_path / "disk" / "tables")
    write_files(tmp_path / "disk", ROWS[:1])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "disk")
    assert list(records(tmp_path / "src")) == [FIRST]


def test_a_replaced_mask_changes_the_stamp(tmp_path: Path) -> None:
    write_tables(tmp_path)
    write_files(tmp_path, ROWS[:1])
    before = records(tmp_path)[FIRST].stamp
    for path in tmp_path.rglob("1-2.dcm"):
        os.utime(path, (1, 1))
    assert records(tmp_path)[FIRST].stamp != before


# ---------------------------------------------------------------------------------------------- abnormalities


def test_an_abnormality_is_a_record_with_its_mask_alone(archive: Path) -> None:
    found = records(archive, level="roi")
    assert len(found) == 9  # not the one without film, nor the one without any file
    got = found["Mass-Training_P_00001_LEFT_CC_2"]
    assert (got.labels["four_class"], got.patient_id) == ("MALIGNANT_MASS", "P_00001")
    assert "subtlety" not in got.labels
    mask = film(got).mask
    assert mask is not None
    np.testing.assert_array_equal(mask, drawn(ROWS[1].box))
    assert found["Mass-Training_P_00005_LEFT_CC_1"].split == "train"
    assert found["Calc-Test_P_00005_LEFT_CC_1"].split == "test"


@pytest.mark.parametrize("margin", [0.0, 0.25])
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]])
def test_its_region_is_a_square_around_the_mask_zero_beyond_the_film(archive: Path, row: Row, margin: float) -> None:
    got = film(records(archive, level="roi", margin=margin)[row.folder])
    assert got.region is not None
    top, bottom, left, right = row.box
    side = round(max(bottom - top, right - left) * (1 + 2 * margin))
    start = (top + bottom) / 2 - side / 2, (left + right) / 2 - side / 2
    assert got.region.bottom - got.region.top == got.region.right - got.region.left == side
    assert abs(got.region.top - start[0]) <= 0.5
    assert abs(got.region.left - start[1]) <= 0.5
    stored = Geometry.crop(SHAPE, got.region).apply_film(got)
    padded = np.pad(pixels_of(row.film), 100)[got.region.top + 100 :, got.region.left + 100 :][:side, :side]
    np.testing.assert_array_equal(stored.pixels, padded)
    assert stored.mask is not None
    assert np.count_nonzero(stored.mask) == (bottom - top) * (right - left)
    if row is ROWS[2]:
        assert got.region.bottom > SHAPE[0]  # it does reach beyond


@pytest.mark.parametrize("height", range(1, 6))
@pytest.mark.parametrize("width", range(1, 6))
def test_a_square_holds_its_mask_whatever_is_odd_or_even(height: int, width: int) -> None:
    mask = np.zeros((20, 20), bool)
    mask[7 : 7 + height, 9 : 9 + width] = True
    region = square(mask, 0.0)
    assert region.top <= 7 < 7 + height <= region.bottom
    assert region.left <= 9 < 9 + width <= region.right
    assert region.bottom - region.top == region.right - region.left == max(height, width)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Mass-Training_P_00003_LEFT_CC_1", "120 x 200"), ("Calc-Training_P_00007_LEFT_CC_1", "two values")],
)
def test_an_abnormality_without_a_usable_mask_is_unreadable(archive: Path, name: str, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as raised:
        film(records(archive, level="roi")[name])
    assert "P_0" not in str(raised.value)
    assert str(archive) not in str(raised.value)


def test_abnormalities_that_miss_files_are_counted(archive: Path) -> None:
    told = read(archive, SourceOptions(level="roi")).notes
    assert any(note.startswith("2 of the tables' 11 abnormalities lack film or mask") for note in told)


def test_films_keep_the_breast_steps_and_squares_do_not(archive: Path) -> None:
    films, squares = read(archive, SourceOptions()), read(archive, SourceOptions(level="roi", margin=0.5))
    assert (films.breast, squares.breast) == (True, False)
    assert (films.licence, films.dataset) == ("CC BY 3.0", "cbis-ddsm")
    assert squares.settings == {"level": "roi", "disjoint": False, "margin": 0.5}


# ---------------------------------------------------------------------------------------------- what users get wrong


def test_tables_may_lie_elsewhere(tmp_path: Path) -> None:
    write_tables(tmp_path / "tables")
    write_files(tmp_path / "images", ROWS[:1])
    assert list(records(tmp_path / "images", labels=tmp_path / "tables")) == [FIRST]


def test_what_is_missing_altogether_is_named(tmp_path: Path) -> None:
    write_tables(tmp_path / "tables")
    (tmp_path / "images").mkdir()
    for src, given, complaint in (
        ("images", {}, r"images holds no table such as mass_case"),
        ("images", {"labels": tmp_path / "tables"}, r"images holds none of the 8 films.*Mass-Training_P_00001_LEFT_CC"),
        ("images", {"labels": tmp_path / "tables", "level": "roi"}, r"none of the 11 abnormalities"),
        ("images", {"labels": tmp_path / "nowhere"}, r"nowhere is no folder"),
        ("tables", {"margin": -0.6}, r"--margin"),
        ("tables", {"masks": tmp_path}, r"--masks"),
    ):
        with pytest.raises(UserError, match=complaint):
            read(tmp_path / src, SourceOptions(**given))


@pytest.mark.parametrize(
    ("old", "new"),
    [("Mass-Training_P_00001", "P_00001"), ("MALIGNANT", "BAD"), ("P_00001,", "P_1,"), (" 1,mass", ",mass")],
)
def test_a_row_that_is_not_as_published_is_refused(tmp_path: Path, old: str, new: str) -> None:
    write_tables(tmp_path)
    table = tmp_path / "mass_case_description_train_set.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"mass_case_description_train_set\.csv has a row that is not as published"):
        read_tables(tmp_path)


def test_part_of_the_tables_is_enough_and_said(tmp_path: Path) -> None:
    write_tables(tmp_path)
    (tmp_path / "calc_case_description_test_set.csv").unlink()
    write_files(tmp_path, ROWS[:1])
    told = read(tmp_path, SourceOptions()).notes
    assert any("no table of mass test, calc test" in note for note in told)  # the fixture's mass test has no row


def test_tables_without_rows_are_refused(tmp_path: Path) -> None:
    write_tables(tmp_path, ())
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path, SourceOptions())


def test_tables_that_lie_there_twice_count_once(tmp_path: Path) -> None:
    write_tables(tmp_path / "a")
    write_tables(tmp_path / "b")
    assert len(read_tables(tmp_path)) == len(ROWS)


# ---------------------------------------------------------------------------------------------- the real tables


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return read_tables(REAL)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, findings: list[Finding]) -> Path:
    """An empty file for every film and every mask of the real tables."""
    src = tmp_path_factory.mktemp("everything")
    for folder in {name for finding in findings for name in (finding.film, finding.mask)}:
        (src / folder).mkdir()
        (src / folder / "1-1.png").touch()
    return src


@real
def test_rows_patients_films_and_pathologies_are_as_published(findings: list[Finding]) -> None:
    parts: Mapping[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        parts[finding.kind, finding.split].append(finding)
    counts = {}
    for part, found in parts.items():
        told = Counter(finding.pathology for finding in found)
        patients, films = {finding.patient for finding in found}, {finding.film for finding in found}
        counts[part] = (len(found), len(patients), len(films), *(told[p] for p in PATHOLOGIES))
    assert counts == {
        ("mass", "train"): (1318, 691, 1231, 577, 104, 637),
        ("mass", "test"): (378, 201, 361, 194, 37, 147),
        ("calc", "train"): (1546, 602, 1227, 528, 474, 544),
        ("calc", "test"): (326, 151, 284, 130, 67, 129),
    }
    assert len({finding.patient for finding in findings}) == 1566


PATHOLOGIES = ("BENIGN", "BENIGN_WITHOUT_CALLBACK", "MALIGNANT")


@real
def test_missing_labels_of_the_real_tables_are_missing(findings: list[Finding]) -> None:
    missing = Counter((task, f.kind, f.split) for f in findings for task in TASKS[f.kind] if task not in labels([f]))
    assert missing == {
        ("mass_shape", "mass", "train"): 4,
        ("mass_margins", "mass", "train"): 43,
        ("mass_margins", "mass", "test"): 17,
        ("calc_type", "calc", "train"): 20,
        ("calc_type", "calc", "test"): 4,
        ("calc_distribution", "calc", "train"): 376,
        ("calc_distribution", "calc", "test"): 63,
        ("density", "calc", "test"): 2,
        ("subtlety", "mass", "train"): 2,
    }
    assert {labels([finding])["assessment"] for finding in findings} == {0, 1, 2, 3, 4, 5}


TASKS = {
    "mass": ("density", "subtlety", "mass_shape", "mass_margins"),
    "calc": ("density", "subtlety", "calc_type", "calc_distribution"),
}


@pytest.fixture(scope="module")
def official(everything: Path) -> dict[str, Archive]:
    """All of them by level, in the official split."""
    return {level: read(everything, SourceOptions(labels=REAL, level=level)) for level in ("image", "roi")}


@real
def test_four_classes_of_the_real_abnormalities_by_split(official: dict[str, Archive]) -> None:
    archive = official["roi"]
    counts = Counter((str(record.labels["four_class"]), record.split) for record in archive.records)
    assert counts == {
        ("BENIGN_MASS", "train"): 681,
        ("BENIGN_MASS", "test"): 231,
        ("MALIGNANT_MASS", "train"): 637,
        ("MALIGNANT_MASS", "test"): 147,
        ("BENIGN_CALC", "train"): 1002,
        ("BENIGN_CALC", "test"): 197,
        ("MALIGNANT_CALC", "train"): 544,
        ("MALIGNANT_CALC", "test"): 129,
    }
    assert leaking(archive) == 31
    assert any(note.startswith("31 patients") for note in archive.notes)


@real
def test_real_films_are_one_record_each(official: dict[str, Archive]) -> None:
    archive = official["image"]
    assert len({record.image_id for record in archive.records}) == len(archive.records) == 1231 + 361 + 1227 + 284 - 71
    assert any(note.startswith("29 films are in the official train and in test") for note in archive.notes)
    assert any(note.startswith("71 films are in the mass and in the calc tables") for note in archive.notes)
    assert any(note.startswith("31 patients") for note in archive.notes)
    assert leaking(archive) == 22  # nine leak by shared films alone, and a film is only in test


@real
@pytest.mark.parametrize("level", ["image", "roi"])
def test_the_disjoint_option_leaves_no_patient_on_both_sides(
    everything: Path, official: dict[str, Archive], level: str
) -> None:
    apart = read(everything, SourceOptions(labels=REAL, level=level, disjoint=True))
    assert leaking(apart) == 0
    before = {record.image_id: record.split for record in official[level].records}
    moved = {r.patient_id for r in apart.records if r.split != before[r.image_id]}
    assert len(moved) == {"image": 22, "roi": 31}[level]
    assert all(r.split == "test" for r in apart.records if before[r.image_id] == "test")


def leaking(archive: Archive) -> int:
    """Patients with records in train and in test."""
    sides = [{r.patient_id for r in archive.records if r.split == split} for split in ("train", "test")]
    return len(sides[0] & sides[1])
