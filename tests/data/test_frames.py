"""Frames of an image: never stretched, air is air, and a training view without its steps is the frame itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import ndimage

from miram.data.frames import AugmentSection, TrainFrames, framed, frames, whole_box
from miram.data.packed import PackedPixels, encode_npy
from miram.data.resample import resize
from miram.data.shards import Sample, ShardDataset
from miram.data.views import Normalisation

RAW = Normalisation(0, 1)
OFF = AugmentSection(
    flip=False,
    upside_down=False,
    rotation=0,
    zoom=(1, 1),
    shift=0,
    gamma=0,
    contrast=0,
    brightness=0,
    blur=0,
    noise=0,
    tissue=0,
)


def breast(shape: tuple[int, int] = (160, 70), *channels: int) -> NDArray[np.uint16]:
    """Half an ellipse on the left with texture in it, nothing elsewhere."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = np.hypot((y - shape[0] / 2) / (0.45 * shape[0]), x / (0.9 * shape[1])) < 1
    texture = np.random.default_rng(0).integers(10000, 50000, (*shape, *channels))
    return (texture * inside.reshape(*shape, *(1 for _ in channels))).astype(np.uint16)


def sample(pixels: NDArray[np.generic], key: str = "k") -> Sample:
    return Sample(key, pixels, int(np.iinfo(pixels.dtype).max), {})


def packed(pixels: NDArray[np.uint16]) -> PackedPixels:
    content = encode_npy(pixels)
    return PackedPixels(lambda offset, size: content[offset : offset + size], len(content))


def whole(pixels: NDArray[np.generic], size: tuple[int, int]) -> NDArray[np.float32]:
    (frame,) = frames(sample(pixels), size, RAW, "whole")
    return np.asarray(frame)


def views(size: tuple[int, int] = (64, 48), *, input: str = "whole", **changed: object) -> TrainFrames:
    return TrainFrames(size, input, OFF.model_copy(update=changed), RAW, seed=0)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- the whole in a frame


@pytest.mark.parametrize("shape", [(200, 80), (80, 200), (120, 120), (30, 20)])
@pytest.mark.parametrize("size", [(64, 64), (64, 32), (40, 90)])
def test_a_disc_stays_round_and_lies_where_the_breast_was(shape: tuple[int, int], size: tuple[int, int]) -> None:
    middle, radius = np.array([0.4 * shape[0], 0.45 * shape[1]]), 0.25 * min(shape)
    y, x = np.mgrid[: shape[0], : shape[1]]
    disc = np.where(np.hypot(y - middle[0], x - middle[1]) < radius, 255, 0).astype(np.uint8)
    made = whole(disc, size)[0].astype(float)
    scale = min(size[0] / shape[0], size[1] / shape[1])
    rows, columns = np.mgrid[: size[0], : size[1]]
    y0, x0 = ((rows * made).sum() / made.sum(), (columns * made).sum() / made.sum())
    spread = np.sqrt([((rows - y0) ** 2 * made).sum(), ((columns - x0) ** 2 * made).sum()] / made.sum())
    assert spread == pytest.approx([scale * radius / 2] * 2, rel=0.08, abs=0.15)
    expected = (middle + 0.5) * scale - 0.5 + [(size[0] - scale * shape[0]) / 2, 0]
    assert [y0, x0] == pytest.approx(expected, abs=0.1)


def test_a_narrow_breast_is_padded_on_the_right_alone_and_a_wide_one_above_and_below_alike() -> None:
    narrow = whole(np.full((100, 40), 255, np.uint8), (50, 50))[0]
    np.testing.assert_array_equal(narrow[:, :20], 1)
    np.testing.assert_array_equal(narrow[:, 20:], 0)
    wide = whole(np.full((40, 100), 255, np.uint8), (50, 50))[0]
    np.testing.assert_array_equal(wide[15:35], 1)
    assert not wide[:15].any()
    assert not wide[35:].any()
    odd = whole(np.full((45, 100), 255, np.uint8), (50, 50))[0]  # 22.5 rows
    np.testing.assert_allclose(odd, odd[::-1], atol=1e-6)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_an_image_of_the_frames_shape_is_plainly_resized(channels: tuple[int, ...]) -> None:
    pixels = breast((160, 80), *channels)
    same = resize(pixels, (0, 0, 160, 80), (64, 32)) / np.float32(65535)
    np.testing.assert_array_equal(whole(pixels, (64, 32)), same)


def test_every_stored_pixel_counts() -> None:
    """Area filter, not a sampling: a stripe finer than a pixel of the frame keeps its share."""
    pixels = np.zeros((400, 300), np.uint8)
    pixels[:, ::10] = 255
    inside = whole(pixels, (40, 40))[0, 2:-2, 2:27]
    np.testing.assert_allclose(inside, 0.1, atol=0.01)


@pytest.mark.parametrize("input", ["whole", "windows"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_packed_pixels_give_the_same(input: str, channels: tuple[int, ...]) -> None:
    pixels = breast((160, 70), *channels)
    stored = replace(sample(pixels), pixels=packed(pixels))
    assert torch.equal(frames(sample(pixels), (48, 40), RAW, input), frames(stored, (48, 40), RAW, input))  # type: ignore[arg-type]
    draw = TrainFrames((48, 40), input, AugmentSection(), RAW, seed=0)  # type: ignore[arg-type]
    for epoch in range(4):
        made, same = draw(sample(pixels), epoch)["image"], draw(stored, epoch)["image"]
        assert made.shape == (*(channels or (1,))[:1], 48, 40)
        assert torch.equal(made, same)


def test_air_is_what_normalisation_makes_of_zero() -> None:
    of_each = Normalisation((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    pixels = breast((160, 70), 3)
    (frame,) = frames(sample(pixels), (64, 64), of_each, "whole")
    air = torch.tensor([-0.2 / 0.5, -0.3 / 0.6, -0.4 / 0.7])
    assert torch.allclose(frame[:, :, 40:], air[:, None, None].expand(3, 64, 24))
    shown = TrainFrames((64, 64), "whole", AugmentSection(), of_each, seed=0)(sample(pixels), 0)["image"]
    corners = torch.stack([shown[:, 0, 32], shown[:, -1, 32]])  # half-way between wall and edge, whatever the flip
    assert torch.allclose(corners, air.expand(2, 3))


# ---------------------------------------------------------------------------------------------- beyond the image


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.floats(-60, 60), st.floats(-60, 60)),
    st.tuples(st.floats(20, 150), st.floats(20, 150)),
    st.tuples(st.integers(5, 60), st.integers(5, 60)),
)
def test_a_box_beyond_the_image_is_that_of_an_image_with_air_around_it(
    start: tuple[float, float], extent: tuple[float, float], size: tuple[int, int]
) -> None:
    """But for the frame's pixels along the edge, where `resize` lets nothing of another crop bleed in."""
    pixels = breast((90, 70))
    wide = np.pad(pixels, 300)
    made = framed(pixels, (*start, *extent), size)
    padded = resize(wide, (start[0] + 300, start[1] + 300, *extent), size)
    steps = [e / s for e, s in zip(extent, size, strict=True)]
    centres = [s + (np.arange(n) + 0.5) * step for s, n, step in zip(start, size, steps, strict=True)]
    reach = [max(step, 1.0) for step in steps]  # enlarged, a pixel is drawn from stored ones a whole pixel away
    inner = [(c > 2 * d) & (c < n - 2 * d) for c, n, d in zip(centres, (90, 70), reach, strict=True)]
    outer = [(c < -d) | (c > n + d) for c, n, d in zip(centres, (90, 70), reach, strict=True)]
    np.testing.assert_allclose(made[:, inner[0]][..., inner[1]], padded[:, inner[0]][..., inner[1]], atol=0.1)
    assert not made[:, outer[0]].any()
    assert not made[..., outer[1]].any()


def test_an_image_out_of_sight_is_air() -> None:
    assert not framed(breast(), (500.0, 0.0, 50.0, 50.0), (20, 20)).any()
    assert not framed(breast(), (0.0, -80.0, 50.0, 50.0), (20, 20)).any()


# ---------------------------------------------------------------------------------------------- training views


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from([(), (3,)]),
)
def test_with_every_step_off_a_view_is_the_frame(
    shape: tuple[int, int], size: tuple[int, int], channels: tuple[int, ...]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (*shape, *channels)).astype(np.uint16)
    normalise = Normalisation(0.3, 0.2)
    view = TrainFrames(size, "whole", OFF, normalise, seed=0)(sample(pixels), 3)
    assert view["key"] == "k"
    assert torch.equal(view["image"], frames(sample(pixels), size, normalise, "whole")[0])


@pytest.mark.parametrize("input", ["whole", "windows"])
def test_a_view_depends_on_seed_epoch_and_key_alone(input: str) -> None:
    section = AugmentSection()
    asked = [(seed, epoch, key) for seed in (0, 1) for epoch in (0, 1) for key in ("a", "b")]
    runs = []
    for order, global_seed in ((asked, 1), (asked[::-1], 2)):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        drawn = {p: TrainFrames((48, 40), input, section, RAW, p[0])(sample(breast(), p[2]), p[1]) for p in order}  # type: ignore[arg-type]
        runs.append({place: view["image"] for place, view in drawn.items()})
    assert all(torch.equal(runs[0][place], runs[1][place]) for place in asked)
    assert len({runs[0][place].numpy().tobytes() for place in asked}) == len(asked)


STEPS = {
    "flip": {"flip": True},
    "upside down": {"upside_down": True},
    "rotation": {"rotation": 20},
    "zoom": {"zoom": (0.7, 1.4)},
    "shift": {"shift": 0.2},
    "tone": {"gamma": 0.3, "contrast": 0.3, "brightness": 0.2},
    "blur": {"blur": 1.0, "blur_sigma": (0.5, 2.0)},
    "noise": {"noise": 0.05},
}


@pytest.mark.parametrize("step", STEPS)
def test_switching_a_step_off_leaves_what_the_others_draw(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every generator is for a purpose: the steps that are left draw the same numbers as with it."""
    import miram.data.frames as module

    drawn: list[tuple[object, ...]] = []
    inner = module.generator

    def noted(*parts: int | str) -> np.random.Generator:
        drawn.append(parts)
        return inner(*parts)

    monkeypatch.setattr(module, "generator", noted)
    all_of = {key: value for values in STEPS.values() for key, value in values.items()}
    without = {key: value for name, values in STEPS.items() if name != step for key, value in values.items()}
    seen = []
    for chosen in (all_of, without):
        drawn.clear()
        views(**chosen)(sample(breast()), 0)
        seen.append(set(drawn))
        assert len(drawn) == len(set(drawn)), "two steps share a generator"
    assert seen[1] <= seen[0]
    alone = views(**STEPS[step])
    assert any(
        not torch.equal(alone(sample(breast()), epoch)["image"], views()(sample(breast()), epoch)["image"])
        for epoch in range(4)
    )


def test_noise_is_the_only_difference_where_noise_is_the_only_step_off() -> None:
    section = {key: value for name, values in STEPS.items() if name != "noise" for key, value in values.items()}
    for epoch in range(4):
        clean, noisy = (views(**section, noise=n)(sample(breast()), epoch)["image"] for n in (0, 0.002))
        assert 0 < (clean - noisy).abs().max() < 0.02


@pytest.mark.parametrize("input", ["whole", "windows"])
def test_air_stays_zero_under_every_tone(input: str) -> None:
    """Seen against the same view without tones: these change tissue, and nothing else."""
    for epoch in range(10):
        toned = views(input=input, gamma=1, contrast=1, brightness=1, noise=0.1, blur=1.0, rotation=20, shift=0.1)
        plain = views(input=input, rotation=20, shift=0.1)
        loud, quiet = (v(sample(breast()), epoch)["image"] for v in (toned, plain))
        assert not loud[quiet == 0].any()
        assert (loud[quiet > 0] != quiet[quiet > 0]).float().mean() > 0.9
        assert loud.min() >= 0
        assert loud.max() <= 1


def test_a_flipped_view_is_the_frame_flipped() -> None:
    plain = views()(sample(breast()), 0)["image"]
    kinds = {plain.numpy().tobytes(): "no", plain.flip(2).numpy().tobytes(): "across"}
    kinds |= {plain.flip(1).numpy().tobytes(): "down", plain.flip(1, 2).numpy().tobytes(): "both"}
    seen = [
        kinds[views(flip=True, upside_down=True)(sample(breast()), e)["image"].contiguous().numpy().tobytes()]
        for e in range(80)
    ]
    assert all(8 < seen.count(kind) < 34 for kind in kinds.values()), seen


def smooth(shape: tuple[int, int]) -> NDArray[np.uint16]:
    """A film of soft blobs, dark at its edges."""
    rng = np.random.default_rng(1)
    blobs = ndimage.gaussian_filter(rng.random(shape), 6)
    y, x = np.mgrid[: shape[0], : shape[1]]
    edge = np.sin(np.pi * (y + 0.5) / shape[0]) * np.sin(np.pi * (x + 0.5) / shape[1])
    return ((blobs - blobs.min()) / np.ptp(blobs) * edge * 60000 + 500).astype(np.uint16)


@pytest.mark.parametrize("shape", [(128, 64), (128, 40), (90, 100)])
def test_turn_zoom_and_shift_are_one_affine_map_about_the_images_middle(shape: tuple[int, int]) -> None:
    """Against a map written out for the frame: p -> (turn (p - m) + shift) zoom + m, m the image's middle in it."""
    from miram.engine.seeding import generator

    size, pixels = (64, 48), smooth(shape)
    made = views(size, rotation=30, zoom=(0.8, 1.25), shift=0.1)
    for epoch in range(4):

        def draw(step: str, epoch: int = epoch) -> np.random.Generator:
            return generator(0, epoch, f"augment/{step}", "k")

        angle = math.radians(draw("rotation").uniform(-1, 1) * 30)
        zoom = math.exp(draw("zoom").uniform(*np.log((0.8, 1.25))))
        scale = min(size[0] / shape[0], size[1] / shape[1])
        moved = draw("shift").uniform(-1, 1, 2) * 0.1 * np.array(shape)  # in stored pixels
        middle = np.array(shape) / 2
        in_frame = np.array([size[0] / 2, middle[1] * scale])
        rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
        place = np.stack([rows.ravel() - in_frame[0], columns.ravel() - in_frame[1]])
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        stored = turn @ place / (scale * zoom) + (middle - moved)[:, None] - 0.5
        blurred = ndimage.gaussian_filter(pixels / 65535, 0.4 / scale)  # the filter of the resampling, nearly
        expected = ndimage.map_coordinates(blurred, stored, order=1, mode="constant").reshape(size)
        image = made(sample(pixels), epoch)["image"].numpy()[0]
        assert np.abs(image - expected).mean() < 0.01
        assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.995


def test_turning_does_not_alias() -> None:
    """Stripes far finer than a pixel of the view become grey, turned or not."""
    pixels = np.zeros((800, 400), np.uint8)
    pixels[:, ::4] = pixels[:, 1::4] = 250
    pixels[400:] += 2
    image = views((64, 64), rotation=45)(sample(pixels), 1)["image"].numpy()[0]
    inside = ndimage.binary_erosion(image > 0.2, iterations=4)
    assert inside.sum() > 300
    np.testing.assert_allclose(image[inside], 126 / 255, atol=0.03)


@pytest.mark.parametrize("shape", [(10, 2000), (2000, 10), (1, 1), (3, 500)])
def test_odd_shapes_survive_the_roughest_settings(shape: tuple[int, int]) -> None:
    pixels = np.full(shape, 200, np.uint8)
    for input in ("whole", "windows"):
        for epoch in range(10):
            rough = views((64, 40), input=input, rotation=45, zoom=(0.25, 4), shift=0.4)
            image = rough(sample(pixels), epoch)["image"]
            assert image.isfinite().all()
            assert image.any()


def test_a_view_of_windows_is_a_crop_at_the_windows_scale_with_tissue_in_it() -> None:
    """Of a ramp, a crop tells by its values where it lies and how large its pixels are."""
    ramp = np.broadcast_to(np.arange(1, 601)[:, None], (600, 100)).astype(np.uint16)
    tops = []
    for epoch in range(30):
        column = views((40, 40), input="windows")(sample(ramp), epoch)["image"][0, :, 20].numpy() * 65535
        assert (column[35] - column[5]) / 30 == pytest.approx(2.5, abs=0.01)  # 100 columns in 40
        tops.append(column[0])
    assert min(tops) < 60
    assert max(tops) > 440
    halves = np.where(np.arange(600)[:, None] < 150, 1000, 0) * np.ones((600, 100))
    drawn = TrainFrames((40, 40), "windows", OFF.model_copy(update={"tissue": 0.25}), RAW, seed=0)
    shares = [(drawn(sample(halves.astype(np.uint16), f"{k}"), 0)["image"] > 0).float().mean() for k in range(40)]
    assert np.mean(np.array(shares) >= 0.2) > 0.9  # ten draws of it; a third of the places would do


def test_zoom_and_area_change_the_scale_of_windows() -> None:
    ramp = np.broadcast_to(np.arange(1, 601)[:, None], (600, 100)).astype(np.uint16)

    def steps(**changed: object) -> NDArray[np.float64]:
        drawn = views((40, 40), input="windows", **changed)
        images = [drawn(sample(ramp), epoch)["image"][0, :, 20].numpy() * 65535 for epoch in range(40)]
        return np.array([(image[35] - image[5]) / 30 for image in images])

    assert steps(zoom=(2, 2)) == pytest.approx(1.25, abs=0.02)
    by_area = steps(area=(0.25, 1.0))
    assert 1.2 < by_area.min() < 1.5
    assert 2.2 < by_area.max() < 2.55


def test_mild_defaults_keep_the_lesions(phantoms: Path) -> None:
    """Seen on its mask, shown as if it were the film: no default view loses a tenth of a lesion."""
    shards = ShardDataset(phantoms)
    quiet = AugmentSection(gamma=0, contrast=0, brightness=0, blur=0, noise=0, zoom=(1.1, 1.1))
    draw, lesions = TrainFrames((96, 96), "whole", quiet, RAW, seed=0), 0
    for i in range(len(shards)):
        mask = shards[i].mask
        for value in np.unique(mask)[1:]:
            lesion, lesions = (mask == value) * np.uint8(255), lesions + 1
            scale = 1.1 * min(96 / mask.shape[0], 96 / mask.shape[1])
            for epoch in range(10):
                shown = draw(Sample(shards[i].key, lesion, 255, {}), epoch)["image"].sum().item()
                assert shown > 0.9 * scale**2 * (lesion > 0).sum() - 1.5
    assert lesions > 3


def test_bounds_out_of_order_are_refused_with_the_smaller_one_first() -> None:
    for key in ("zoom", "area", "blur_sigma"):
        with pytest.raises(ValidationError, match="the smaller bound comes first"):
            AugmentSection.model_validate({key: (0.9, 0.5)})


def test_the_box_of_a_whole_image_has_the_frames_shape() -> None:
    top, left, height, width = whole_box((100, 40), (64, 64))
    assert (top, left, height, width) == (0, 0, 100, 100)
    assert whole_box((40, 100), (64, 32)) == (-80, 0, 200, 100)
