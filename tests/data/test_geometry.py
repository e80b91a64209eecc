"""Geometry: whatever crop, flip and size did, the way back finds the film's own pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from miram.data.breast import isolate
from miram.data.geometry import Geometry, Size, area_resize, resize_mask
from miram.data.phantom import PhantomSettings, records
from miram.data.record import Box, Circle, Film, Polygon, Region


@st.composite
def regions(draw: st.DrawFn, beyond: int = 0) -> tuple[int, int, Region]:
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    top, left = draw(st.integers(-beyond, height - 1)), draw(st.integers(-beyond, width - 1))
    bottom = draw(st.integers(max(top, 0) + 1, height + beyond))
    right = draw(st.integers(max(left, 0) + 1, width + beyond))
    return height, width, Region(top=top, left=left, bottom=bottom, right=right)


@st.composite
def geometries(draw: st.DrawFn, beyond: int = 0) -> Geometry:
    height, width, region = draw(regions(beyond))
    return Geometry.crop((height, width), region, flipped=draw(st.booleans()))


def numbered(*shape: int) -> NDArray[np.uint16]:
    """Every pixel its own number, none of them zero."""
    return np.arange(1, 1 + np.prod(shape), dtype=np.uint16).reshape(shape)


def inside(g: Geometry) -> NDArray[np.bool_]:
    box = np.zeros((g.height, g.width), bool)
    box[max(g.top, 0) : g.bottom, max(g.left, 0) : g.right] = True
    return box


# ---------------------------------------------------------------------------------------------- crop and flip


@given(geometries(beyond=9), st.sampled_from([(), (1,), (3,)]))
def test_restore_undoes_apply(g: Geometry, channels: tuple[int, ...]) -> None:
    image = numbered(g.height, g.width, *channels)
    stored = g.apply(image)
    assert stored.shape == (g.bottom - g.top, g.right - g.left, *channels)
    kept = inside(g).reshape(g.height, g.width, *(1 for _ in channels))
    assert np.array_equal(g.restore(stored), np.where(kept, image, 0))


@given(geometries())
def test_apply_undoes_restore(g: Geometry) -> None:
    stored = numbered(*g.shape)
    assert np.array_equal(g.apply(g.restore(stored)), stored)


@given(geometries(beyond=5), st.integers(-400, 400), st.integers(-400, 400))
def test_marks_come_back_exactly(g: Geometry, x: int, y: int) -> None:
    circle = Circle(x=x / 8, y=y / 8, radius=2.5, label="mass")
    assert g.restore_circle(g.apply_circle(circle)) == circle
    box = Box(left=x / 8, top=y / 8, right=x / 8 + 3, bottom=y / 8 + 5, label="calc")
    assert g.restore_box(g.apply_box(box)) == box


@given(geometries(beyond=5), st.data())
def test_a_mark_goes_where_its_pixel_goes(g: Geometry, data: st.DataObject) -> None:
    x = data.draw(st.integers(max(g.left, 0), min(g.right, g.width) - 1))
    y = data.draw(st.integers(max(g.top, 0), min(g.bottom, g.height) - 1))
    image = numbered(g.height, g.width)
    circle = g.apply_circle(Circle(x=x, y=y, radius=1))
    assert g.apply(image)[int(circle.y), int(circle.x)] == image[y, x]


def test_flip_by_hand() -> None:
    g = Geometry.crop((2, 5), Region(top=1, left=1, bottom=2, right=4), flipped=True)
    assert g.apply(numbered(2, 5)).tolist() == [[9, 8, 7]]
    assert g.apply_circle(Circle(x=1, y=1, radius=1)) == Circle(x=2, y=0, radius=1)
    assert g.apply_box(Box(left=1, top=1, right=2, bottom=1)) == Box(left=1, top=0, right=2, bottom=0)


def test_beyond_the_frame_is_zero_by_hand() -> None:
    g = Geometry.crop((2, 2), Region(top=-1, left=1, bottom=2, right=4))
    assert g.apply(numbered(2, 2)).tolist() == [[0, 0, 0], [2, 0, 0], [4, 0, 0]]


def test_whole_changes_nothing_and_copies() -> None:
    image = numbered(4, 6)
    same = Geometry.whole(4, 6).apply(image)
    assert np.array_equal(same, image)
    assert not np.shares_memory(same, image)


@given(geometries(beyond=3))
def test_json_round_trip(g: Geometry) -> None:
    assert Geometry.from_dict(json.loads(json.dumps(g.as_dict()))) == g


@pytest.mark.parametrize("box", [(2, 0, 2, 6), (0, 3, 4, 3), (3, 0, 2, 6)])
def test_an_empty_box_is_refused(box: tuple[int, int, int, int]) -> None:
    top, left, bottom, right = box
    with pytest.raises(ValueError, match="crop box"):
        Geometry.crop((4, 6), Region(top=top, left=left, bottom=bottom, right=right))


def test_an_image_of_another_size_is_refused() -> None:
    g = Geometry.crop((4, 6), Region(top=0, left=0, bottom=2, right=6))
    with pytest.raises(ValueError, match="this geometry is for"):
        g.apply(numbered(6, 4))
    with pytest.raises(ValueError, match="this geometry is for"):
        g.restore(numbered(4, 6))


# ---------------------------------------------------------------------------------------------- other sizes


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("side", [0, 2])
def test_masks_come_back_to_the_film(factor: float, side: int) -> None:
    """A smooth finding of some 200 pixels' radius, through crop, flip and resize: Dice at least 0.99."""
    film = records(1, PhantomSettings(size=900, seed=4))[side].read()
    y, x = np.mgrid[: film.pixels.shape[0], : film.pixels.shape[1]]
    middle = ndimage.center_of_mass(film.pixels > 400)
    mask = (np.hypot((y - middle[0]) / 1.3, x - middle[1]) < 120).astype(np.uint8) * 3
    film = Film(pixels=film.pixels, max_value=4095, mask=mask)
    _, geometry = isolate(film)
    geometry = geometry.resized((round(geometry.shape[0] * factor), round(geometry.shape[1] * factor)))
    back = geometry.restore(geometry.apply_mask(mask))
    assert back.shape == mask.shape
    assert set(np.unique(back)) == {0, 3}
    assert dice(back == 3, mask == 3) >= 0.99


@given(regions(beyond=4), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_points_come_back_from_any_size(r: tuple[int, int, Region], rows: int, columns: int, flipped: bool) -> None:
    g = Geometry.crop(r[:2], r[2], flipped=flipped).resized((rows, columns))
    assert g.back(g.forward((3.25, -7.5))) == pytest.approx((3.25, -7.5))


def test_marks_follow_the_picture_to_another_size() -> None:
    """A bright square's centre of mass lies where its box says, before and after."""
    pixels = np.zeros((60, 90), np.uint16)
    pixels[20:32, 50:62] = 1000
    box = Box(left=50, top=20, right=61, bottom=31)
    polygon = Polygon(points=((50, 20), (61, 20), (61, 31), (50, 31)))
    g = Geometry.crop((60, 90), Region(top=5, left=10, bottom=55, right=90), flipped=True).resized((25, 40))
    small = g.apply_film(Film(pixels=pixels, max_value=1000, boxes=(box,), polygons=(polygon,)))
    (found,) = small.boxes
    cy, cx = ndimage.center_of_mass(small.pixels.astype(float))
    assert ((found.left + found.right) / 2, (found.top + found.bottom) / 2) == pytest.approx((cx, cy), abs=1e-6)
    assert np.mean(small.polygons[0].points, axis=0) == pytest.approx((cx, cy), abs=1e-6)


def test_area_resize_is_the_mean_of_blocks_rounded_last() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 65536, (40, 60), dtype=np.uint16)
    means = image.reshape(10, 4, 20, 3).mean(axis=(1, 3))
    assert np.abs(area_resize(image, (10, 20)).astype(float) - means).max() <= 0.5 + 1e-2
    assert area_resize(image, (10, 20)).dtype == np.uint16
    colour = np.stack([image, image // 2, image // 3], axis=2)
    assert np.array_equal(area_resize(colour, (10, 20))[..., 1], area_resize(image // 2, (10, 20)))


def test_no_finding_of_a_mask_vanishes() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[41, 83], mask[70:90, 10:40] = 1, 2
    small = resize_mask(mask, (10, 10))
    assert set(np.unique(small)) == {0, 1, 2}
    assert np.argwhere(small == 1).tolist() == [[4, 8]]


def test_no_finding_gives_way_to_another() -> None:
    mask = np.zeros((40, 40), np.uint8)
    for k in range(1, 13):  # crowded: several fall into one pixel of the small mask
        mask[20 + k % 4, 10 + k // 4] = k
    small = resize_mask(mask, (8, 8))
    assert set(np.unique(small)) == set(range(13))
    assert np.abs(np.argwhere(small > 0) - (4, 2)).max() <= 3


@pytest.mark.parametrize(
    ("size", "spacing", "shape"),
    [
        (Size(), None, (400, 300)),
        (Size(max_size=200), None, (200, 150)),
        (Size(max_size=800), 0.1, (400, 300)),
        (Size(spacing_mm=0.2), 0.05, (100, 75)),
        (Size(spacing_mm=0.05), 0.1, (400, 300)),
    ],
)
def test_sizes_are_physical_where_asked_and_never_enlarge(
    size: Size, spacing: float | None, shape: tuple[int, int]
) -> None:
    assert size.shape((400, 300), spacing) == shape


def test_a_physical_size_needs_a_spacing() -> None:
    with pytest.raises(ValueError, match="--max-size"):
        Size(spacing_mm=0.1).shape((400, 300), None)
