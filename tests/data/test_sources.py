"""Sources: archives as they lie on disk, quirks included, become the right records."""

from __future__ import annotations

import inspect
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from miram.data.archive import SourceOptions
from miram.data.image import UnreadableImage
from miram.data.ingest import ingest
from miram.data.record import Record
from miram.data.shards import ShardDataset
from miram.data.sources import SOURCES, read_archive
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


def test_mias_names_the_films_that_are_not_there_and_says_how_sides_are_known(mias_files: Path) -> None:
    archive = read_archive("mias", mias_files)
    assert archive.absent == ("mdb005.pgm",)
    assert any("markers" in note and "README" in note for note in archive.notes)


def test_mias_films_2k_minus_1_and_2k_are_one_patient(mias: dict[str, Record]) -> None:
    patients = [mias[f"mdb{n:03d}"].patient_id for n in range(1, 5)]
    assert patients[0] == patients[1] != patients[2] == patients[3]
    assert [mias[f"mdb{n:03d}"].laterality for n in range(1, 5)] == ["L", "R", "L", "R"]
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
        read_archive("mias", mias_files, SourceOptions(labels=mias_files / "Info.txt"))


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


# ---------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_says_how_it_is_called(source: str) -> None:
    """Each is imported when it is named, so only this finds one that is not there."""
    module = import_module(f"miram.data.sources.{SOURCES[source]}")
    assert list(inspect.signature(module.read).parameters) == ["src", "options"]
    assert "SRC/" in (module.__doc__ or "")


@pytest.mark.parametrize("source", SOURCES)
def test_a_folder_that_is_missing_or_empty_is_refused_by_name(tmp_path: Path, source: str) -> None:
    for src in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=str(src)):
            read_archive(source, src)


def test_an_unknown_source_is_met_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'mias'"):
        read_archive("mais", tmp_path)


def test_a_misspelt_folder_is_met_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "mammograms").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*/mammograms\?"):
        read_archive("folder", tmp_path / "mamograms")
    with pytest.raises(UserError, match="is not there; name"):
        read_archive("folder", tmp_path / "nothing alike")


def test_a_file_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        read_archive("folder", tmp_path / "archive.zip")


def test_an_option_that_a_source_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mias knows no --masks"):
        read_archive("mias", tmp_path, SourceOptions(masks=tmp_path))


def test_a_corrected_circle_makes_another_set(mias_files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mias_files, tmp_path / "films", copy_function=shutil.copy2)
    ingest(read_archive("mias", folder), tmp_path / "set", SECRET)
    (folder / "Info.txt").write_text(TABLE.replace(" 40", " 41", 1))
    assert TABLE.replace(" 40", " 41", 1) != TABLE
    with pytest.raises(UserError, match="another data set"):
        ingest(read_archive("mias", folder), tmp_path / "set", SECRET)
