"""BUSI: images in the original layout, written here from what its paper describes, become records with masks."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.image import UnreadableImage
from miram.data.record import Film
from miram.data.sources import read_archive
from miram.engine.errors import UserError

RNG = np.random.default_rng(0)
SHAPES = {"benign (1)": (40, 56), "benign (2)": (38, 50), "benign (10)": (30, 30), "malignant (1)": (44, 40)}
SHAPES |= {"normal (1)": (36, 36)}
GRAY = {name: RNG.integers(0, 256, shape, np.uint8) for name, shape in SHAPES.items()}


def square(name: str, top: int) -> np.ndarray:
    mask = np.zeros(SHAPES[name], np.uint8)
    mask[top : top + 6, 4:12] = 255
    return mask


MASKS = {
    "benign (1)_mask": square("benign (1)", 2),
    "benign (1)_mask_1": square("benign (1)", 12),
    "benign (1)_mask_2": square("benign (1)", 22),
    "malignant (1)_mask": square("malignant (1)", 5),
    "benign (2)_mask": square("benign (2)", 5),
    "normal (1)_mask": np.zeros(SHAPES["normal (1)"], np.uint8),
}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """The folder that the download unpacks to, in a folder; `benign (10)` has lost its mask."""
    top = tmp_path / "download" / "Dataset_BUSI_with_GT"
    for name, gray in GRAY.items():
        (top / name.split()[0]).mkdir(parents=True, exist_ok=True)
        mode = "RGBA" if name == "malignant (1)" else "RGB"
        Image.fromarray(gray).convert(mode).save(top / name.split()[0] / f"{name}.png")
    for name, mask in MASKS.items():
        image = Image.fromarray(mask).convert({"benign (2)_mask": "RGB", "normal (1)_mask": "1"}.get(name, "L"))
        image.save(top / name.split()[0] / f"{name}.png")
    return tmp_path / "download"


def films(archive: Archive) -> dict[str, Film]:
    return {record.image_id: pickle.loads(pickle.dumps(record.read))() for record in archive.records}


@pytest.mark.parametrize("below", ["", "Dataset_BUSI_with_GT"])
def test_images_become_records_and_masks_do_not(src: Path, below: str) -> None:
    archive = read_archive("busi", src / below)
    assert {record.image_id for record in archive.records} == set(GRAY)
    assert (archive.breast, archive.channels) == (False, 1)


def test_labels_are_the_class_and_whether_it_is_malignant(src: Path) -> None:
    labels = {record.image_id: record.labels for record in read_archive("busi", src).records}
    assert labels["benign (1)"] == {"class": "benign", "binary": 0}
    assert labels["malignant (1)"] == {"class": "malignant", "binary": 1}
    assert labels["normal (1)"] == {"class": "normal", "binary": 0}


def test_each_image_is_a_patient_and_the_notes_say_what_that_hides(src: Path) -> None:
    archive = read_archive("busi", src)
    assert len({record.patient_id for record in archive.records}) == len(GRAY)
    assert any("patients are unknown" in note for note in archive.notes)
    assert any("near-duplicates" in note for note in archive.notes)
    assert "1 images have no mask" in archive.notes


def test_gray_comes_out_of_rgb_exactly(src: Path) -> None:
    for name, film in films(read_archive("busi", src)).items():
        np.testing.assert_array_equal(film.pixels, GRAY[name])


def test_masks_of_an_image_are_numbered_in_their_order(src: Path) -> None:
    found = films(read_archive("busi", src))
    parts = [MASKS[f"benign (1)_mask{number}"] > 0 for number in ("", "_1", "_2")]
    np.testing.assert_array_equal(found["benign (1)"].mask, sum((i + 1) * part for i, part in enumerate(parts)))
    np.testing.assert_array_equal(found["benign (2)"].mask, MASKS["benign (2)_mask"] > 0)
    assert not found["normal (1)"].mask.any()
    assert found["benign (10)"].mask is None
    assert {film.mask_kind for film in found.values()} == {"instances"}


def test_three_channels_where_asked_for(src: Path) -> None:
    archive = read_archive("busi", src, SourceOptions(channels=3))
    assert archive.channels == 3
    assert films(archive)["benign (1)"].pixels.shape == (40, 56, 3)


def test_an_image_with_coloured_marks_is_named_with_the_way_out(src: Path) -> None:
    path = src / "Dataset_BUSI_with_GT" / "benign" / "benign (2).png"
    colours = np.repeat(GRAY["benign (2)"][..., None], 3, axis=2)
    colours[3:6, 3:6] = (255, 255, 0)
    Image.fromarray(colours).save(path)
    (record,) = (r for r in read_archive("busi", src).records if r.image_id == "benign (2)")
    with pytest.raises(UnreadableImage, match="--channels 3"):
        record.read()


def test_two_copies_are_refused(src: Path) -> None:
    (src / "copy").mkdir()
    (src / "copy" / "benign (1).png").write_bytes((src / "Dataset_BUSI_with_GT/benign/benign (1).png").read_bytes())
    with pytest.raises(UserError, match=r"benign \(1\)\.png twice"):
        read_archive("busi", src)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Dataset_BUSI_with_GT"):
        read_archive("busi", tmp_path)
