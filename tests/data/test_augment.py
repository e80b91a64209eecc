"""Two views of a film: functions of (seed, epoch, key) that keep air black and grey levels fine."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from miram.data.augment import PairSection, TwoViews, blur, jitter, noise, turned
from miram.data.config import CropSection
from miram.data.packed import PackedPixels, encode_npy
from miram.data.resample import resize
from miram.data.shards import Sample
from miram.data.views import Normalisation

RAW = Normalisation(0, 1)
WHOLE = CropSection(area=(1, 1), aspect=(1, 1), flip=False, tissue=0)
PLAIN = PairSection(
    upside_down=False, rotation=0, gamma=0, contrast=0, brightness=0, blur=(0, 0), blur_sigma=(0, 0), noise=0
)


def breast(*channels: int) -> NDArray[np.uint16]:
    """Half an ellipse on the left with texture in it, nothing elsewhere."""
    y, x = np.mgrid[:160, :120]
    inside = np.hypot((y - 80) / 70, x / 90) < 1
    texture = np.random.default_rng(0).integers(10000, 50000, (160, 120, *channels))
    return (texture * inside.reshape(160, 120, *(1 for _ in channels))).astype(np.uint16)


def sample(pixels: NDArray[np.uint16], key: str = "k") -> Sample:
    return Sample(key, pixels, 65535, {})


@pytest.fixture
def views() -> TwoViews:
    return TwoViews((48, 40), CropSection(), PairSection(), RAW, seed=0)


# ---------------------------------------------------------------------------------------------- randomness


def test_views_depend_on_seed_epoch_and_key_alone(views: TwoViews) -> None:
    asked = [(seed, epoch, key) for seed in (0, 1) for epoch in (0, 1) for key in ("a", "b")]
    runs = []
    for order, global_seed in ((asked, 1), (asked[::-1], 2)):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        runs.append({(s, e, k): replace(views, seed=s)(sample(breast(), k), e) for s, e, k in order})
    seen = set()
    for place in asked:
        for name in ("view/a", "view/b"):
            assert torch.equal(runs[0][place][name], runs[1][place][name])
            seen.add(runs[0][place][name].numpy().tobytes())
    assert len(seen) == 2 * len(asked)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_packed_pixels_give_the_same_views(views: TwoViews, channels: tuple[int, ...]) -> None:
    pixels = breast(*channels)
    content = encode_npy(pixels)
    packed = PackedPixels(lambda offset, size: content[offset : offset + size], len(content))
    for epoch in range(5):
        made, same = views(sample(pixels), epoch), views(replace(sample(pixels), pixels=packed), epoch)
        for name in ("view/a", "view/b"):
            assert made[name].shape == (len(pixels.shape) * 2 - 3, 48, 40)
            assert torch.equal(made[name], same[name])


def test_switching_a_step_off_leaves_the_others_as_they_were(views: TwoViews) -> None:
    quiet = replace(views, pair=PairSection(noise=0))
    for epoch in range(5):
        noisy, clean = views(sample(breast()), epoch)["view/a"], quiet(sample(breast()), epoch)["view/a"]
        assert not torch.equal(noisy, clean)
        assert (noisy - clean).abs().max() < 5 * 0.01


def test_crops_of_the_two_views_are_drawn_apart(views: TwoViews) -> None:
    """Each pixel holds its own row number: a view's mean row is where its crop lies."""
    rows = np.tile(np.arange(1, 161, dtype=np.uint16)[:, None], (1, 120)) * 400
    plain = replace(views, crop=CropSection(area=(0.05, 0.3)), pair=PLAIN)
    made = [plain(sample(rows), epoch) for epoch in range(150)]
    a, b = ([float(views[f"view/{name}"].mean()) for views in made] for name in "ab")
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.3
    assert np.std(a) > 0.05
    assert np.std(b) > 0.05


def test_half_of_the_views_are_mirrored_and_half_turned_over(views: TwoViews) -> None:
    y, x = np.mgrid[:160, :120]
    flips = replace(
        views, crop=WHOLE.model_copy(update={"flip": True}), pair=PLAIN.model_copy(update={"upside_down": True})
    )
    seen = []
    for epoch in range(200):
        for view in (v for k, v in flips(sample((1 + y + 300 * x).astype(np.uint16)), epoch).items() if k != "key"):
            seen.append((bool(view[0, 0, 0] > view[0, 0, -1]), bool(view[0, 0, 0] > view[0, -1, 0])))
    across, down = np.mean(seen, axis=0)
    both = np.mean([a and d for a, d in seen])
    assert across == pytest.approx(0.5, abs=0.1)
    assert down == pytest.approx(0.5, abs=0.1)
    assert both == pytest.approx(0.25, abs=0.1)


def test_flips_can_be_forbidden(views: TwoViews) -> None:
    plain = replace(views, crop=WHOLE, pair=PLAIN)
    upright = replace(plain, size=(48, 36))
    expected = resize(breast(), (0, 0, 160, 120), (48, 36)) / 65535
    for epoch in range(10):
        for name in ("view/a", "view/b"):
            np.testing.assert_allclose(upright(sample(breast()), epoch)[name].numpy(), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------- grey levels


def test_air_stays_black_and_tissue_within_bounds(views: TwoViews) -> None:
    strong = replace(views, pair=PairSection(brightness=1, contrast=1, gamma=1, noise=0.2, blur=(1, 1)))
    unturned = replace(strong, pair=strong.pair.model_copy(update={"rotation": 0.0}))
    still = replace(unturned, crop=WHOLE, pair=unturned.pair.model_copy(update={"upside_down": False}), size=(48, 36))
    air = resize(breast(), (0, 0, 160, 120), (48, 36)) == 0
    assert 0.3 < air.mean() < 0.7
    for epoch in range(20):
        for view in (strong(sample(breast()), epoch)["view/a"], still(sample(breast()), epoch)["view/b"]):
            assert view.dtype == torch.float32
            assert 0 <= view.min() <= view.max() <= 1
            assert view.unique().numel() > 50
        assert (still(sample(breast()), epoch)["view/b"].numpy()[air] == 0).all()


def test_an_image_of_nothing_stays_nothing(views: TwoViews) -> None:
    made = views(sample(np.zeros((90, 70), np.uint16)), 0)
    assert made["view/a"].abs().max() == made["view/b"].abs().max() == 0


def test_codes_of_16_bits_are_kept_apart(views: TwoViews) -> None:
    codes = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    view = replace(views, size=(256, 256), crop=WHOLE, pair=PLAIN)(sample(codes), 0)["view/a"]
    np.testing.assert_array_equal(np.round(view[0].numpy() * 65535), codes)
    toned = replace(views, size=(256, 256), crop=WHOLE, pair=PLAIN.model_copy(update={"gamma": 0.3}))
    assert toned(sample(codes), 0)["view/a"].unique().numel() > 60000


def test_normalisation_comes_last(views: TwoViews) -> None:
    shifted = replace(views, normalise=Normalisation(0.3, 0.2))
    raw, normal = views(sample(breast()), 0)["view/a"], shifted(sample(breast()), 0)["view/a"]
    torch.testing.assert_close(normal, (raw - 0.3) / 0.2)


def test_tone_is_gamma_then_contrast_then_brightness_of_tissue() -> None:
    image = np.random.default_rng(0).uniform(0.1, 0.9, (1, 30, 20)).astype(np.float32)
    tissue = np.ones((30, 20), bool)
    drawn = []
    for seed in range(200):

        def made(**strength: float) -> NDArray[np.float32]:
            return jitter(np.random.default_rng(seed), image, tissue, PLAIN.model_copy(update=strength))  # noqa: B023

        power = np.log(made(gamma=0.5)) / np.log(image)
        contrast = made(contrast=0.5).std() / image.std()
        np.testing.assert_allclose(power, power.mean(), rtol=1e-3)
        np.testing.assert_allclose(made(contrast=0.5).mean(), image.mean(), rtol=1e-4)
        light = made(brightness=0.5) / image
        np.testing.assert_allclose(light, light.mean(), rtol=1e-5)
        drawn.append((power.mean(), contrast, light.mean()))
    logs = np.log(drawn) / math.log(1.5)
    assert np.abs(logs).max() <= 1.001
    np.testing.assert_allclose(logs.mean(axis=0), 0, atol=5 / math.sqrt(3 * 200))
    np.testing.assert_allclose(logs.std(axis=0), 1 / math.sqrt(3), atol=0.1)


def test_a_share_of_the_images_is_blurred_as_scipy_blurs() -> None:
    image = np.random.default_rng(0).random((3, 60, 50), dtype=np.float32)
    made = [blur(np.random.default_rng(seed), image, 0.3, (1.5, 1.5)) for seed in range(300)]
    blurred = [m for m in made if not np.array_equal(m, image)]
    assert len(blurred) / 300 == pytest.approx(0.3, abs=0.1)
    for channel in range(3):
        exact = ndimage.gaussian_filter(image[channel].astype(np.float64), 1.5, truncate=6)
        np.testing.assert_allclose(blurred[0][channel], exact, atol=5e-3)


def test_noise_is_white_and_finer_than_8_bits() -> None:
    for seed in range(10):
        made = noise(np.random.default_rng(seed), (1, 100, 100), 0.01)
        assert made.dtype == np.float32
        assert abs(made.mean()) < 5 * 0.01 / 100
        assert made.std() <= 0.0103
        assert len(np.unique(made)) > 9000
    widths = [noise(np.random.default_rng(seed), (1, 20, 20), 0.01).std() for seed in range(200)]
    assert np.mean(widths) == pytest.approx(0.005, rel=0.15)


# ---------------------------------------------------------------------------------------------- turns


@settings(max_examples=30)
@given(st.floats(-0.7, 0.7), st.floats(0.3, 0.5), st.floats(0.3, 0.7), st.floats(0.3, 0.7))
def test_a_turned_crop_shows_the_film_turned_about_the_crops_centre(
    angle: float, share: float, across: float, down: float
) -> None:
    """On a film that is linear in x and y, every pixel of the view tells where it was taken."""
    y, x = np.mgrid[:400, :300].astype(np.float64)
    size, box = (40, 30), (down * 400 * (1 - share), across * 300 * (1 - share), 400 * share, 300 * share)
    ys, xs = (turned((1000 + 10 * plane).astype(np.uint16), box, size, angle)[0] for plane in (y, x))
    step = 400 * share / 40
    v, u = np.meshgrid(np.arange(40) - 19.5, np.arange(30) - 14.5, indexing="ij")
    expected_y = box[0] + box[2] / 2 - 0.5 + step * (v * math.cos(angle) - u * math.sin(angle))
    expected_x = box[1] + box[3] / 2 - 0.5 + step * (v * math.sin(angle) + u * math.cos(angle))
    inside = (
        (expected_y > 2 * step)
        & (expected_y < 399 - 2 * step)
        & (expected_x > 2 * step)
        & (expected_x < 299 - 2 * step)
    )
    inside[[0, -1]] = inside[:, [0, -1]] = False  # a crop's edge pixels see less than their whole surroundings
    assert inside.mean() > 0.3
    np.testing.assert_allclose(((ys - 1000) / 10)[inside], expected_y[inside], atol=0.15)
    np.testing.assert_allclose(((xs - 1000) / 10)[inside], expected_x[inside], atol=0.15)


def test_what_a_turn_brings_in_from_beyond_the_film_is_black() -> None:
    bright = np.full((200, 200), 60000, np.uint16)
    made = turned(bright, (0, 0, 200, 200), (50, 50), math.radians(30))
    assert made[0, 0, 0] == 0
    np.testing.assert_allclose(made[0, 20:30, 20:30], 60000)
    v, u = np.meshgrid(np.arange(50) - 24.5, np.arange(50) - 24.5, indexing="ij")
    c, d = math.cos(math.radians(30)), math.sin(math.radians(30))
    beyond = np.maximum(np.abs(v * c - u * d), np.abs(v * d + u * c)) - 25
    assert (made[0][beyond > 0.6] == 0).all()
    np.testing.assert_allclose(made[0][beyond < -0.6], 60000, rtol=1e-6)


def test_no_turn_is_the_crop() -> None:
    box = (10.5, 20.25, 90.0, 60.0)
    np.testing.assert_array_equal(turned(breast(), box, (30, 20), 0), resize(breast(), box, (30, 20)))
    near = turned(breast(), box, (30, 20), 1e-9)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(near[inner], resize(breast(), box, (30, 20))[inner], rtol=0.05, atol=1500)
