"""Folders of images: what the table says of them, which masks are theirs, and what is refused."""

from __future__ import annotations

import csv
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import write_dicom
from numpy.typing import NDArray
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.image import UnreadableImage
from miram.data.ingest import ingest
from miram.data.record import Film
from miram.data.shards import ShardDataset
from miram.data.sources import read_archive
from miram.data.sources.masks import read_mask
from miram.engine.errors import UserError
from miram.engine.track import Meter

SECRET = b"sixteen bytes or more"


# ---------------------------------------------------------------------------------------------- the table


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
    return read_archive("folder", images, SourceOptions(labels=file))


def test_a_folder_without_a_table_is_all_its_images_each_a_patient(images: Path) -> None:
    archive = read_archive("folder", images)
    assert [record.name for record in archive.records] == ["one/a.png", "one/b.png", "two/a.png"]
    assert [int(record.read().pixels[0, 0]) for record in archive.records] == [0, 1, 2]
    assert len({record.patient_id for record in archive.records}) == 3
    assert any("no patient" in note for note in archive.notes)


@pytest.mark.parametrize("name", ["one/b.png", "one/b", "b.png", "b", "one\\b.png"])
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
        ("file,view\nb,SMITH\n", r"one/b\.png a `view`"),
        ('file,split\nb,"Smith, Anna"\n', r"one/b\.png a `split`"),
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
    with pytest.raises(UserError, match=r"absent\.csv is not there"):
        read_archive("folder", images, SourceOptions(labels=images / "absent.csv"))
    with pytest.raises(UserError, match=r"a\.png"):
        read_archive("folder", images, SourceOptions(labels=images / "one" / "a.png"))


def test_16_bit_files_of_a_folder_keep_every_level_in_the_shards(tmp_path: Path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "src").mkdir()
    Image.fromarray(levels).save(tmp_path / "src" / "levels.png")
    archive = read_archive("folder", tmp_path / "src")
    ingest(Archive(dataset="d", licence="", records=archive.records, breast=False), tmp_path / "set", SECRET, workers=1)
    stored = ShardDataset(tmp_path / "set")[0]
    np.testing.assert_array_equal(stored.pixels, levels)
    assert (stored.max_value, stored.meta["bits"]) == (65535, 16)


# ---------------------------------------------------------------------------------------------- hostile tables


def raw_table(images: Path, content: bytes) -> Archive:
    """The folder read with a label file of these bytes."""
    file = images.parent / "labels.csv"
    file.write_bytes(content)
    return read_archive("folder", images, SourceOptions(labels=file))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("file,mass\nb,1\n".encode("utf-16"), "UTF-8"),
        ("file,mass\nb,1\n".encode("utf-16-le"), "control character in line 1"),
        ("file,mass\nb,bösartig\n".encode("latin-1"), "UTF-8"),
        (b"file,mass\nb,1\0\n", "control character in line 2"),
        (b"file,mass\nb\n", "line 2 .1 fields where the header has 2"),
        (b"file,mass\nb,1,2\n", "line 2 .3 fields"),
        (b'file,mass\nb,"1\n', "no CSV in line 2"),
        (b'file,mass\nb,"1"2\n', "no CSV in line 2"),
        (b"file,mass\nb," + b"1" * 200_000 + b"\n", "no CSV in line 2"),
        (b"file,mass\nb," + b"1" * 1000 + b"\n", "1000 characters"),
        (b"file,mass,mass\nb,1,1\n", "two columns 'mass'"),
        (b"file,File\nb,b\n", "two columns 'file'"),
        (b"file;mass\nb;1\n", "commas between columns"),
        (b"image,mass\nb,1\n", "call 'image' so"),
        (b'file,"ma\nss"\nb,1\n', "no name for a label"),
        (b"file," + b"m" * 101 + b"\nb,1\n", "no name for a label"),
    ],
)
def test_a_table_that_is_no_plain_csv_is_refused_in_one_sentence(images: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        raw_table(images, content)
    assert len(str(caught.value)) < 400


def test_blank_rows_and_columns_without_a_name_mean_nothing(images: Path) -> None:
    """A spreadsheet leaves blank rows, pandas a column of row numbers."""
    (record,) = raw_table(images, b",file,mass,\r\n0,b,1,\r\n,,,\r\n\r\n").records
    assert (record.name, record.labels) == ("one/b.png", {"mass": "1"})


def test_mutated_tables_are_read_or_refused(images: Path) -> None:
    """Fixed seed; anything but our own exception fails the test."""
    rng, refused = random.Random(0), 0
    sound = b"file,patient,exam,laterality,view,split,spacing_mm,bits,mass,note\r\n"
    sound += b'one/a,p1,e1,L,MLO,train,0.07,8,1,"a ""round"" one"\r\none/b,p2,,right,cc,test,,,0,\r\n'
    for _ in range(1000):
        data = bytearray(sound)
        for _ in range(rng.choice([1, 2, 8])):
            place = rng.randrange(len(data))
            kind = rng.randrange(3)
            if kind == 0:
                data[place] = rng.choice([0, 10, 13, 34, 44, 0xFF, 0xC3, rng.randrange(256)])
            elif kind == 1:
                data[place:place] = rng.choice([b'"', b",", b"\n", b"\0", b"\xef\xbb\xbf", b"9" * 50, rng.randbytes(4)])
            else:
                del data[place : place + rng.choice([1, 5, 60])]
                data = data or bytearray(b"x")
        try:
            archive = raw_table(images, bytes(data))
        except UserError:
            refused += 1
        else:
            assert all(isinstance(record.name, str) for record in archive.records)
    assert 300 < refused < 1000


# ---------------------------------------------------------------------------------------------- what identifies


@pytest.mark.parametrize(
    "column", ["Patient Name", "patient_id", "DOB", "birth date", "MRN", "StudyInstance_UID", "e-mail", "home_address"]
)
def test_a_column_whose_name_identifies_is_refused(images: Path, column: str) -> None:
    with pytest.raises(UserError, match=column):
        table(images, f"file,{column}\nb,x\n")


@pytest.mark.parametrize(
    "value",
    [
        *("2019-04-12", "12.04.2019", "4/12/19", "20190412", "seen 2019-4-2 again", "12 Apr 2019", "April 12, 2019"),
        *("1.2.840.113619.2.55", "jane@example.org", "Doe^Jane"),
    ],
)
@pytest.mark.parametrize("column", ["note", "view", "split"])
def test_a_value_that_identifies_is_refused_and_not_repeated(images: Path, column: str, value: str) -> None:
    with pytest.raises(UserError, match=f"'{column}'") as caught:
        table(images, f'file,{column}\nb,"{value}"\n')
    assert value not in str(caught.value)


@pytest.mark.parametrize("value", ["4a", "0.09882", "BI-RADS 4", "2-3-1", "1.5", "50-59", "12345678", "3/4", "may 5"])
def test_an_ordinary_value_is_a_label(images: Path, value: str) -> None:
    assert table(images, f"file,note\nb,{value}\n").records[0].labels == {"note": value}


def numbered(folder: Path, count: int) -> Path:
    """A folder of images called P100_L.png and so on."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(folder / f"P{100 + i}_L.png")
    return folder


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        (lambda i: f"masks/P{100 + i}_L.png", "repeats the names of the files"),
        (lambda i: f"p{i}", "repeats the patient"),
        (lambda i: f"case {i * i}", "differs in every row"),
        (lambda i: str(7340021 + i * i), "differs in every row"),
    ],
)
def test_a_column_that_repeats_an_id_is_refused(tmp_path: Path, cell: Any, complaint: str) -> None:
    src = numbered(tmp_path / "src", 20)
    rows = "".join(f"P{100 + i}_L,p{i},{cell(i)}\n" for i in range(20))
    with pytest.raises(UserError, match=f"'origin'.*{complaint}"):
        table(src, "file,patient,origin\n" + rows)


@pytest.mark.parametrize(
    "cell", [lambda i: f"{i / 7:.3f}", lambda i: str(i), lambda i: "AB"[i % 2], lambda i: f"{i % 15}x"]
)
def test_measures_and_classes_may_differ_or_repeat(tmp_path: Path, cell: Any) -> None:
    src = numbered(tmp_path / "src", 20)
    rows = "".join(f"P{100 + i}_L,p{i},{cell(i)}\n" for i in range(20))
    assert len(table(src, "file,patient,origin\n" + rows).records) == 20


# ---------------------------------------------------------------------------------------------- what columns say


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("L", "L"),
        ("r", "R"),
        ("Left", "L"),
        ("links", "L"),
        ("RECHTS", "R"),
        ("droite", "R"),
        ("derecha", "R"),
        ("", ""),
    ],
)
def test_a_side_in_some_languages_is_understood(images: Path, text: str, side: str) -> None:
    assert table(images, f"file,laterality,mass\nb,{text},1\n").records[0].laterality == side


@pytest.mark.parametrize("text", ["both", "1", "rl", "lateral"])
def test_another_side_is_refused_with_its_row(images: Path, text: str) -> None:
    with pytest.raises(UserError, match=rf"one/b\.png the laterality '{text}'"):
        table(images, f"file,laterality\nb,{text}\n")


def test_odd_splits_are_counted_for_the_user_and_kept(images: Path) -> None:
    archive = table(images, "file,patient,split\none/a,p,train\nb,q,tset\ntwo/a,r,train\n")
    assert [record.split for record in archive.records] == ["train", "tset", "train"]
    assert archive.notes == ("the splits are called train (2), tset (1): correct the table if one is misspelt",)
    assert table(images, "file,patient,split\none/a,p,train\nb,q,test\ntwo/a,r,\n").notes == ()


def deep(folder: Path, largest: int, count: int = 3) -> Path:
    """16-bit PNGs that reach up to `largest`."""
    folder.mkdir()
    for i in range(count):
        levels = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(levels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("cells", "bits"), [("12,", 12), (",4095", 12), ("14,16383", 14), (",", 16)])
def test_the_range_of_an_image_is_what_the_table_says(tmp_path: Path, cells: str, bits: int) -> None:
    src = deep(tmp_path / "src", 4000)
    film = table(src, f"file,patient,bits,max_value\n0,p,{cells}\n").records[0].read()
    assert (film.max_value, film.pixels.max()) == (2**bits - 1, 4000)


@pytest.mark.parametrize("cells", ["17,", "0,", "-1,", "1e3,", "12.0,", ",4096", ",4000", "12,1023", "²,"])
def test_a_range_that_is_none_is_refused(tmp_path: Path, cells: str) -> None:
    src = deep(tmp_path / "src", 4000)
    with pytest.raises(UserError, match=r"0\.png bits"):
        table(src, f"file,bits,max_value\n0,{cells}\n")


def test_pixels_beyond_their_range_make_an_image_unreadable(tmp_path: Path) -> None:
    src = deep(tmp_path / "src", 4000)
    with pytest.raises(UnreadableImage, match="it holds 4000, and the table ends at 1023"):
        table(src, "file,bits\n0,10\n").records[0].read()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(src / "0.png")
    with pytest.raises(UnreadableImage, match="ends at 255, and the table says 4095"):
        table(src, "file,bits\n0,12\n").records[0].read()


def test_another_range_is_another_data_set(tmp_path: Path) -> None:
    src = deep(tmp_path / "src", 900)
    stamps = {table(src, f"file,bits\n0,{bits}\n").records[0].stamp for bits in ("", "12", "14")}
    assert len(stamps) == 3


@pytest.mark.parametrize(("largest", "bits"), [(900, 10), (4095, 12), (4096, 14), (16383, 14)])
def test_a_folder_of_fewer_bits_than_its_files_have_room_for_is_noticed(
    tmp_path: Path, largest: int, bits: int
) -> None:
    src = deep(tmp_path / "src", largest, count=40)
    (note,) = (note for note in read_archive("folder", src).notes if "16 bits" in note)
    assert f"`bits` ({bits})" in note
    assert int(note.split(" images")[0].split()[-1]) <= 16


def test_a_folder_that_uses_its_bits_or_says_them_is_left_alone(tmp_path: Path, images: Path) -> None:
    full = deep(tmp_path / "full", 20_000)
    told = deep(tmp_path / "told", 4000)
    rows = "".join(f"{i},p{i},12\n" for i in range(3))
    for archive in (
        read_archive("folder", full),
        table(told, "file,patient,bits\n" + rows),
        read_archive("folder", images),
    ):
        assert not any("bits" in note for note in archive.notes)


def test_what_systems_leave_behind_is_no_image(images: Path) -> None:
    for place in ("__MACOSX/a.png", ".thumbnails/b.png"):
        (images / place).parent.mkdir()
        (images / place).write_bytes(b"")
    (images / "folder.png").mkdir()
    assert len(read_archive("folder", images).records) == 3


def test_a_name_that_is_no_text_is_refused(images: Path) -> None:
    (Path(str(images)) / "b\udcff.png").write_bytes(b"")
    with pytest.raises(UserError, match="no UTF-8"):
        read_archive("folder", images)


# ---------------------------------------------------------------------------------------------- masks: whose they are

BLACK = np.zeros((24, 32), np.uint8)


def disc(x: int, y: int, radius: int) -> NDArray[np.bool_]:
    rows, columns = np.indices(BLACK.shape)
    return np.hypot(rows - y, columns - x) <= radius


ONE, OTHER = disc(8, 10, 4), disc(22, 12, 6)


def put(path: Path, array: NDArray[Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def masked(src: Path, masks: Path, **options: Any) -> Archive:
    return read_archive("folder", src, SourceOptions(masks=masks, **options))


def films(archive: Archive) -> dict[str, Film]:
    """Read as a worker does: the reader crosses a process's border."""
    return {record.name: pickle.loads(pickle.dumps(record.read))() for record in archive.records}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "film.7.png",
            "film.7.tif",
            "film.7_mask.png",
            "film.7-Mask.png",
            "film.7_seg.png",
            "film.7_segmentation.png",
        ),
        *(
            "film.7_LI.png",
            "film.7 lesion.png",
            "film.7_annotation.png",
            "film.7_groundtruth.png",
            "film.7_ground_truth.png",
        ),
        *("mask_film.7.png", "seg-film.7.png", "film.7_mask_1.png", "deeper/down/film.7_mask.png"),
    ],
)
def test_a_mask_is_called_like_its_image(tmp_path: Path, name: str) -> None:
    put(tmp_path / "src" / "film.7.png", BLACK)
    put(tmp_path / "masks" / name, 255 * ONE.astype(np.uint8))
    (film,) = films(masked(tmp_path / "src", tmp_path / "masks")).values()
    np.testing.assert_array_equal(film.mask, ONE)
    assert film.mask_kind == "instances"


@pytest.mark.parametrize("name", ["film.7_image.png", "film.7-img.png", "image_film.7.png"])
def test_an_image_may_say_that_it_is_one(tmp_path: Path, name: str) -> None:
    put(tmp_path / "src" / name, BLACK)
    put(tmp_path / "masks" / "film.7_mask.png", 255 * ONE.astype(np.uint8))
    assert films(masked(tmp_path / "src", tmp_path / "masks"))[name].mask is not None


@pytest.mark.parametrize(
    "name", ["film.8.png", "film.7_R.png", "film.7_CC_mask.png", "film.7_2.png", "film.77.png", "film_mask.png"]
)
def test_the_mask_of_another_image_is_not_taken(tmp_path: Path, name: str) -> None:
    put(tmp_path / "src" / "film.7.png", BLACK)
    put(tmp_path / "src" / "plain.png", BLACK)
    put(tmp_path / "masks" / "plain.png", BLACK)
    put(tmp_path / "masks" / name, 255 * ONE.astype(np.uint8))
    archive = masked(tmp_path / "src", tmp_path / "masks")
    assert films(archive)["film.7.png"].mask is None
    assert "1 images have no mask" in archive.notes
    assert f"1 masks belong to no image, such as {name}" in archive.notes


def test_the_longest_name_wins(tmp_path: Path) -> None:
    for name in ("P1.png", "P1_2.png"):
        put(tmp_path / "src" / name, BLACK)
    put(tmp_path / "masks" / "P1_2_mask.png", 255 * ONE.astype(np.uint8))
    found = films(masked(tmp_path / "src", tmp_path / "masks"))
    assert (found["P1.png"].mask is None, found["P1_2.png"].mask is None) == (True, False)


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for place, part in (("one", ONE), ("two", OTHER)):
        put(tmp_path / "src" / place / "a.png", BLACK)
        put(tmp_path / "masks" / place / "a_mask.png", 255 * part.astype(np.uint8))
    found = films(masked(tmp_path / "src", tmp_path / "masks"))
    np.testing.assert_array_equal(found["one/a.png"].mask, ONE)
    np.testing.assert_array_equal(found["two/a.png"].mask, OTHER)
    (tmp_path / "masks" / "one" / "a_mask.png").rename(tmp_path / "masks" / "a_mask.png")
    with pytest.raises(UserError, match="fits 2 images"):
        masked(tmp_path / "src", tmp_path / "masks")


def test_masks_below_the_images_are_no_images(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", BLACK)
    put(tmp_path / "masks" / "a.png", 255 * ONE.astype(np.uint8))
    archive = masked(tmp_path, tmp_path / "masks")
    assert [record.name for record in archive.records] == ["images/a.png"]
    assert films(archive)["images/a.png"].mask is not None


@pytest.mark.parametrize("place", ["", "masks"])
def test_masks_among_the_images_are_found_by_their_names(tmp_path: Path, place: str) -> None:
    for name in ("a (1)", "a (2)", "a (10)"):
        put(tmp_path / f"{name}.png", BLACK)
    for name, part in (("a (1)_mask", ONE), ("a (1)_mask_1", OTHER), ("a (2)_mask", OTHER)):
        put(tmp_path / place / f"{name}.png", 255 * part.astype(np.uint8))
    archive = masked(tmp_path, tmp_path)
    assert [record.name for record in archive.records] == ["a (1).png", "a (10).png", "a (2).png"]
    found = films(archive)
    np.testing.assert_array_equal(found["a (1).png"].mask, ONE + 2 * OTHER)
    np.testing.assert_array_equal(found["a (2).png"].mask, OTHER)
    assert found["a (10).png"].mask is None


def test_files_that_look_like_masks_are_pointed_at(tmp_path: Path) -> None:
    put(tmp_path / "a.png", BLACK)
    put(tmp_path / "a_mask.png", BLACK)
    assert any("1 images are called like masks" in note for note in read_archive("folder", tmp_path).notes)


def test_words_of_their_own_name_findings(tmp_path: Path) -> None:
    """As the NYU samples do."""
    for name in ("0_R-CC", "0_L-CC"):
        put(tmp_path / "src" / f"{name}.png", BLACK)
    put(tmp_path / "masks" / "0_R-CC_benign.png", 255 * ONE.astype(np.uint8))
    put(tmp_path / "masks" / "0_R-CC_malignant.png", 255 * OTHER.astype(np.uint8))
    archive = masked(tmp_path / "src", tmp_path / "masks")
    labels = {record.name: dict(record.labels) for record in archive.records}
    assert labels == {"0_L-CC.png": {}, "0_R-CC.png": {"finding": "benign+malignant"}}
    np.testing.assert_array_equal(films(archive)["0_R-CC.png"].mask, ONE + 2 * OTHER)
    assert any("benign (1), malignant (1)" in note for note in archive.notes)


def test_words_that_are_no_findings_are_dropped_and_their_masks_kept(tmp_path: Path) -> None:
    for name in ("f0", "f1", "f2"):
        put(tmp_path / "src" / f"{name}.png", BLACK)
    for name in ("f0_SMITH", "f1_Malignant_Anna", "f2_Architectural-Distortion"):
        put(tmp_path / "masks" / f"{name}.png", 255 * ONE.astype(np.uint8))
    archive = masked(tmp_path / "src", tmp_path / "masks")
    assert [dict(record.labels) for record in archive.records] == [
        {},
        {"finding": "malignant"},
        {"finding": "architectural distortion"},
    ]
    assert all(film.mask is not None and film.mask.any() for film in films(archive).values())
    assert any(note.startswith("the names of 2 masks hold words that are no known findings") for note in archive.notes)
    assert not any(word in " ".join(archive.notes).lower() for word in ("smith", "anna"))


def test_masks_that_fit_nothing_or_are_not_there_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a.png", BLACK)
    put(tmp_path / "masks" / "b.png", BLACK)
    with pytest.raises(UserError, match="no mask in"):
        masked(tmp_path / "src", tmp_path / "masks")
    with pytest.raises(UserError, match="absent"):
        masked(tmp_path / "src", tmp_path / "absent")
    with pytest.raises(UserError, match="--masks"):
        read_archive("folder", tmp_path / "src", SourceOptions(mask_kind="classes"))


def test_a_mask_of_another_size_is_said_with_both_sizes(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a.png", BLACK)
    put(tmp_path / "masks" / "a.png", BLACK[:20])
    (record,) = masked(tmp_path / "src", tmp_path / "masks").records
    with pytest.raises(UnreadableImage, match="its mask has 32 x 20 pixels, the image 32 x 24"):
        record.read()


def test_a_replaced_mask_changes_the_stamp(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a.png", BLACK)
    mask = put(tmp_path / "masks" / "a.png", BLACK)
    before = masked(tmp_path / "src", tmp_path / "masks").records[0].stamp
    put(mask, np.random.default_rng(0).integers(0, 2, BLACK.shape, np.uint8))
    assert masked(tmp_path / "src", tmp_path / "masks").records[0].stamp != before


# ---------------------------------------------------------------------------------------------- masks: what they hold


@pytest.mark.parametrize("value", [1, 7, 128, 255])
def test_two_values_are_one_finding(tmp_path: Path, value: int) -> None:
    np.testing.assert_array_equal(read_mask(put(tmp_path / "m.png", ONE * np.uint8(value)), "instances"), ONE)


@pytest.mark.parametrize("array", [ONE, ONE.astype(np.uint16) * 65535], ids=["bilevel", "16 bits"])
def test_other_depths_are_one_finding(tmp_path: Path, array: NDArray[Any]) -> None:
    np.testing.assert_array_equal(read_mask(put(tmp_path / "m.png", array), "instances"), ONE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_gray_stored_as_colour_is_one_finding(tmp_path: Path, mode: str) -> None:
    Image.fromarray(255 * ONE.astype(np.uint8)).convert(mode).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", "instances"), ONE)


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("resaved", [False, True], ids=["as JPEG", "saved again as PNG"])
def test_a_compressed_mask_is_cut_at_half(tmp_path: Path, quality: int, resaved: bool) -> None:
    """The ringing around edges has many values, none of which is a finding of its own."""
    large = np.roll(np.kron(ONE | OTHER, np.ones((8, 8), bool)), (3, 3), (0, 1))  # off the blocks of JPEG
    path = put(tmp_path / "m.jpg", 255 * large.astype(np.uint8), quality=quality)
    if resaved:
        path = put(tmp_path / "m.png", np.asarray(Image.open(path)))
    assert np.unique(np.asarray(Image.open(path))).size > 10
    mask = read_mask(path, "instances")
    assert np.unique(mask).tolist() == [0, 1]
    assert 2 * (mask & large).sum() / (mask.sum() + large.sum()) > 0.995


def test_a_smoothed_mask_is_cut_at_half(tmp_path: Path) -> None:
    large = np.roll(np.kron(ONE, np.ones((8, 8), np.uint8)), (2, 1), (0, 1)) * np.uint8(255)
    small = Image.fromarray(large).resize((64, 48), Image.Resampling.BOX)
    small.save(tmp_path / "m.png")
    assert np.unique(np.asarray(small)).size > 2
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", "instances"), np.asarray(small) > 127)


@pytest.mark.parametrize("values", [(1, 2), (1, 3), (3, 9), (100, 255), (128, 255), (255, 128)])
def test_several_values_number_findings_and_are_kept(tmp_path: Path, values: tuple[int, int]) -> None:
    numbers = (np.kron(ONE, np.ones((8, 8))) * values[0] + np.kron(OTHER, np.ones((8, 8))) * values[1]).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(put(tmp_path / "m.png", numbers), "instances"), numbers)


@pytest.mark.parametrize("kind", ["instances", "classes"])
def test_a_mask_without_findings_stays_empty(tmp_path: Path, kind: Any) -> None:
    assert not read_mask(put(tmp_path / "m.png", BLACK), kind).any()


def test_a_photograph_is_no_mask(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    with pytest.raises(UnreadableImage, match="grey levels"):
        read_mask(put(tmp_path / "m.png", noise), "instances")


def test_classes_are_kept_as_they_are(tmp_path: Path) -> None:
    classes = np.random.default_rng(0).choice(np.array([0, 64, 128, 192, 255], np.uint8), BLACK.shape)
    np.testing.assert_array_equal(read_mask(put(tmp_path / "m.png", classes), "classes"), classes)


def test_classes_in_a_palette_of_colours_are_its_numbers(tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 4, BLACK.shape, np.uint8)
    image = Image.fromarray(classes, "P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", "classes"), classes)


def test_masks_that_cannot_mean_classes_are_refused(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for path, complaint in (
        (put(tmp_path / "m.jpg", BLACK), "JPEG"),
        (put(tmp_path / "m.png", np.full((4, 4), 300, np.uint16)), "300"),
        (put(tmp_path / "colour.png", colours), "its mask: it is a colour image"),
    ):
        with pytest.raises(UnreadableImage, match=complaint):
            read_mask(path, "classes")


def test_several_files_are_numbered_through_and_the_smaller_stays_whole(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a.png", BLACK)
    large = disc(12, 12, 9)
    put(tmp_path / "masks" / "a_mask_1.png", 255 * ONE.astype(np.uint8))
    put(tmp_path / "masks" / "a_mask_2.png", 255 * large.astype(np.uint8))
    put(tmp_path / "masks" / "a_mask_10.png", 255 * disc(29, 20, 1).astype(np.uint8))
    mask = films(masked(tmp_path / "src", tmp_path / "masks"))["a.png"].mask
    expected = np.where(ONE, 1, np.where(large, 2, 0)) + 3 * disc(29, 20, 1)
    np.testing.assert_array_equal(mask, expected)


def test_several_files_of_classes_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a.png", BLACK)
    for i in range(2):
        put(tmp_path / "masks" / f"a_mask_{i}.png", BLACK)
    with pytest.raises(UserError, match=r"a\.png has 2 masks"):
        masked(tmp_path / "src", tmp_path / "masks", mask_kind="classes")


# ---------------------------------------------------------------------------------------------- colour


def test_photographs_keep_colour_and_their_masks(tmp_path: Path) -> None:
    """An image turned by its camera, with a mask drawn on what viewers show."""
    colours = np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    put(tmp_path / "src" / "a.png", colours, exif=exif)
    put(tmp_path / "masks" / "a_segmentation.png", 255 * ONE.astype(np.uint8))
    archive = masked(tmp_path / "src", tmp_path / "masks", channels=3)
    assert (archive.channels, archive.breast) == (3, False)
    film = films(archive)["a.png"]
    np.testing.assert_array_equal(film.pixels, np.rot90(colours, -1))
    np.testing.assert_array_equal(film.mask, ONE)


def test_colour_in_a_gray_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    put(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    archive = read_archive("folder", tmp_path)
    assert archive.channels == 1
    with pytest.raises(UnreadableImage, match="--channels 3"):
        archive.records[0].read()


# ---------------------------------------------------------------------------------------------- real sets

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="MIRAM_REAL_DATA names no folder")


def write_table(path: Path, rows: list[dict[str, str]], **columns: str) -> Path:
    """Some columns of a set's own table under our names."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[row[column] for column in columns.values()] for row in rows])
    return path


@real
def test_tissue_of_ddsm_is_kept_in_four_classes(tmp_path: Path) -> None:
    src = REAL / "ddsm_tissue_seg"
    rows = list(csv.DictReader((src / "labels.csv").open()))
    labels = write_table(tmp_path / "l.csv", rows, file="image", patient="ddsm_case", split="split")
    archive = masked(src, src, labels=labels, mask_kind="classes")
    assert any("test (2), train_valid (42)" in note for note in archive.notes)
    found = films(archive)
    assert len(found) == len(rows) == 44
    for row in rows:
        mask = found[row["image"]].mask
        assert np.unique(mask).tolist() == [64, 128, 192, 255]
        assert (
            abs((mask == 192).sum() / np.isin(mask, (128, 192)).sum() - float(row["fibroglandular_frac_of_breast"]))
            < 1e-3
        )


@real
def test_lesions_of_cesm_cover_what_its_table_says(tmp_path: Path) -> None:
    src = REAL / "cdd_cesm_seg512"
    rows = list(csv.DictReader((src / "labels.csv").open()))
    labels = write_table(
        tmp_path / "l.csv", rows, file="image", patient="patient", laterality="laterality", view="view"
    )
    found = films(masked(src, src / "masks", labels=labels))
    assert len(found) == len(rows) == 63
    assert all(np.unique(film.mask).tolist() == [0, 1] for film in found.values())
    assert max(abs(found[row["image"]].mask.mean() - float(row["lesion_frac"])) for row in rows) < 1e-4


@real
def test_the_range_of_nyu_is_noticed_and_its_masks_fit_another_frame() -> None:
    archive = masked(REAL / "nyu_gmic_samples" / "images", REAL / "nyu_gmic_samples" / "segmentation")
    assert any("`bits` (12)" in note for note in archive.notes)
    labels = {record.name: dict(record.labels) for record in archive.records}
    assert labels == {name: {"finding": "benign"} if "_R-" in name else {} for name in labels}
    for record in archive.records:
        if "_R-" in record.name:
            with pytest.raises(UnreadableImage, match="its mask has 1920 x 2944 pixels"):
                record.read()
        else:
            assert record.read().pixels.max() == 4095


@real
@pytest.mark.parametrize("name", ["ddsm_tissue_seg", "cdd_cesm_seg512"])
def test_their_own_tables_are_refused_for_the_names_they_repeat(tmp_path: Path, name: str) -> None:
    text = (REAL / name / "labels.csv").read_text()
    for header, complaint in (
        (text, "call 'image' so"),
        (text.replace(",image,", ",file,", 1), "'image_id'"),
        (
            text.replace(",image,", ",file,", 1).replace("image_id", "origin", 1).replace("ddsm_case", "patient", 1),
            "'origin'.*names of the",
        ),
    ):
        (tmp_path / "l.csv").write_text(header)
        with pytest.raises(UserError, match=complaint):
            read_archive("folder", REAL / name, SourceOptions(labels=tmp_path / "l.csv"))


def test_what_the_table_leaves_open_is_taken_from_dicom_headers(tmp_path: Path) -> None:
    pixels = np.full((600, 600), 7, np.uint16)
    for i, (patient, side) in enumerate((("A", "L"), ("A", "R"), ("B", "L"))):
        write_dicom(tmp_path / f"{i}.dcm", pixels, PatientID=patient, ImageLaterality=side, ViewPosition="CC")
    bare = read_archive("folder", tmp_path, SourceOptions())
    assert [(r.patient_id, r.laterality, r.view) for r in bare.records] == [
        ("A", "L", "CC"),
        ("A", "R", "CC"),
        ("B", "L", "CC"),
    ]
    assert not any("no patient" in note for note in bare.notes)
    (tmp_path / "labels.csv").write_text("file,patient,view\n0.dcm,mine,MLO\n1.dcm,,\n")
    named = read_archive("folder", tmp_path, SourceOptions(labels=tmp_path / "labels.csv"))
    assert [(r.patient_id, r.laterality, r.view) for r in named.records] == [("mine", "L", "MLO"), ("A", "R", "CC")]


def dicoms(folder: Path, patients: list[str]) -> Path:
    """A folder with a film of each of these patients, in that order."""
    folder.mkdir()
    for i, patient in enumerate(patients):
        write_dicom(folder / f"{i}.dcm", np.full((64, 64), i, np.uint16), PatientID=patient)
    return folder


@pytest.mark.parametrize("filler", ["anonymous", "ANON", "Anonymized", "removed", "unknown", "0", "None", "xxx", "N/A"])
def test_what_anonymisers_fill_in_is_no_patient(tmp_path: Path, filler: str) -> None:
    archive = read_archive("folder", dicoms(tmp_path / "src", [filler, filler, "A7", "A7"]))
    patients = [record.patient_id for record in archive.records]
    assert (len(set(patients)), patients[2:]) == (3, ["A7", "A7"])
    assert any(note.startswith("2 DICOM headers give") for note in archive.notes)
    assert any(note.startswith("2 images have no patient") for note in archive.notes)


@pytest.mark.parametrize(("count", "patients"), [(4, 1), (5, 5)])
def test_one_patient_for_more_images_than_an_exam_has_is_nobody(tmp_path: Path, count: int, patients: int) -> None:
    src = dicoms(tmp_path / "src", ["DDSM-7"] * count)
    archive = read_archive("folder", src)
    assert len({record.patient_id for record in archive.records}) == patients
    assert any(note.startswith("5 DICOM headers give") for note in archive.notes) is (count == 5)
    (tmp_path / "l.csv").write_text("file,patient\n" + "".join(f"{i},me\n" for i in range(count)))
    told = read_archive("folder", src, SourceOptions(labels=tmp_path / "l.csv"))
    assert ({record.patient_id for record in told.records}, told.notes) == ({"me"}, ())


def test_a_table_may_count_patients_from_0_and_leave_some_unknown(images: Path) -> None:
    archive = table(images, "file,patient\none/a,0\nb,0\ntwo/a,unknown\n")
    assert [record.patient_id for record in archive.records] == ["0", "0", "file:two/a.png"]


def test_reading_many_headers_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = dicoms(tmp_path / "src", ["A", "B", "C"])
    monkeypatch.setattr(Meter, "EVERY", 0.0)
    read_archive("folder", src)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("miram.data.sources.folder.MANY", 2)
    read_archive("folder", src)
    assert "headers: 3/3" in capsys.readouterr().err
