"""Sources: archives as they lie on disk, quirks included, become the right records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from miram.data.image import UnreadableImage
from miram.data.ingest import Archive, ingest
from miram.data.record import Record
from miram.data.shards import ShardDataset
from miram.data.sources import read_archive
from miram.engine.errors import UserError

SECRET = b"sixteen bytes or more"
SIDE = 1024
TABLE = """
    Tissue and findings; y counts from the bottom.

mdb001 G CIRC B 300 624 40
mdb002 F NORM
mdb003 D ASYM B *NOTE 3*
mdb004 G CIRC B 700 424 30
mdb004 G SPIC M 600 724 20
mdb005 F MISC M 500 500 10
"""


def film(blobs: list[tuple[int, int, int]], wall: str) -> NDArray[np.uint8]:
    """Half an ellipse with the chest wall on one side; blobs (x, y from the bottom, radius) are brighter."""
    y, x = np.mgrid[:SIDE, :SIDE]
    distance = SIDE - 1 - x if wall == "right" else x
    image = np.where(np.hypot((y - 512) / 480, distance / 850) < 1, 120, 3).astype(np.uint8)
    for cx, cy, radius in blobs:
        image[np.hypot(x - cx, y - (SIDE - 1 - cy)) <= radius] = 250
    return image


@pytest.fixture(scope="module")
def mias_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of the table's five films."""
    folder = tmp_path_factory.mktemp("mias")
    blobs = {1: [(300, 624, 40)], 4: [(700, 424, 30), (600, 724, 20)]}
    for number in range(1, 5):
        header = b"P5\n# made by a test\n1024 1024\n255\n"
        raw = film(blobs.get(number, []), "right" if number == 3 else "left").tobytes()
        (folder / f"mdb{number:03d}.pgm").write_bytes(header + raw)
    (folder / "Info.txt").write_text(TABLE)
    return folder


@pytest.fixture(scope="module")
def mias(mias_files: Path) -> dict[str, Record]:
    return {record.image_id: record for record in read_archive("mias", mias_files).records}


# ---------------------------------------------------------------------------------------------- mias


def test_mias_gives_the_films_that_are_there(mias: dict[str, Record]) -> None:
    assert sorted(mias) == ["mdb001", "mdb002", "mdb003", "mdb004"]


def test_mias_films_2k_minus_1_and_2k_are_one_patient(mias: dict[str, Record]) -> None:
    patients = [mias[f"mdb{n:03d}"].patient_id for n in range(1, 5)]
    assert patients[0] == patients[1] != patients[2] == patients[3]
    assert [mias[f"mdb{n:03d}"].laterality for n in range(1, 5)] == ["R", "L", "R", "L"]
    assert {record.view for record in mias.values()} == {"MLO"}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("mdb001", {"tissue": "G", "finding": "CIRC", "severity": "B", "abnormal": 1}),
        ("mdb002", {"tissue": "F", "finding": "NORM", "severity": "N", "abnormal": 0}),
        ("mdb003", {"tissue": "D", "finding": "ASYM", "severity": "B", "abnormal": 1}),
        ("mdb004", {"tissue": "G", "finding": "CIRC+SPIC", "severity": "M", "abnormal": 1}),
    ],
)
def test_mias_labels(mias: dict[str, Record], name: str, labels: dict[str, str | int]) -> None:
    assert mias[name].labels == labels


def test_mias_circles_lie_on_the_findings(mias: dict[str, Record]) -> None:
    counts = {name: len(record.read().circles) for name, record in mias.items()}
    assert counts == {"mdb001": 1, "mdb002": 0, "mdb003": 0, "mdb004": 2}
    for record in mias.values():
        seen = record.read()
        assert (seen.spacing_mm, seen.max_value, seen.pixels.dtype) == (0.2, 255, np.uint8)
        for circle in seen.circles:
            assert_bright(seen.pixels, circle.x, circle.y, circle.radius)


def assert_bright(pixels: NDArray[np.uint8] | NDArray[np.uint16], x: float, y: float, radius: float) -> None:
    """Bright all over the circle, and no brighter than the breast in a ring around it."""
    rows, columns = np.indices(pixels.shape)
    distance = np.hypot(columns - x, rows - y)
    assert (pixels[distance <= radius] == 250).all()
    assert (pixels[(distance > radius) & (distance < radius + 6)] == 120).all()


def test_mias_circles_follow_crop_and_flip_into_the_stored_sample(mias_files: Path, tmp_path: Path) -> None:
    """mdb001 is drawn with its chest wall left, mdb003 right: both are stored with it on the left."""
    ingest(read_archive("mias", mias_files), tmp_path / "set", SECRET, workers=1)
    shards = ShardDataset(tmp_path / "set")
    samples = [shards[i] for i in range(4)]
    assert [sample.meta["geometry"]["flipped"] for sample in samples] == [False, False, True, False]
    assert all(sample.pixels.shape != (SIDE, SIDE) for sample in samples)
    circles = [(sample, circle) for sample in samples for circle in sample.meta["circles"]]
    assert len(circles) == 3
    for sample, circle in circles:
        assert_bright(sample.pixels, circle["x"], circle["y"], circle["radius"])


def test_mias_circles_follow_a_flip(tmp_path: Path) -> None:
    (tmp_path / "mdb007.pgm").write_bytes(b"P5 1024 1024 255\n" + film([(800, 700, 25)], "right").tobytes())
    (tmp_path / "README").write_text("mdb007 G CIRC B 800 700 25")
    ingest(read_archive("mias", tmp_path), tmp_path / "set", SECRET, workers=1)
    sample = ShardDataset(tmp_path / "set")[0]
    (circle,) = sample.meta["circles"]
    assert sample.meta["geometry"]["flipped"]
    assert_bright(sample.pixels, circle["x"], circle["y"], circle["radius"])


def test_mias_without_films_or_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Info.txt").write_text(TABLE)
    with pytest.raises(UserError, match=r"mdbNNN\.pgm"):
        read_archive("mias", tmp_path)
    (tmp_path / "Info.txt").write_text("no table here\n")
    (tmp_path / "mdb001.pgm").write_bytes(b"P5 1 1 255\n\0")
    with pytest.raises(UserError, match="no table"):
        read_archive("mias", tmp_path)


def test_mias_takes_no_label_file(mias_files: Path) -> None:
    with pytest.raises(UserError, match="--labels"):
        read_archive("mias", mias_files, mias_files / "Info.txt")


def test_a_mias_film_of_another_size_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "mdb001.pgm").write_bytes(b"P5 512 256 255\n" + bytes(512 * 256))
    (tmp_path / "Info.txt").write_text(TABLE)
    (record,) = read_archive("mias", tmp_path).records
    with pytest.raises(UnreadableImage, match="512 x 256"):
        record.read()


def test_mias_film_names_may_be_upper_case(tmp_path: Path) -> None:
    (tmp_path / "MDB001.PGM").write_bytes(b"P5 1 1 255\n\0")
    (tmp_path / "INFO.TXT").write_text(TABLE)
    assert len(read_archive("mias", tmp_path).records) == 1


# ---------------------------------------------------------------------------------------------- folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.png and b.png below one/, a.png below two/; a file that is no image, and a hidden one."""
    src = tmp_path / "src"
    for i, name in enumerate(("one/a.png", "one/b.png", "two/a.png")):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(src / name)
    (src / "notes.doc").write_text("text")
    (src / "one" / "._a.png").write_text("a fork of a resource")
    return src


def table(images: Path, text: str, encoding: str = "utf-8") -> Archive:
    """The folder read with a label file of that text."""
    file = images.parent / "labels.csv"
    file.write_text(text, encoding=encoding)
    return read_archive("folder", images, file)


def test_a_folder_without_a_table_is_all_its_images_each_a_patient(images: Path) -> None:
    archive = read_archive("folder", images)
    assert [record.name for record in archive.records] == ["one/a.png", "one/b.png", "two/a.png"]
    assert [int(record.read().pixels[0, 0]) for record in archive.records] == [0, 1, 2]
    assert len({record.patient_id for record in archive.records}) == 3
    assert any("no patient" in note for note in archive.notes)


@pytest.mark.parametrize("name", ["one/b.png", "one/b", "b.png", "b"])
def test_a_row_names_its_image_by_path_or_name_with_or_without_suffix(images: Path, name: str) -> None:
    archive = table(images, f"file,patient\n{name},p\n")
    assert [record.name for record in archive.records] == ["one/b.png"]
    assert int(archive.records[0].read().pixels[0, 0]) == 1
    assert archive.notes == ("2 images are not in the label file and were left out",)


def test_known_columns_describe_and_others_are_labels(images: Path) -> None:
    text = "file,patient,exam,laterality,view,split,spacing_mm,mass,note\none/a, p1 ,e,left,mlo,test,0.07,1,\n"
    (record,) = table(images, text).records
    assert (record.patient_id, record.exam_id, record.laterality, record.view) == ("p1", "e", "L", "MLO")
    assert (record.split, record.labels, record.read().spacing_mm) == ("test", {"mass": "1"}, 0.07)


def test_a_byte_order_mark_is_no_part_of_the_header(images: Path) -> None:
    assert table(images, "file,patient\nb,p\n", encoding="utf-8-sig").records[0].patient_id == "p"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("file\na.png\n", r"several images"),
        ("file\na\n", r"several images"),
        ("file\nc.png\n", r"'c\.png'.*no image"),
        ("file\nb.png\none/b.png\n", r"twice"),
        ("image,patient\nb.png,p\n", r"column `file`"),
        ("file,patient\n", r"column `file`"),
        ("", r"column `file`"),
        ("file,spacing_mm\nb,thick\n", r"one/b\.png.*'thick'"),
        ('file,spacing_mm\nb,"0,1"\n', r"'0,1'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(images: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        table(images, text)


@pytest.mark.parametrize("spacing", ["nan", "inf", "0", "-0.1"])
def test_a_spacing_that_is_no_length_is_refused(images: Path, spacing: str) -> None:
    with pytest.raises(UserError, match="spacing"):
        table(images, f"file,spacing_mm\nb,{spacing}\n")


def test_a_full_path_wins_over_a_name_deeper_down(images: Path) -> None:
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(images / "b.png")
    assert table(images, "file\nb.png\none/b.png\n").records[0].name == "b.png"


@pytest.mark.parametrize("header", ["Patient", "PATIENT"])
def test_a_header_in_capitals_gives_no_patient_away(images: Path, header: str) -> None:
    records = table(images, f"file,{header}\nb,Jane Doe\n").records
    assert all("Jane Doe" not in record.labels.values() for record in records)


def test_a_label_file_that_is_missing_or_no_text_is_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv"):
        read_archive("folder", images, images / "absent.csv")
    with pytest.raises(UserError, match=r"a\.png"):
        read_archive("folder", images, images / "one" / "a.png")


def test_16_bit_files_of_a_folder_keep_every_level_in_the_shards(tmp_path: Path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "src").mkdir()
    Image.fromarray(levels).save(tmp_path / "src" / "levels.png")
    archive = read_archive("folder", tmp_path / "src")
    ingest(Archive(dataset="d", licence="", records=archive.records, breast=False), tmp_path / "set", SECRET, workers=1)
    stored = ShardDataset(tmp_path / "set")[0]
    np.testing.assert_array_equal(stored.pixels, levels)
    assert (stored.max_value, stored.meta["bits"]) == (65535, 16)


# ---------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("source", ["folder", "mias"])
def test_a_folder_that_is_missing_or_empty_is_refused_by_name(tmp_path: Path, source: str) -> None:
    for src in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=str(src)):
            read_archive(source, src)


def test_an_unknown_source_is_met_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'mias'"):
        read_archive("mais", tmp_path)
