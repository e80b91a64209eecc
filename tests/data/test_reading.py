"""Which files count as images, and which folders are walked: nothing may disappear without a word."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from miram.data.archive import SourceOptions
from miram.data.dicom.reader import DicomOptions
from miram.data.image import UnreadableImage
from miram.data.reading import is_image, read_file, walk_files
from miram.data.sources import read_archive
from miram.engine.errors import UserError

PIXELS = (np.arange(96 * 80).reshape(96, 80) % 4096).astype(np.uint16)
UID = "1.2.840.113619.2.55"


# ---------------------------------------------------------------------------------------------- what counts


@pytest.mark.parametrize("name", ["a.dcm", "A.DICOM", "a", "a.ima", "a.IMG", "a.dc3", "a.7", f"MG.{UID}.A5", "a.b c"])
def test_dicom_is_an_image_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    path = write_dicom(tmp_path / name, PIXELS)
    assert is_image(path)
    np.testing.assert_array_equal(read_file(path, DicomOptions()).pixels, PIXELS)
    assert [record.name for record in read_archive("folder", tmp_path).records] == [name]


@pytest.mark.parametrize("name", ["a", "a.jfif", f"{UID}.A5"])
@pytest.mark.parametrize("kind", ["png", "tiff", "jpeg"])
def test_so_is_a_picture(tmp_path: Path, name: str, kind: str) -> None:
    Image.fromarray((PIXELS >> 4).astype(np.uint8)).save(tmp_path / name, format=kind)
    assert is_image(tmp_path / name)
    assert read_file(tmp_path / name, DicomOptions()).pixels.shape == PIXELS.shape


@pytest.mark.parametrize("suffix", ["csv", "txt", "xml", "JSON", "xlsx", "pdf", "zip", "gz", "md", "html", "py", "npy"])
def test_what_is_called_otherwise_is_not_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_dicom(path, PIXELS)  # a name that says so plainly is believed
    assert not is_image(path)


@pytest.mark.parametrize("content", [b"", b"text\n", b"P5 is a name\n", b"BMI,age\n", bytes(300), b"<html></html>"])
def test_other_content_under_a_name_that_says_nothing_is_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.abc").write_bytes(content)
    assert not is_image(tmp_path / "a.abc")
    assert not is_image(tmp_path / "missing.abc")


BROKEN = [
    (b"", "empty"),
    (b"<!DOCTYPE html><html>Sign in to go on</html>", "no DICOM file"),
    (bytes(4000), "no DICOM file"),
    (bytes(128) + b"DICM", "it has|its"),
]


@pytest.mark.parametrize(("content", "reason"), BROKEN)
@pytest.mark.parametrize("name", ["a.dcm", "a.DCM", "a.dicom"])
def test_a_broken_dcm_is_listed_with_its_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    write_dicom(tmp_path / "sound.dcm", PIXELS)
    records = {record.name: record for record in read_archive("folder", tmp_path).records}
    assert sorted(records) == sorted([name, "sound.dcm"])
    with pytest.raises(UnreadableImage, match=reason) as caught:
        records[name].read()
    assert str(tmp_path) not in str(caught.value)


def test_a_picture_called_dcm_is_read(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.dcm", format="png")
    np.testing.assert_array_equal(read_file(tmp_path / "a.dcm", DicomOptions()).pixels, PIXELS)


# ---------------------------------------------------------------------------------------------- walking


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def walked(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in walk_files(folder)]


def test_files_come_sorted_without_hidden_ones(tmp_path: Path) -> None:
    names = ["b/c/2.png", "b/c/1.png", "b.png", "a/3", ".hidden", "a/.x/1.png", "__MACOSX/a.png", "a/._3"]
    touch(*(tmp_path / name for name in names))
    (tmp_path / "empty").mkdir()
    for link, target in (("gone", "nowhere"), ("loop", "a/loop"), ("b.png", "b.png")):
        (tmp_path / "a" / link).symlink_to(tmp_path / target)
    expected = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    plain = [path for path in expected if not any(part[0] in "._" for part in path.relative_to(tmp_path).parts)]
    assert list(walk_files(tmp_path)) == plain
    assert len(plain) == 5


def test_a_folder_that_is_itself_hidden_or_a_link_is_walked(tmp_path: Path) -> None:
    touch(tmp_path / ".cache" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / ".cache")
    assert walked(tmp_path / ".cache") == walked(tmp_path / "link") == ["a.png"]


def test_linked_folders_are_entered_once_and_loops_end(tmp_path: Path) -> None:
    src, disk = tmp_path / "src", tmp_path / "disk"
    touch(src / "z" / "1.png", disk / "p1" / "2.png", disk / "3.png")
    (src / "first").symlink_to(src / "z")  # comes before the folder in the alphabet, and must not take its name
    (src / "linked").symlink_to(disk)
    (src / "twice").symlink_to(disk / "p1")
    (src / "z" / "up").symlink_to(src)
    (disk / "self").symlink_to(disk)
    assert walked(src) == ["linked/3.png", "linked/p1/2.png", "z/1.png"]


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.png", os.O_CREAT))
    with pytest.raises(UserError, match="no UTF-8"):
        walked(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def locked(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UserError, match=r"locked cannot be read \(Permission denied\)"):
        walked(tmp_path)


@pytest.mark.parametrize("source", ["mias", "busi", "cmmd"])
def test_sources_that_walk_enter_linked_folders(tmp_path: Path, source: str) -> None:
    src, disk = tmp_path / "src", tmp_path / "disk"
    src.mkdir()
    touch(disk / "mdb001.pgm", disk / "D1-0001" / "1.dcm", disk / "benign" / "benign (1).png")
    (disk / "Info.txt").write_text("mdb001 G CIRC B 535 425 197\n")
    (disk / "CMMD_clinicaldata_revision.csv").write_text(
        "ID1,LeftRight,Age,number,abnormality,classification,subtype\nD1-0001,R,44,2,mass,Benign,\n"
    )
    (src / "linked").symlink_to(disk)
    assert len(read_archive(source, src, SourceOptions()).records) == 1
