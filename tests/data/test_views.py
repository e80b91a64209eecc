"""Views: a function of (seed, epoch, key) that keeps grey levels, tissue and the whole image."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from miram.data.config import CropSection
from miram.data.packed import PackedPixels, encode_npy
from miram.data.resample import Box, area_down, resize
from miram.data.shards import Sample
from miram.data.views import MultiScaleViews, Normalisation, draw_box, tissue_fraction, windows

RAW = Normalisation(0, 1)
WHOLE = CropSection(area=(1, 1), aspect=(1, 1), flip=False, tissue=0)
SIDES = st.integers(8, 200)
VIEWS = st.tuples(st.integers(4, 64), st.integers(4, 64))


def sample(pixels: NDArray[Any], key: str = "k") -> Sample:
    return Sample(key, pixels, int(np.iinfo(pixels.dtype).max), {})


def packed(unpacked: Sample) -> Sample:
    content = encode_npy(np.asarray(unpacked.pixels))
    return replace(unpacked, pixels=PackedPixels(lambda offset, size: content[offset : offset + size], len(content)))


def noise(*shape: int) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(1, 65536, shape or (90, 70), dtype=np.uint16)


@pytest.fixture
def views() -> MultiScaleViews:
    return MultiScaleViews((24, 16), (1, 2, 4), 24, CropSection(), RAW, seed=0)


# ---------------------------------------------------------------------------------------------- randomness


def test_views_depend_on_seed_epoch_and_key_and_on_no_call_before(views: MultiScaleViews) -> None:
    asked = [(seed, epoch, key) for seed in (0, 1) for epoch in (0, 1) for key in ("a", "b")]
    once, again = (
        {(s, e, k): replace(views, seed=s)(sample(noise(), k), e) for s, e, k in order}
        for order in (asked, asked[::-1])
    )
    for place in asked:
        for name in ("noise", "view/1", "view/4"):
            assert torch.equal(once[place][name], again[place][name])
    for name in ("noise", "view/4"):
        assert len({once[place][name].numpy().tobytes() for place in asked}) == len(asked)


def test_noise_stays_when_the_crop_changes(views: MultiScaleViews) -> None:
    other = replace(views, crop=WHOLE, scales=(1,))
    assert torch.equal(views(sample(noise()), 3)["noise"], other(sample(noise()), 3)["noise"])


def test_tiles_and_tissue_are_drawn_and_leave_the_rest_as_it_was(views: MultiScaleViews) -> None:
    more = replace(views, tiles={2: 9}, tissue={1: (3, 2)})(sample(noise()), 1)
    plain = views(sample(noise()), 1)
    assert all(torch.equal(more[name], plain[name]) for name in plain if name != "key")
    assert more["tiles/2"].shape == (9,)
    assert not torch.equal(more["tiles/2"], more["noise"][:9])


@pytest.mark.parametrize("flip", [False, True])
def test_tissue_is_the_part_of_a_cell_that_is_not_zero(views: MultiScaleViews, flip: bool) -> None:
    """Air beyond a slanted edge: counted pixel by pixel in the finest view, on the grids of two scales."""
    pixels = noise(96, 64)
    pixels[np.arange(96)[:, None] + 2 * np.arange(64) > 90] = 0
    grids = {1: (6, 4), 2: (12, 8)}
    crop = WHOLE.model_copy(update={"flip": flip})
    made = replace(views, crop=crop, tissue=grids)(sample(pixels), 2)
    present = made["view/4"][0] != 0
    for s, (rows, columns) in grids.items():
        cells = present.reshape(rows, 96 // rows, columns, 64 // columns).float().mean((1, 3))
        torch.testing.assert_close(made[f"tissue/{s}"], cells.flatten())


def test_noise_is_uniform_and_one_number_a_patch(views: MultiScaleViews) -> None:
    values = replace(views, units=20_000)(sample(noise()), 0)["noise"].numpy()
    assert values.shape == (20_000,)
    assert 0 <= values.min() < values.max() < 1
    np.testing.assert_allclose(np.histogram(values, 10, (0, 1))[0], 2000, atol=5 * 2000**0.5)


def test_half_of_the_views_are_mirrored(views: MultiScaleViews) -> None:
    ramp = np.tile(np.arange(1, 71, dtype=np.uint16), (90, 1))
    seen = [views(sample(ramp), epoch)["view/1"][0] for epoch in range(200)]
    mirrored = sum(bool(view[0, 0] > view[0, -1]) for view in seen)
    assert 65 <= mirrored <= 135
    never = replace(views, crop=CropSection(flip=False))
    assert all(v[0, 0] < v[0, -1] for v in (never(sample(ramp), e)["view/1"][0] for e in range(20)))


# ---------------------------------------------------------------------------------------------- grey levels


def test_a_coarse_view_is_the_area_mean_of_the_fine_one(views: MultiScaleViews) -> None:
    for epoch in range(5):
        made = views(sample(noise()), epoch)
        fine = made["view/4"].numpy()[0].astype(np.float64)
        assert fine.shape == (96, 64)
        for scale in (1, 2):
            step = 4 // scale
            means = fine.reshape(24 * scale, step, 16 * scale, step).mean(axis=(1, 3))
            np.testing.assert_allclose(made[f"view/{scale}"].numpy()[0], means, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_ramp_over_all_levels_is_neither_clipped_nor_wrapped(dtype: type) -> None:
    top = np.iinfo(dtype).max
    ramp = np.tile(np.linspace(0, top, 64).round().astype(dtype), (64, 1))
    view = MultiScaleViews((64, 64), (1,), 4, WHOLE, RAW, seed=0)(sample(ramp), 0)["view/1"]
    np.testing.assert_allclose(view[0].numpy(), ramp / top, atol=1e-6)
    np.testing.assert_allclose(windows(sample(ramp), (64, 64), RAW)[0, 0].numpy(), ramp / top, atol=1e-6)


def test_fractions_are_of_the_largest_value_allowed_not_of_the_type() -> None:
    twelve = Sample("k", np.full((16, 16), 4095, np.uint16), 4095, {})
    view = MultiScaleViews((16, 16), (1,), 4, WHOLE, RAW, seed=0)
    assert torch.equal(view(twelve, 0)["view/1"], torch.ones(1, 16, 16))
    assert torch.equal(windows(twelve, (16, 16), RAW), torch.ones(1, 1, 16, 16))


def test_views_are_shifted_and_scaled(views: MultiScaleViews) -> None:
    shifted = replace(views, normalise=Normalisation(0.3, 0.2))
    raw, normal = views(sample(noise()), 0)["view/2"], shifted(sample(noise()), 0)["view/2"]
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal, (raw - 0.3) / 0.2)
    torch.testing.assert_close(
        windows(sample(noise()), (30, 30), Normalisation(0.3, 0.2)),
        (windows(sample(noise()), (30, 30), RAW) - 0.3) / 0.2,
    )


def test_a_ramp_keeps_every_code_of_16_bits() -> None:
    codes = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    view = MultiScaleViews((256, 256), (1,), 4, WHOLE, RAW, seed=0)(sample(codes), 0)["view/1"]
    np.testing.assert_array_equal(np.round(view[0].numpy() * 65535), codes)
    assert view.min() == 0
    assert view.max() == 1


def test_the_finest_detail_is_in_the_fine_view_and_gone_from_the_coarse_one() -> None:
    """A one-pixel checkerboard: anything but an area mean would leave a pattern."""
    board = (np.indices((96, 64)).sum(axis=0) % 2 * 60000).astype(np.uint16)
    made = MultiScaleViews((48, 32), (1, 2), 4, WHOLE, RAW, seed=0)(sample(board), 0)
    np.testing.assert_array_equal(made["view/2"][0].numpy(), (board / np.float32(65535)).astype(np.float32))
    np.testing.assert_allclose(made["view/1"].numpy(), 30000 / 65535, atol=1e-6)


# ---------------------------------------------------------------------------------------------- resampling


def brute_force(image: NDArray[Any], box: Box, size: tuple[int, int]) -> NDArray[np.float64]:
    """Every output pixel as a weighted sum over all of the crop, in float64."""
    top, left, height, width = box
    part = image[int(top) : int(np.ceil(top + height)), int(left) : int(np.ceil(left + width))].astype(np.float64)

    def weights(count: int, length: int, start: float, extent: float) -> NDArray[np.float64]:
        scale = extent / count
        at = start + (np.arange(count)[:, None] + 0.5) * scale
        near = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - at) / max(scale, 1))
        return near / near.sum(axis=1, keepdims=True)

    rows = weights(size[0], part.shape[0], top - int(top), height)
    return rows @ part @ weights(size[1], part.shape[1], left - int(left), width).T


SMALL = st.integers(1, 60)


@given(SMALL, SMALL, SMALL, SMALL, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_crop_is_the_widened_triangle_filter(
    height: int, width: int, rows: int, columns: int, places: list[float]
) -> None:
    image = noise(height, width)
    extent = (1 + places[0] * (height - 1), 1 + places[1] * (width - 1))
    box = (places[2] * (height - extent[0]), places[3] * (width - extent[1]), *extent)
    expected = brute_force(image, box, (rows, columns))
    np.testing.assert_allclose(resize(image, box, (rows, columns))[0], expected, rtol=2e-6)
    mirrored = resize(image, box, (rows, columns), mirrored=True)[0]
    np.testing.assert_allclose(mirrored, expected[:, ::-1], rtol=2e-6)


@pytest.mark.parametrize("size", [(300, 200), (300, 77), (30, 64), (700, 41)])
def test_a_whole_image_is_resized_as_torch_and_pillow_do(size: tuple[int, int]) -> None:
    image = noise(601, 200)
    made = resize(image, (0, 0, 601, 200), size)
    exact = torch.from_numpy(image.astype(np.float64))[None, None]
    torch_made = F.interpolate(exact, size=size, mode="bilinear", antialias=True)[0, 0]
    np.testing.assert_allclose(made[0], torch_made.numpy(), rtol=1e-5)
    pillow = Image.fromarray(image.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(made[0], np.asarray(pillow), rtol=1e-5)


@given(SMALL, SMALL, SMALL, SMALL)
def test_areas_are_averaged_whatever_the_ratio(height: int, width: int, rows: int, columns: int) -> None:
    """The integral image of the image, interpolated: its differences are exact areas."""
    rows, columns = min(rows, height), min(columns, width)
    image = np.random.default_rng(0).random((2, height, width), dtype=np.float32)
    whole = np.pad(image.astype(np.float64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))

    def at(edges: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
        low = np.minimum(edges.astype(int), values.shape[-1] - 2)
        return values[..., low] * (low + 1 - edges) + values[..., low + 1] * (edges - low)

    sums = at(np.linspace(0, width, columns + 1), whole)
    sums = at(np.linspace(0, height, rows + 1), sums.swapaxes(1, 2)).swapaxes(1, 2)
    areas = np.diff(np.diff(sums, axis=1), axis=2) * (rows * columns / height / width)
    np.testing.assert_allclose(area_down(image, (rows, columns)), areas, atol=1e-6)


@pytest.mark.parametrize("ratio", [(2, 2), (4, 4), (3, 1), (1, 5)])
def test_whole_areas_are_those_of_pillow(ratio: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((1, 60, 80), dtype=np.float32)
    size = (60 // ratio[0], 80 // ratio[1])
    pillow = Image.fromarray(image[0]).resize(size[::-1], Image.Resampling.BOX)
    np.testing.assert_allclose(area_down(image, size)[0], np.asarray(pillow), atol=1e-6)


def test_area_down_of_the_same_size_changes_nothing() -> None:
    image = noise().astype(np.float32)[None]
    np.testing.assert_array_equal(area_down(image[..., ::-1], (90, 70)), image[..., ::-1])


def test_shrinking_keeps_the_mean_and_uses_every_pixel() -> None:
    """Antialiased: without it, single bright pixels fall between the samples or count for many."""
    for y, x in ((200, 131), (201, 132), (203, 135)):
        image = np.zeros((400, 300), np.uint16)
        image[y, x] = 60000
        small = resize(image, (0, 0, 400, 300), (40, 30))
        assert small.sum() == pytest.approx(60000 / 100, rel=0.02)


def test_pixels_are_the_same_for_any_number_of_threads() -> None:
    """Sizes at which a product left whole would be shared among cores."""
    program = (
        "import hashlib, numpy; from miram.data.resample import resize;"
        "image = numpy.random.default_rng(0).integers(0, 65536, (1500, 1200)).astype('uint16');"
        "print(hashlib.sha256(resize(image, (0.3, 0.7, 1490.2, 1190.1), (896, 900))).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


# ---------------------------------------------------------------------------------------------- packed, colour


@pytest.mark.parametrize("shape", [(90, 70), (64, 200), (90, 70, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_packed_pixels_give_the_same_views(views: MultiScaleViews, shape: tuple[int, ...], dtype: type) -> None:
    pixels = (noise(*shape) >> (8 if dtype == np.uint8 else 0)).astype(dtype)
    pixels[:, shape[1] // 2 :] = 0
    for epoch in range(8):
        made, same = views(sample(pixels), epoch), views(packed(sample(pixels)), epoch)
        assert made.keys() == same.keys()
        for name in made.keys() - {"key"}:
            assert torch.equal(made[name], same[name])
    assert torch.equal(windows(sample(pixels), (24, 16), RAW), windows(packed(sample(pixels)), (24, 16), RAW))


def test_channels_are_treated_alike_and_normalised_each_by_its_own(views: MultiScaleViews) -> None:
    colour = noise(90, 70, 3)
    normal = replace(views, normalise=Normalisation((0.1, 0.2, 0.3), (1.0, 2.0, 4.0)))
    made = normal(sample(colour), 1)
    assert made["view/2"].shape == (3, 48, 32)
    shown = windows(sample(colour), (30, 40), normal.normalise)
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        alone = views(sample(np.ascontiguousarray(colour[..., channel])), 1)
        for scale in (1, 2, 4):
            expected = (alone[f"view/{scale}"][0] - mean) / std
            torch.testing.assert_close(made[f"view/{scale}"][channel], expected)
        gray = windows(sample(colour[..., channel]), (30, 40), Normalisation(mean, std))
        torch.testing.assert_close(shown[:, channel], gray[:, 0])


def test_scales_that_are_no_multiples_of_each_other(views: MultiScaleViews) -> None:
    made = replace(views, scales=(2, 3))(sample(noise()), 0)
    assert made["view/2"].shape == (1, 48, 32)
    assert made["view/3"].shape == (1, 72, 48)
    assert made["view/2"].mean() == pytest.approx(made["view/3"].mean().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------- crops


@given(SIDES, SIDES, VIEWS, st.integers(0, 10**6), st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)))
def test_crops_lie_inside_the_image_and_have_the_shape_asked_for(
    height: int, width: int, size: tuple[int, int], seed: int, area: tuple[float, float]
) -> None:
    crop = CropSection(area=(min(area), max(area)))
    rng = np.random.default_rng(seed)
    top, left, h, w = draw_box(rng, np.ones((height, width), np.uint8), size, crop)
    assert min(top, left) >= 0
    assert top + h <= height + 1e-9
    assert left + w <= width + 1e-9
    largest = min(height / size[0], width / size[1])
    share = h * w / (largest**2 * size[0] * size[1])
    assert share <= max(area) * (1 + 1e-9)
    clipped = np.isclose(h, height) or np.isclose(w, width)
    if not clipped:
        assert share >= min(area) * (1 - 1e-9)
        assert 0.75 - 1e-4 <= (w / h) / (size[1] / size[0]) <= 1.3333 + 1e-4
    made = resize(np.ones((height, width), np.uint8), (top, left, h, w), size)
    np.testing.assert_allclose(made, np.ones((1, *size)), atol=1e-5)


def test_a_crop_shows_the_part_of_the_image_that_its_box_names() -> None:
    y, x = np.mgrid[:300, :200]
    for image, along in ((y, 0), (x, 1)):
        made = resize(image.astype(np.uint16), (40.5, 30.25, 120, 80), (30, 20))
        centres = ((40.5, 30.25)[along] + (np.arange((30, 20)[along]) + 0.5) * 4) - 0.5
        inner = made[0].mean(axis=1 - along)[1:-1]
        np.testing.assert_allclose(inner, centres[1:-1], atol=0.05)


def test_crops_of_a_small_breast_hold_the_tissue_asked_for() -> None:
    pixels = np.zeros((200, 160), np.uint8)
    pixels[40:160, :80] = 9
    asked = CropSection(area=(0.1, 0.4), tissue=0.5)

    def drawn(crop: CropSection) -> NDArray[np.float64]:
        shares = []
        for seed in range(200):
            top, left, h, w = draw_box(np.random.default_rng(seed), pixels, (32, 32), crop)
            shares.append((pixels[round(top) : round(top + h), round(left) : round(left + w)] > 0).mean())
        return np.array(shares)

    assert (drawn(asked.model_copy(update={"tissue": 0.0})) < 0.45).mean() > 0.4
    assert (drawn(asked) >= 0.45).mean() > 0.97


def test_where_there_is_no_tissue_a_crop_is_drawn_all_the_same() -> None:
    box = draw_box(np.random.default_rng(0), np.zeros((50, 40), np.uint8), (16, 16), CropSection(tissue=1))
    assert box[2] > 0


@given(st.floats(0, 30), st.floats(0, 20), st.floats(20, 60), st.floats(20, 60))
def test_tissue_is_counted_as_brute_force_counts_it(top: float, left: float, height: float, width: float) -> None:
    y, x = np.mgrid[:100, :90]
    pixels = (np.hypot(y - 45, x - 10) < 40).astype(np.uint8)
    true = (pixels[round(top) : round(top + height), round(left) : round(left + width)] > 0).mean()
    assert tissue_fraction(pixels, (top, left, height, width)) == pytest.approx(true, abs=0.1)


# ---------------------------------------------------------------------------------------------- windows


@given(SIDES, SIDES, VIEWS, st.data())
def test_windows_show_every_part_of_the_image(
    height: int, width: int, size: tuple[int, int], data: st.DataObject
) -> None:
    pixels = np.zeros((height, width), np.uint8)
    pixels[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = 255
    made = windows(sample(pixels), size, RAW)
    assert made.shape[1:] == (1, *size)
    assert made.max() > 1e-6


@given(SIDES, SIDES, VIEWS)
def test_windows_are_as_few_as_cover_the_image(height: int, width: int, size: tuple[int, int]) -> None:
    scale = max(size[0] / height, size[1] / width)
    across = max(round(height * scale) / size[0], round(width * scale) / size[1])
    assert len(windows(sample(np.ones((height, width), np.uint8)), size, RAW)) == max(1, np.ceil(across - 1e-9))


@pytest.mark.parametrize("shape", [(48, 32), (96, 64), (24, 16)])
def test_an_image_of_the_views_shape_is_one_window(shape: tuple[int, int]) -> None:
    assert windows(sample(noise(*shape)), (48, 32), RAW).shape == (1, 1, 48, 32)


def test_windows_of_a_tall_image_are_its_even_runs() -> None:
    image = noise(100, 32)
    made = windows(sample(image), (48, 32), RAW)
    assert made.shape == (3, 1, 48, 32)
    for window, top in zip(made, (0, 26, 52), strict=True):
        np.testing.assert_allclose(window[0].numpy(), image[top : top + 48] / 65535, atol=1e-6)
