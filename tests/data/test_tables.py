"""Tables of archives: columns, cells that say nothing, files that are not there, boxes at the frame's edge."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miram.data.dicom.reader import DicomOptions
from miram.data.image import UnreadableImage
from miram.data.record import Box
from miram.data.sources.tables import (
    clip,
    each_row,
    find_image,
    find_table,
    given,
    known,
    left_out,
    number,
    numbered_density,
    read_csv,
    read_with_boxes,
    whole,
)
from miram.engine.errors import UserError


def write(folder: Path, content: bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(content)
    return path


def test_a_table_gives_the_columns_asked_for_stripped(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf id , name,unused\r\n 1,"a, b\nc ",x\r\n\r\n2\r\n')
    assert read_csv(path, ("name", "id")) == [{"name": "a, b\nc", "id": "1"}, {"name": "", "id": "2"}]


def test_a_table_may_have_another_delimiter_and_lack_optional_columns(tmp_path: Path) -> None:
    path = write(tmp_path, b"a;b\n1;2,5\n")
    assert read_csv(path, ("b",), ";", optional=("a", "c")) == [{"b": "2,5", "a": "1", "c": ""}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"id,age\n1,2\n", r"table\.csv lacks the columns name, sex"),
        (b"", "lacks the columns"),
        (b"id,name,sex\n", "no rows"),
        (b"id,name,sex\n\xff\xfe,1,2\n", "cannot be read"),
        (b"id,name,sex\n" + b"x" * 200_000 + b",1,2\n", "cannot be read"),
    ],
)
def test_a_bad_table_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_csv(write(tmp_path, content), ("id", "name", "sex"))


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    rows = each_row(write(tmp_path, b"id\n1\n2\n"), ("id",))
    assert next(rows) == {"id": "1"}
    assert next(rows) == {"id": "2"}


def test_a_table_is_found_in_the_archive_its_folder_or_where_labels_say(tmp_path: Path) -> None:
    src, other = tmp_path / "src", tmp_path / "other"
    (src / "tables").mkdir(parents=True)
    other.mkdir()
    with pytest.raises(UserError, match=r"no table t\.csv.*--labels"):
        find_table("t.csv", src, None, below="tables")
    for path in (src / "tables" / "t.csv", other / "t.csv", other / "renamed.csv"):
        path.touch()
    assert find_table("t.csv", src, None, below="tables") == src / "tables" / "t.csv"
    assert find_table("t.csv", src, other, below="tables") == other / "t.csv"
    assert find_table("t.csv", src, other / "renamed.csv") == other / "t.csv"
    assert find_table("t.csv", src, other / "renamed.csv", alone=True) == other / "renamed.csv"


def test_cells_that_say_nothing() -> None:
    assert [known(cell) for cell in ("", "NaN", "removed", "None", "N", "B")] == ["", "", "", "", "N", "B"]
    assert [number(cell) for cell in ("1.5", "", "nan", "inf", "x")] == [1.5, None, None, None, None]
    cells = ("2", "2.0", "True", "false", "2.5", "", "nan", "1e999")
    assert [whole(cell) for cell in cells] == [2, 2, 1, 0, None, None, None, None]
    assert [numbered_density(cell) for cell in ("1", "2.0", "4", "5.0", "0", "")] == ["A", "B", "D", "", "", ""]
    assert given(a=0, b="", c=None, d="x") == {"a": 0, "d": "x"}


def test_an_image_is_found_by_its_first_suffix_and_only_below_the_folder(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for path in (tmp_path / "secret.png", src / "1.2.3.png", src / "1.2.3.dcm"):
        path.touch()
    assert find_image(src, "1.2.3", (".dcm", ".png")) == src / "1.2.3.dcm"
    assert find_image(src, "1.2.3", (".dicom", ".png")) == src / "1.2.3.png"
    (src / "4.DCM").touch()
    (src / "5.PNG").touch()
    assert find_image(src, "4", (".dicom", ".dcm")) == src / "4.DCM"
    assert find_image(src, "5", (".dcm", ".png")) == src / "5.PNG"
    names = ["1.2", "", "../secret", f"{tmp_path}/secret", "a\0b", "x" * 5000, "x/" * 5000]
    assert [find_image(src, name, (".png",)) for name in names] == [None] * len(names)


def test_reasons_are_counted() -> None:
    assert left_out(Counter({"lost": 1, "broken": 2})) == ("1 image left out: lost", "2 images left out: broken")


def test_boxes_are_cut_at_the_frame_and_dropped_outside_of_it() -> None:
    boxes = [
        Box(left=-3, top=2.5, right=30, bottom=4, label="a"),
        Box(left=20, top=0, right=25, bottom=5),
        Box(left=5, top=5, right=4, bottom=6),
        Box(left=5, top=5, right=5, bottom=5),
    ]
    assert clip(boxes, height=10, width=20) == (
        Box(left=0, top=2.5, right=19, bottom=4, label="a"),
        Box(left=5, top=5, right=5, bottom=5),
    )


def test_boxes_drawn_on_another_size_make_an_image_unusable(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(path)
    boxes = (Box(left=1, top=2, right=3, bottom=4),)
    assert read_with_boxes(path, DicomOptions(), boxes, (10, 20)).boxes == boxes
    assert read_with_boxes(path, DicomOptions(), (), (40, 80)).boxes == ()
    with pytest.raises(UnreadableImage, match="20 x 10 pixels, and its boxes were drawn on 80 x 40"):
        read_with_boxes(path, DicomOptions(), boxes, (40, 80))
