"""Views: a function of (seed, epoch, key) that keeps grey levels, tissue and the whole image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from miram.data.config import CropSection
from miram.data.shards import Sample
from miram.data.views import MultiScaleViews, Normalisation, area_down, draw_box, resize, tissue_fraction, windows

RAW = Normalisation(0, 1)
WHOLE = CropSection(area=(1, 1), aspect=(1, 1), flip=False, tissue=0)
SIDES = st.integers(8, 200)
VIEWS = st.tuples(st.integers(4, 64), st.integers(4, 64))


def sample(pixels: NDArray[np.uint16], key: str = "k") -> Sample:
    return Sample(key, pixels, int(np.iinfo(pixels.dtype).max), {})


def noise(height: int = 90, width: int = 70) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(1, 65536, (height, width), dtype=np.uint16)


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


def test_noise_is_uniform_and_one_number_a_patch(views: MultiScaleViews) -> None:
    values = replace(views, patches=20_000)(sample(noise()), 0)["noise"].numpy()
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


def test_shrinking_keeps_the_mean_and_uses_every_pixel() -> None:
    """Antialiased: without it, single bright pixels fall between the samples or count for many."""
    for y, x in ((200, 131), (201, 132), (203, 135)):
        image = np.zeros((400, 300), np.uint16)
        image[y, x] = 60000
        small = resize(image, (0, 0, 400, 300), (40, 30))
        assert small.sum() == pytest.approx(60000 / 100, rel=0.02)


def test_area_down_of_the_same_size_changes_nothing() -> None:
    image = noise().astype(np.float32)
    np.testing.assert_array_equal(area_down(image[:, ::-1], (90, 70)), image[:, ::-1])


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
    np.testing.assert_allclose(made, np.ones(size), atol=1e-5)


def test_a_crop_shows_the_part_of_the_image_that_its_box_names() -> None:
    y, x = np.mgrid[:300, :200]
    for image, along in ((y, 0), (x, 1)):
        made = resize(image.astype(np.uint16), (40.5, 30.25, 120, 80), (30, 20))
        centres = ((40.5, 30.25)[along] + (np.arange((30, 20)[along]) + 0.5) * 4) - 0.5
        inner = made.mean(axis=1 - along)[1:-1]
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
