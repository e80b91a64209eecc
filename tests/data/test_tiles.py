"""Tiles at a stated resolution against brute force: stored pixels split into many, marked pixels, unions of boxes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from miram.data.packed import PackedPixels, encode_npy
from miram.data.phantom import PhantomSettings, render
from miram.data.shards import Sample
from miram.data.tiles import Boxes, grid, scale_of, starts, tiles
from miram.data.views import Normalisation

PLAIN = Normalisation(0.0, 1.0)


def sample(pixels: Any, max_value: int = 1) -> Sample:
    return Sample("made-up", pixels, max_value, {})


def made(
    pixels: Any, size: tuple[int, int], scale: float, overlap: float = 0.0, tissue: float = 0.0
) -> tuple[Boxes, NDArray[np.float32]]:
    """Tiles whose pixels are `scale` stored pixels wide."""
    boxes, cut = tiles(sample(pixels), size, scale * 0.1, 0.1, overlap, tissue, PLAIN)
    return boxes, torch.stack(list(cut)).numpy()


def noise(height: int, width: int, *channels: int, seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(1, 4096, (height, width, *channels)).astype(np.uint16)


def breast(height: int, width: int) -> NDArray[np.uint16]:
    """Half an ellipse at the left edge, speckled with zeros as dark tissue may be."""
    y, x = np.mgrid[:height, :width]
    inside = ((y - 0.45 * height) / (0.4 * height)) ** 2 + (x / (0.8 * width)) ** 2 < 1
    return (inside * (noise(height, width) % 50)).astype(np.uint16)


# ---------------------------------------------------------------------------------------------- what a tile shows


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 2.3, 3.7])
def test_a_pixel_is_the_mean_of_what_it_covers(scale: float) -> None:
    """By splitting stored pixels into 10 x 10 and averaging blocks of them."""
    stored = noise(61, 47)
    boxes, found = made(stored, (8, 6), scale, overlap=0.3)
    fine = np.kron(stored, np.ones((10, 10)))
    step = round(10 * scale)
    for box, tile in zip(boxes, found, strict=True):
        top, left = np.round(10 * box[:2]).astype(int)
        for (y, x), value in np.ndenumerate(tile[0]):
            part = fine[top + y * step : top + (y + 1) * step, left + x * step : left + (x + 1) * step]
            assert value == pytest.approx(part.mean() if part.size else 0, rel=1e-5)


def test_at_the_stored_resolution_pixels_are_copied() -> None:
    stored = noise(50, 40)
    for spacing in (0.1, 0.1004, 0.0995):  # not worth resampling
        boxes, cut = tiles(sample(stored), (16, 16), 0.1, spacing, 0.0, 0.0, PLAIN)
        for (top, left, height, width), tile in zip(boxes.astype(int), cut, strict=True):
            np.testing.assert_array_equal(tile[0], stored[top : top + height, left : left + width])


@pytest.mark.parametrize("mm", [0.4, 0.46, 0.62])
def test_what_is_stored_at_another_spacing_gives_the_same_tiles(mm: float) -> None:
    """Twice as fine, four pixels in the place of each one."""
    coarse = breast(150, 110)
    fine = np.kron(coarse, np.ones((2, 2), np.uint16))
    boxes, found = tiles(sample(coarse), (24, 16), mm, 0.2, 0.25, 0.3, PLAIN)
    finer_boxes, again = tiles(sample(fine), (24, 16), mm, 0.1, 0.25, 0.3, PLAIN)
    np.testing.assert_allclose(0.1 * finer_boxes, 0.2 * boxes, atol=1e-9)
    np.testing.assert_allclose(torch.stack(list(again)), torch.stack(list(found)), rtol=1e-4, atol=1e-3)


def test_a_phantom_at_two_sizes_shows_the_same_breast_at_the_same_scale() -> None:
    """Rendered at 0.5 and 0.25 mm a pixel: alike tile by tile, and less so where the spacing is misstated."""
    films = [render(PhantomSettings(size=size, seed=3, artefacts=0.0), 0, "L", "CC") for size in (480, 960)]

    def seen(film: Any, spacing: float) -> NDArray[np.float32]:
        _, cut = tiles(sample(film.pixels, film.max_value), (48, 32), 1.0, spacing, 0.0, 0.0, PLAIN)
        return torch.stack(list(cut)).numpy()

    assert [film.spacing_mm for film in films] == [0.5, 0.25]
    first, second = (seen(film, film.spacing_mm) for film in films)
    assert first.shape == second.shape
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.995
    misstated = seen(films[1], 0.27)[: len(first)]
    assert np.corrcoef(first[: len(misstated)].ravel(), misstated.ravel())[0, 1] < 0.98


def test_colour_and_statistics_are_the_encoders() -> None:
    stored = noise(30, 30, 3)
    normalise = Normalisation((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    _, cut = tiles(sample(stored, 4095), (30, 30), 0.1, 0.1, 0.0, 0.0, normalise)
    expected = (stored / 4095 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(next(cut), expected.transpose(2, 0, 1), rtol=1e-4, atol=1e-5)


def test_packed_pixels_are_read_tile_by_tile() -> None:
    stored, read = breast(400, 60), []
    content = encode_npy(stored)

    def part(offset: int, size: int) -> bytes:
        read.append(size)
        return content[offset : offset + size]

    boxes, cut = tiles(sample(PackedPixels(part, len(content))), (32, 16), 0.15, 0.1, 0.0, 0.1, PLAIN)
    expected_boxes, expected = tiles(sample(stored), (32, 16), 0.15, 0.1, 0.0, 0.1, PLAIN)
    np.testing.assert_array_equal(boxes, expected_boxes)
    assert torch.equal(torch.stack(list(cut)), torch.stack(list(expected)))
    assert max(read) <= 49 * 60 * 2  # rows of one tile


# ---------------------------------------------------------------------------------------------- where tiles lie


@pytest.mark.parametrize("scale", [1.0, 1.7, 2.0])
def test_a_marked_pixel_is_found_where_the_box_says(scale: float) -> None:
    """It lights every tile whose box holds it, at the place that the box gives, and no other."""
    size = (12, 10)
    for y, x in [(0, 0), (17, 33), (63, 69), (40, 12), (63, 0)]:
        stored = np.zeros((64, 70), np.uint16)
        stored[y, x] = 1000
        lit = 0
        for box, tile in zip(*made(stored, size, scale, overlap=0.2), strict=True):
            top, left, height, width = box
            assert (height, width) == (scale * size[0], scale * size[1])
            row, column = np.unravel_index(tile[0].argmax(), size)
            if top <= y and y + 1 <= top + height and left <= x and x + 1 <= left + width:
                assert tile.max() > 0
                assert top + row * scale - 1 < y < top + (row + 1) * scale
                assert left + column * scale - 1 < x < left + (column + 1) * scale
                lit += 1
            elif y >= top + height or y + 1 <= top or x >= left + width or x + 1 <= left:
                assert tile.max() == 0
        assert lit or scale == 1.7  # there it may lie across a border


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("tissue", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("image", [(97, 61), (20, 90), (30, 11)])
def test_all_of_the_breast_is_in_tiles_but_where_there_is_less_of_it_than_asked(
    scale: float, overlap: float, tissue: float, image: tuple[int, int]
) -> None:
    size, stored = (16, 12), breast(*image)
    every, (kept, found) = grid(image, size, scale, overlap), made(stored, size, scale, overlap, tissue)
    assert len(found) == len(kept) >= 1
    assert {tuple(box) for box in kept} <= {tuple(box) for box in every}
    fine = np.kron(stored, np.ones((10, 10))) > 0  # tenths of a pixel: boxes start and end at whole ones
    covered, excused = np.zeros_like(fine), np.zeros_like(fine)
    for box in every:
        top, left, height, width = np.round(10 * box).astype(int)
        part = slice(top, top + height), slice(left, left + width)
        enough = np.count_nonzero(fine[part]) / (height * width) >= tissue
        is_kept = tuple(box) in {tuple(other) for other in kept}
        assert is_kept == enough or (len(kept) == 1 and not enough)
        (covered if is_kept else excused)[part] = True
    assert (covered | excused).all()
    assert covered.all() or tissue > 0


@pytest.mark.parametrize("length", [1, 7, 16, 17, 31, 32, 33, 100, 1001])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.89])
def test_starts_are_the_fewest_that_cover_and_overlap(length: int, overlap: float) -> None:
    window = 16
    found = starts(length, window, overlap)
    assert found[0] == 0
    assert found[-1] == max(0, length - window)
    gaps = np.diff(found)
    assert (gaps <= window * (1 - overlap) + 1e-6).all() or window * (1 - overlap) < 1
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    if len(found) > 1:
        longest = max(1, math.floor(window * (1 - overlap) + 1e-6))
        assert (len(found) - 2) * longest < length - window  # one fewer would leave something out


def test_an_image_without_tissue_has_one_tile_and_an_image_smaller_than_a_tile_stays_at_the_chest_wall() -> None:
    boxes, found = made(np.zeros((60, 60), np.uint16), (16, 16), 1.0, tissue=0.1)
    assert (boxes.shape, found.shape) == ((1, 4), (1, 1, 16, 16))
    stored = noise(10, 7)
    boxes, found = made(stored, (16, 16), 1.0, tissue=0.9)
    assert boxes.tolist() == [[0, 0, 16, 16]]
    np.testing.assert_array_equal(found[0, 0, :10, :7], stored)
    assert found.sum() == stored.sum()


def test_nothing_finer_than_stored_is_made_up() -> None:
    for mm, spacing in ((0.05, 0.1), (0.098, 0.1)):
        with pytest.raises(ValueError, match=r"finer than the stored 0\.1 mm"):
            scale_of(mm, spacing)
    assert scale_of(0.0995, 0.1) == 1.0
    assert scale_of(0.3, 0.1) == pytest.approx(3)
