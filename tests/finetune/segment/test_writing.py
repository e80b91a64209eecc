"""Masks in files, in the pixels of the film, read back by others' readers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from miram.data.geometry import Geometry
from miram.data.record import Region
from miram.data.shards import Sample
from miram.engine.errors import UserError
from miram.finetune.segment.writing import (
    Said,
    encode_nifti,
    film_spacing,
    geometry_of,
    names_of,
    refuse_formats,
    restored,
    write_mask,
)


def said(mask: NDArray[np.uint8], classes: tuple[str, ...] = ("background", "lesion"), **other: Any) -> Said:
    largest = tuple(0.9 - 0.1 * k for k in range(1, len(classes)))
    return Said(file="a/film.png", mask=mask, classes=classes, largest=largest, model="m" * 64, **other)


def two_parts(value: int = 1) -> NDArray[np.uint8]:
    """7 x 5 pixels in the middle, joined at a corner with one more, and 4 apart."""
    mask = np.zeros((40, 30), np.uint8)
    mask[10:17, 10:15] = mask[17, 15] = mask[30:32, 2:4] = value
    return mask


def test_one_class_is_black_and_white_and_several_keep_their_numbers(tmp_path: Path) -> None:
    write_mask(tmp_path, "one", said(two_parts()))
    with Image.open(tmp_path / "one.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), 255 * two_parts())
    both = two_parts(2)
    both[0, :6] = 1
    write_mask(tmp_path, "two", said(both, ("background", "fat", "gland")))
    with Image.open(tmp_path / "two.png") as image:
        assert np.array_equal(np.asarray(image), both)
    assert json.loads((tmp_path / "one.json").read_text())["values"] == {"background": 0, "lesion": 255}
    assert json.loads((tmp_path / "two.json").read_text())["values"] == {"background": 0, "fat": 1, "gland": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "one.json", "two.png", "two.json"}


def test_the_json_says_what_was_found_in_pixels_and_where_they_are_known_millimetres(tmp_path: Path) -> None:
    write_mask(tmp_path, "a", said(two_parts(), spacing_mm=0.07, thresholds=(0.3,), sop_uid="1.2.3"))
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["schema"] == "miram.mask/1"
    assert (told["file"], told["model"], told["thresholds"]) == ("a/film.png", "m" * 64, [0.3])
    assert (told["height"], told["width"], told["spacing_mm"], told["sop_instance_uid"]) == (40, 30, 0.07, "1.2.3")
    (found,) = told["found"]
    assert found["mm2"] == pytest.approx(40 * 0.0049, abs=1e-3)
    assert {k: v for k, v in found.items() if k != "mm2"} == {
        "class": "lesion", "pixels": 40, "components": 2, "largest_probability": 0.8,
    }  # fmt: skip
    write_mask(tmp_path, "b", said(0 * two_parts()))
    told = json.loads((tmp_path / "b.json").read_text())
    assert (told["spacing_mm"], told["sop_instance_uid"], told["thresholds"]) == (None, None, None)
    assert told["found"] == [{"class": "lesion", "pixels": 0, "mm2": None, "components": 0, "largest_probability": 0.8}]


def test_a_nifti_is_read_as_itk_reads_a_picture(tmp_path: Path) -> None:
    mask = two_parts()
    write_mask(tmp_path, "a", said(mask, spacing_mm=0.07), ["nifti"])
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.shape == (30, 40, 1)
    assert image.get_data_dtype() == np.uint8
    assert image.header.get_zooms() == pytest.approx((0.07, 0.07, 1.0))
    assert image.header.get_xyzt_units()[0] == "mm"
    # nnU-Net's reader turns the axes round: (1, rows, columns)
    assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0)[0], mask)
    # ITK's axes are those of DICOM, left and back, so that its direction is the identity: no flip, no rotation
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    for affine in (image.get_qform(), image.get_sform()):
        assert np.allclose(to_lps @ affine, np.diag([0.07, 0.07, 1.0, 1.0]))


def test_a_nifti_of_an_unknown_spacing_says_so() -> None:
    content = encode_nifti(two_parts(), None)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    assert image.header.get_zooms() == (1.0, 1.0, 1.0)
    assert image.header.get_xyzt_units()[0] == "unknown"
    assert b"spacing unknown" in image.header["descrip"].item()
    assert content == encode_nifti(two_parts(), None)  # nothing of when it was written


def test_unknown_formats_are_refused() -> None:
    refuse_formats(["nifti", "dicom-seg"])
    with pytest.raises(UserError, match=r"--format nifty is not known.*nifti"):
        refuse_formats(["nifty"])
    assert names_of("a", ["nifti", "dicom-seg"]) == ["a.png", "a.json", "a.nii.gz", "a.dcm"]


# ---------------------------------------------------------------------------------------------- back to the film


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """A crop within a film of 60 x 50 or beyond it, flipped or not, stored at its size or smaller."""
    top, left = draw(st.integers(-5, 20)), draw(st.integers(-5, 20))
    bottom, right = draw(st.integers(35, 64)), draw(st.integers(35, 55))
    whole = Geometry.crop((60, 50), Region(top=top, left=left, bottom=bottom, right=right), flipped=draw(st.booleans()))
    factor = draw(st.sampled_from([1.0, 0.5, 0.37]))
    return whole.resized((round(factor * whole.rows), round(factor * whole.columns)))


def stored(geometry: Geometry, spacing: float | None = None) -> Sample:
    meta = {"geometry": geometry.as_dict(), "spacing_mm": spacing}
    return Sample("key", np.zeros(geometry.shape, np.uint8), 255, meta)


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_probabilities_come_back_to_where_their_pixels_were(geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    given_ = rng.dirichlet(np.ones(3), geometry.shape).astype(np.float32).transpose(2, 0, 1)
    film = restored(given_, geometry_of(stored(geometry)))
    assert film.shape == (3, 60, 50)
    assert np.allclose(film.sum(0), 1, atol=1e-6)
    for y in range(0, 60, 7):
        for x in range(0, 50, 7):
            inside = geometry.top <= y < geometry.bottom and geometry.left <= x < geometry.right
            at_x, at_y = geometry.forward((x, y))
            row, column = (min(int(np.floor(at + 0.5 + 1e-9)), n - 1) for at, n in zip((at_y, at_x), geometry.shape))  # noqa: B905
            assert np.allclose(film[:, y, x], given_[:, row, column] if inside else [1, 0, 0], atol=1e-6)


def test_the_spacing_is_the_films_own_again() -> None:
    whole = Geometry.whole(1000, 800)
    assert film_spacing(stored(whole, 0.07)) == 0.07
    assert film_spacing(stored(whole.resized((250, 200)), 0.28)) == pytest.approx(0.07)
    assert film_spacing(stored(whole)) is None
    assert film_spacing(Sample("key", np.zeros((5, 4), np.uint8), 255, {})) is None
    assert geometry_of(Sample("key", np.zeros((5, 4), np.uint8), 255, {})) == Geometry.whole(5, 4)
