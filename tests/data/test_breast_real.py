"""Breast isolation on real films: edges, labels, pectoral muscle, findings. Skipped without `MIRAM_REAL_DATA`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from miram.data.archive import SourceOptions
from miram.data.breast import find_breast, isolate
from miram.data.dicom.reader import DicomOptions
from miram.data.image import read_film
from miram.data.reading import read_file
from miram.data.record import Film, Pixels, Record
from miram.data.sources import read_archive

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere"))
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="MIRAM_REAL_DATA names no folder")
Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def mias() -> list[Record]:
    records = read_archive("mias", REAL / "mini_mias" / "all-mias", SourceOptions()).records
    assert len(records) == 100
    return list(records)


def mask_of(film: Film) -> Mask:
    return find_breast(film.pixels, film.max_value)


def test_marker_and_edge_of_a_film_with_four_white_edges_are_gone() -> None:
    film = read_file(REAL / "mg_dicom" / "MG1_J2KI", DicomOptions(any_modality=True))
    height, width = film.pixels.shape
    stored, geometry = isolate(film)
    kept = geometry.restore(stored.pixels)
    boxes = {
        "marker": np.s_[200:730, 2300:2860],
        "edge beyond the nipple": np.s_[:, width - 60 :],
        "edge at the top": np.s_[:40, 1700:],
        "edge and number at the bottom": np.s_[height - 80 :, 1100:],
    }
    for name, box in boxes.items():
        assert film.pixels[box].max() > 0.9 * film.pixels.max(), name  # there was something to remove
        assert not kept[box].any(), name
    nipple = np.s_[3150:3450, 1900:2000]
    assert np.array_equal(kept[nipple], film.pixels[nipple])


def test_four_white_edges_change_no_film(mias: list[Record]) -> None:
    for record in mias:
        film = cropped(record.read().pixels)
        without = find_breast(film, 255)
        edged = film.copy()
        edged[:8], edged[-8:], edged[:, :8], edged[:, -8:] = 255, 255, 255, 255
        found = find_breast(edged, 255)
        assert abs(int(found.sum()) - int(without.sum())) <= 0.05 * without.sum(), record.name
        assert (found != without)[8:-8, 8:-8].sum() <= 0.05 * without.sum(), record.name


def cropped(pixels: Pixels) -> Pixels:
    """The film without the black the archive padded it with."""
    columns = np.flatnonzero((pixels > 2).mean(axis=0) > 0.3)
    return pixels[:, columns[0] : columns[-1] + 1]


def test_outline_agrees_with_drawn_tissue_and_keeps_the_pectoral_muscle() -> None:
    drawn = sorted((REAL / "ddsm_tissue_seg").rglob("*_LI.png"))
    assert len(drawn) == 44
    dice, pectoral = [], []
    for path in drawn:
        classes = np.asarray(Image.open(path))
        folder = path.parent.with_name(path.parent.name.removesuffix("_labels"))
        found, breast = mask_of(read_film(folder / path.name.replace("_LI", ""))), classes != 64
        dice.append(2 * (found & breast).sum() / (found.sum() + breast.sum()))
        if (classes == 255).any():
            pectoral.append(found[classes == 255].mean())
    assert min(dice) >= 0.88
    assert np.median(dice) >= 0.95
    assert len(pectoral) > 30
    assert min(pectoral) >= 0.95


def test_chest_wall_comes_to_the_left_on_every_film() -> None:
    paths = sorted((REAL / "mini_mias" / "all-mias").glob("*.pgm"))
    assert len(paths) == 100
    for path in paths:
        stored, geometry = isolate(read_film(path))
        # The archive's odd films were scanned with the chest wall on the right, its even ones on the left.
        assert geometry.flipped == (int(path.stem[3:]) % 2 == 1), path.name
        half = stored.pixels.shape[1] // 2
        assert stored.pixels[:, :half].sum(dtype=int) > stored.pixels[:, -half:].sum(dtype=int), path.name


def test_marked_findings_are_kept(mias: list[Record]) -> None:
    inside = []
    for record in mias:
        film = record.read()
        found = mask_of(film)
        inside += [bool(found[round(circle.y), round(circle.x)]) for circle in film.circles]
    assert len(inside) == 34
    assert sum(inside) >= 33  # one circle of the archive lies outside its breast


def test_drawn_lesions_are_kept() -> None:
    options = SourceOptions(masks=REAL / "cdd_cesm_seg512" / "masks")
    kept = []
    for record in read_archive("folder", REAL / "cdd_cesm_seg512" / "images", options).records:
        film = record.read()
        assert film.mask is not None
        kept.append(mask_of(film)[film.mask > 0].mean())
    assert len(kept) == 63
    assert min(kept) >= 0.95


def test_two_backgrounds_are_both_left_out() -> None:
    """Half of these frames is black, half grey. The breasts are one model's: their areas differ by little."""
    paths = sorted((REAL / "msynth_jpg").glob("*_Dscattered_*.jpg"))
    assert len(paths) == 19
    areas = np.array([mask_of(read_film(path)).mean() for path in paths])
    assert areas.max() < 1.1 * areas.min()
