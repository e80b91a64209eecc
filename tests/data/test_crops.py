"""Training crops: image and mask stay together, lesions are met, negatives hold none, only the seed decides."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from miram.data.crops import Resolution, TrainCrops, to_raster
from miram.data.findings import IGNORED
from miram.data.frames import AugmentSection
from miram.data.packed import PackedPixels, encode_npy
from miram.data.shards import Sample
from miram.data.views import Normalisation

RAW = Normalisation(0, 1)
QUIET = AugmentSection(gamma=0, contrast=0, brightness=0, blur=0, noise=0, tissue=0)
OFF = QUIET.model_copy(update={"flip": False, "upside_down": False, "rotation": 0, "zoom": (1, 1), "shift": 0})
ONE = np.array([0] + [1] * 255, np.uint8)  # every finding is of class 1
AS_IS = np.arange(256, dtype=np.uint8)  # the mask holds class numbers


def sample(pixels: NDArray[np.generic], mask: NDArray[np.uint8] | None, key: str = "k", **meta: object) -> Sample:
    return Sample(key, pixels, int(np.iinfo(pixels.dtype).max), meta, mask)  # type: ignore[arg-type]


def discs(shape: tuple[int, int], *places: tuple[float, float, float]) -> NDArray[np.uint8]:
    """A mask whose k-th finding is a disc: row, column, radius."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, np.uint8)
    for number, (row, column, radius) in enumerate(places, 1):
        mask[np.hypot(y - row, x - column) < radius] = number
    return mask


def crops(size: tuple[int, int] = (64, 64), **changed: object) -> TrainCrops:
    asked = {"resolution": Resolution(), "augment": OFF, "normalise": RAW, "lookup": ONE, "centred": 2 / 3}
    return TrainCrops(size=size, **{**asked, "avoid": True, "seed": 0, **changed})  # type: ignore[arg-type]


def drawn(draw: TrainCrops, one: Sample, epoch: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    made = draw(one, epoch)
    assert isinstance(made["image"], torch.Tensor)
    assert isinstance(made["mask"], torch.Tensor)
    return made["image"].numpy(), made["mask"].numpy()


# ---------------------------------------------------------------------------------------------- the raster


def test_a_raster_has_the_resolution_that_is_asked_for_and_never_more_pixels() -> None:
    assert Resolution().raster((400, 300), None) == (400, 300)
    assert Resolution(long_side=100).raster((400, 300), None) == (100, 75)
    assert Resolution(long_side=100).raster((30, 400), 0.1) == (8, 100)
    assert Resolution(long_side=1000).raster((400, 300), None) == (400, 300)
    assert Resolution(mm_per_pixel=0.2).raster((400, 300, 3), 0.05) == (100, 75)
    assert Resolution(mm_per_pixel=0.0503).raster((400, 300), 0.05) == (400, 300)  # the same but for rounding
    assert Resolution(long_side=3).raster((2, 400), None) == (1, 3)


@pytest.mark.parametrize("spacing", [None, 0.2])
def test_millimetres_are_refused_where_the_spacing_is_unknown_or_coarser(spacing: float | None) -> None:
    with pytest.raises(ValueError, match=r"unknown|finer"):
        Resolution(mm_per_pixel=0.1).raster((400, 300), spacing)


def test_a_resolution_is_said_in_one_way_and_positive() -> None:
    for bad in ({"mm_per_pixel": 0.1, "long_side": 512}, {"long_side": 0}, {"mm_per_pixel": -1.0}):
        with pytest.raises(ValueError, match=r"one of them|above zero"):
            Resolution(**bad)  # type: ignore[arg-type]


def test_a_raster_agrees_with_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70)).astype(np.uint8)
    made = to_raster(sample(pixels, None), Resolution(long_side=40))[0]
    other = Image.fromarray(pixels.astype(np.float32)).resize((31, 40), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(made, np.asarray(other) / 255, atol=1e-5)
    same = to_raster(sample(pixels, None), Resolution())[0]
    np.testing.assert_allclose(same, pixels / 255, atol=1e-6)


# ---------------------------------------------------------------------------------------------- cut from the raster


@pytest.mark.parametrize("long_side", [None, 150, 97])
@pytest.mark.parametrize("centred", [0.0, 1.0])
def test_a_crop_to_which_nothing_is_done_is_cut_from_the_raster(long_side: int | None, centred: float) -> None:
    """Found in it by brute force, at whole pixels; the mask is the one-hot raster's largest class there."""
    pixels = np.random.default_rng(0).integers(1, 65536, (230, 160)).astype(np.uint16)
    mask = discs((230, 160), (60, 40, 15), (150, 120, 9), (228, 158, 9))
    resolution = Resolution(long_side=long_side)
    whole = to_raster(sample(pixels, mask), resolution)[0]
    shares = [to_raster(sample(((mask > 0) == k) * np.uint8(255), None), resolution)[0] for k in (0, 1)]
    sure = np.abs(shares[0] - shares[1]) > 1e-4  # where both are alike likely, rounding decides
    for epoch in range(6):
        image, labels = drawn(crops((48, 40), resolution=resolution, centred=centred), sample(pixels, mask), epoch)
        seen = np.lib.stride_tricks.sliding_window_view(whole, (48, 40))
        ((row, column),) = np.argwhere(np.abs(seen[..., ::9, ::9] - image[0, ::9, ::9]).max((2, 3)) < 1e-4)
        here = np.s_[row : row + 48, column : column + 40]
        np.testing.assert_allclose(image[0], whole[here], atol=1e-5)
        np.testing.assert_array_equal(labels[sure[here]], np.argmax(shares, axis=0)[here][sure[here]])


def test_what_a_small_image_leaves_of_a_crop_is_air_and_background() -> None:
    pixels, mask = np.full((50, 30), 200, np.uint8), np.ones((50, 30), np.uint8)
    made = crops((64, 64), normalise=Normalisation(0.5, 0.25))(sample(pixels, mask), 0)
    air = torch.full((64, 64), -2.0)
    air[:50, :30] = (200 / 255 - 0.5) / 0.25
    assert torch.allclose(made["image"][0], air, atol=1e-5)  # type: ignore[index]
    assert torch.equal(made["mask"], (air > -1).long())


# ---------------------------------------------------------------------------------------------- kept together


MOVES: dict[str, dict[str, object]] = {
    "nothing": {},
    "flip": {"flip": True, "upside_down": True},
    "rotation": {"rotation": 45},
    "zoom": {"zoom": (0.6, 1.6)},
    "shift": {"shift": 0.3},
    "all": {"flip": True, "upside_down": True, "rotation": 30, "zoom": (0.7, 1.4), "shift": 0.1},
}


@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("long_side", [None, 170])
def test_an_image_made_of_its_mask_stays_its_mask(moves: str, long_side: int | None) -> None:
    mask = discs((300, 220), (80, 60, 40), (200, 150, 30), (20, 200, 18), (290, 10, 25))
    draw = crops(augment=OFF.model_copy(update=MOVES[moves]), resolution=Resolution(long_side=long_side), centred=1.0)
    for epoch in range(25):
        image, labels = drawn(draw, sample((mask > 0) * np.uint8(255), mask, f"k{epoch % 5}"), epoch)
        said = image[0] > 0.5
        assert 2 * (said & (labels == 1)).sum() >= 0.98 * (said.sum() + (labels == 1).sum())
        assert said.any()


@pytest.mark.parametrize("moves", MOVES)
def test_each_of_several_classes_stays_where_its_grey_level_is(moves: str) -> None:
    """Classes lie side by side, one is ignored: where a class's own picture is bright, the mask has its number."""
    y, x = np.mgrid[:240, :200]
    mask = np.select([np.hypot(y - 120, x - 90) < 30, x < 60, (y > 160) & (x < 150)], [3, 1, 2], 0).astype(np.uint8)
    lookup = np.array([0, 1, IGNORED, 2] + [0] * 252, np.uint8)
    channels = np.stack([(mask == value) * np.uint8(255) for value in (1, 2, 3)], axis=-1)
    draw = crops(augment=OFF.model_copy(update=MOVES[moves]), lookup=lookup, centred=0.5, avoid=False)
    seen = set()
    for epoch in range(12):
        image, labels = drawn(draw, sample(channels, mask), epoch)
        for channel, value in enumerate((1, IGNORED, 2)):
            said, true = image[channel] > 0.5, labels == value
            assert 2 * (said & true).sum() >= 0.97 * (said.sum() + true.sum()) - 8
        seen |= set(np.unique(labels).tolist())
    assert seen == {0, 1, 2, IGNORED}


def test_a_mask_is_the_same_however_little_of_it_is_looked_at() -> None:
    """Findings are cut out before they are resampled: against a mask with a pixel far away, which forbids that."""
    mask = discs((300, 220), (150, 110, 9))
    far = mask.copy()
    far[0, 0] = far[-1, -1] = IGNORED
    lookup = np.where(AS_IS == IGNORED, IGNORED, ONE).astype(np.uint8)
    draw = crops((200, 150), augment=OFF.model_copy(update=MOVES["all"]), centred=1.0, lookup=lookup)
    for epoch in range(15):
        (_, little), (_, much) = (drawn(draw, sample(mask * np.uint8(9), one), epoch) for one in (mask, far))
        assert (little == 1).sum() > 50
        assert ((little == 1) != (much == 1)).sum() <= 0.03 * (little == 1).sum() + 2


# ---------------------------------------------------------------------------------------------- where crops lie


def test_a_third_of_the_crops_is_without_a_finding_and_the_others_hold_one() -> None:
    mask = discs((400, 300), (100, 80, 6), (300, 200, 12))
    pixels = np.full((400, 300), 9, np.uint8)
    positive = [drawn(crops(augment=QUIET), sample(pixels, mask), epoch)[1].any() for epoch in range(300)]
    assert 0.6 < np.mean(positive) < 2 / 3 + 0.06
    always = crops(augment=QUIET, centred=1.0)
    assert all(drawn(always, sample(pixels, mask), epoch)[1].any() for epoch in range(60))
    never = crops(augment=QUIET, centred=0.0)
    assert not any(drawn(never, sample(pixels, mask), epoch)[1].any() for epoch in range(60))


def test_findings_are_not_avoided_where_that_is_not_asked_for_or_not_to_be_had() -> None:
    mask, pixels = discs((400, 300), (100, 80, 40)), np.full((400, 300), 9, np.uint8)
    free = crops((128, 128), centred=0.0, avoid=False)
    assert 0.1 < np.mean([drawn(free, sample(pixels, mask), epoch)[1].any() for epoch in range(100)]) < 0.8
    everywhere = sample(pixels, np.ones_like(mask))
    assert drawn(crops((128, 128), centred=0.0), everywhere, 0)[1].all()


@pytest.mark.parametrize("place", [(3, 3), (3, 296), (396, 4), (200, 1), (399, 150)])
def test_a_finding_in_a_corner_stays_in_sight_whatever_is_done(place: tuple[int, int]) -> None:
    mask, pixels = discs((400, 300), (*place, 6)), np.full((400, 300), 9, np.uint8)
    rough = OFF.model_copy(update={"flip": True, "rotation": 45, "zoom": (0.5, 2), "shift": 0.4})
    draw = crops(augment=rough, centred=1.0)
    assert all((drawn(draw, sample(pixels, mask), epoch)[1] == 1).any() for epoch in range(60))


def test_small_pieces_are_met_as_often_as_large_ones() -> None:
    """Both are of one class, one finding even; what a crop is placed around shows by where it lies on a ramp."""
    mask = discs((600, 200), (100, 100, 60), (500, 100, 5)).clip(0, 1)
    ramp = np.broadcast_to(np.arange(1, 601)[:, None], (600, 200)).astype(np.uint16)
    rows = [drawn(crops((32, 32), centred=1.0), sample(ramp, mask), e)[0][0, 16, 16] * 65535 for e in range(80)]
    assert 25 < np.sum(np.array(rows) > 400) < 55


def test_large_findings_are_told_apart_too_and_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks where pixels would take too long: the pixel drawn is of a finding, and of either."""
    from miram.data import findings

    monkeypatch.setattr(findings, "CELLS", 500)
    mask = discs((301, 207), (60, 50, 30), (250, 150, 4))
    found = findings.Findings.of(mask, ONE, 3)
    points = [found.pixel(np.random.default_rng(seed), pieces=True) for seed in range(80)]
    hit = [int(mask[int(y), int(x)]) for y, x in points]
    assert set(hit) == {1, 2}
    assert 20 < hit.count(2) < 60


def test_a_rare_class_is_met_as_often_as_a_common_one() -> None:
    mask = np.zeros((400, 300), np.uint8)
    mask[:, :200], mask[350:360, 250:260] = 1, 2
    pixels = np.full((400, 300), 9, np.uint8)
    draw = crops((64, 64), lookup=AS_IS, centred=1.0)
    assert 0.3 < np.mean([(drawn(draw, sample(pixels, mask), epoch)[1] == 2).any() for epoch in range(80)]) < 0.7


def test_ignored_pixels_are_no_findings() -> None:
    """No crop is placed around them, none avoids them, and they keep their number."""
    mask = np.zeros((300, 300), np.uint8)
    mask[:, 150:] = 7
    lookup = np.where(AS_IS == 7, IGNORED, ONE).astype(np.uint8)
    pixels = np.full((300, 300), 9, np.uint8)
    held = [drawn(crops(lookup=lookup, centred=1.0), sample(pixels, mask), epoch)[1] for epoch in range(40)]
    assert 0.3 < np.mean([(one == IGNORED).mean() for one in held]) < 0.7
    assert {int(v) for one in held for v in np.unique(one)} == {0, IGNORED}
    nothing = np.where(AS_IS == 0, IGNORED, 1).astype(np.uint8)  # what is stored as 0 counts for nothing
    assert (drawn(crops(lookup=nothing), sample(pixels, np.zeros_like(mask)), 0)[1] == IGNORED).all()


def test_crops_that_are_not_centred_hold_tissue_where_that_can_be_had() -> None:
    pixels = np.zeros((400, 300), np.uint8)
    pixels[:120, :100] = 200
    aware = crops(augment=OFF.model_copy(update={"tissue": 0.4}), centred=0.0)
    share = [(drawn(aware, sample(pixels, None, f"{k}"), 0)[0] > 0).mean() for k in range(60)]
    blind = [(drawn(crops(centred=0.0), sample(pixels, None, f"{k}"), 0)[0] > 0).mean() for k in range(60)]
    assert np.mean(np.array(share) >= 0.35) > 0.5  # ten draws of it; an eighth of the places would do
    assert np.mean(np.array(blind) >= 0.35) < 0.3
    assert not drawn(aware, sample(np.zeros_like(pixels), None), 0)[0].any()


# ---------------------------------------------------------------------------------------------- the same again


def test_a_crop_depends_on_seed_epoch_and_key_alone() -> None:
    mask = discs((200, 150), (60, 40, 15), (150, 100, 9))
    pixels = np.random.default_rng(0).integers(0, 65536, (200, 150)).astype(np.uint16)
    asked = [(seed, epoch, key) for seed in (0, 1) for epoch in (0, 1) for key in ("a", "b")]
    runs = []
    for order, global_seed in ((asked, 1), (asked[::-1], 2)):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        made = {p: crops(augment=AugmentSection(), seed=p[0])(sample(pixels, mask, p[2]), p[1]) for p in order}
        runs.append({p: tuple(made[p][name].numpy().tobytes() for name in ("image", "mask")) for p in asked})  # type: ignore[union-attr]
    assert runs[0] == runs[1]
    assert len(set(runs[0].values())) == len(asked)


STEPS: dict[str, dict[str, object]] = {
    "flip": {"flip": True, "upside_down": True},
    "rotation": {"rotation": 20},
    "zoom": {"zoom": (0.7, 1.4)},
    "shift": {"shift": 0.1},
    "tone": {"gamma": 0.3, "contrast": 0.3},
    "blur": {"blur": 1.0},
    "noise": {"noise": 0.05},
}


@pytest.mark.parametrize("step", STEPS)
def test_switching_a_step_off_leaves_what_the_others_draw(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import miram.data.crops as module

    noted: list[tuple[object, ...]] = []
    inner = module.generator
    monkeypatch.setattr(module, "generator", lambda *parts: (noted.append(parts), inner(*parts))[1])
    mask, pixels = discs((200, 150), (60, 40, 15)), np.full((200, 150), 99, np.uint8)
    seen = []
    for left in (STEPS, {name: values for name, values in STEPS.items() if name != step}):
        noted.clear()
        chosen = {key: value for values in left.values() for key, value in values.items()}
        crops(augment=OFF.model_copy(update=chosen), centred=1.0)(sample(pixels, mask), 0)
        seen.append(set(noted))
        # The mask is flipped as the image is: that step alone is drawn twice.
        assert sorted(noted.count(parts) for parts in set(noted)) == [1] * (len(set(noted)) - 1) + [2]
    assert seen[1] <= seen[0]


@pytest.mark.parametrize("channels", [(), (3,)])
def test_packed_pixels_give_the_same(channels: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (200, 150, *channels)).astype(np.uint16)
    content = encode_npy(pixels)
    one = sample(pixels, discs((200, 150), (60, 40, 15)))
    stored = replace(one, pixels=PackedPixels(lambda offset, size: content[offset : offset + size], len(content)))
    for epoch in range(6):
        plain, packed = (crops(augment=AugmentSection())(which, epoch) for which in (one, stored))
        assert plain["image"].shape == (*(channels or (1,)), 64, 64)  # type: ignore[union-attr]
        assert all(torch.equal(plain[name], packed[name]) for name in ("image", "mask"))  # type: ignore[arg-type]


def test_tones_change_the_image_and_never_the_mask_or_the_air() -> None:
    mask = discs((200, 150), (60, 40, 15))
    pixels = np.random.default_rng(0).integers(1, 65536, (200, 150)).astype(np.uint16)
    pixels[100:] = 0
    loud = MOVES["all"] | {"gamma": 1, "contrast": 1, "brightness": 1, "noise": 0.1, "blur": 1.0, "offset": 0.2}
    for epoch in range(10):
        (toned, same), (plain, labels) = (
            drawn(crops(augment=OFF.model_copy(update={"tissue": 0.3, **steps})), sample(pixels, mask), epoch)
            for steps in (loud, MOVES["all"])
        )
        np.testing.assert_array_equal(same, labels)
        assert not toned[plain == 0].any()
        assert (toned[plain > 0] != plain[plain > 0]).mean() > 0.8


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(10, 2000), (2000, 10), (1, 1), (3, 500), (64, 64), (65, 63)]),
    st.sampled_from([(64, 40), (16, 16), (1, 7)]),
    st.integers(0, 1000),
    st.sampled_from([None, 33]),
)
@example((2000, 10), (64, 40), 398, 33)  # beside the image, turned
def test_odd_shapes_survive_the_roughest_settings(
    shape: tuple[int, int], size: tuple[int, int], epoch: int, long_side: int | None
) -> None:
    rough = AugmentSection(rotation=45, zoom=(0.25, 4), shift=0.4)
    mask = np.random.default_rng(epoch).integers(0, 3, shape).astype(np.uint8)
    draw = crops(size, augment=rough, resolution=Resolution(long_side=long_side), centred=0.5)
    for masked in (mask, np.zeros_like(mask), None):
        image, labels = drawn(draw, sample(np.full(shape, 200, np.uint8), masked), epoch)
        assert image.shape == (1, *size)
        assert image.dtype == np.float32
        assert np.isfinite(image).all()
        assert labels.dtype == np.int64
        assert set(np.unique(labels).tolist()) <= {0, 1}


def test_a_turned_finding_out_of_sight_gives_an_empty_mask() -> None:
    """It lies in the upright box around the turned view, and not in the view."""
    from miram.data.findings import Findings
    from miram.data.window import Window

    mask, low = discs((200, 200), (58, 58, 2)), np.zeros(2, np.int64)
    found = Findings.of(mask, ONE, 0)
    window = Window((70.0, 70.0, 60.0, 60.0), (60, 60), math.radians(45))
    assert found.within(*window.reach())
    with np.errstate(all="raise"):
        assert not found.shown(window).any()
        assert not Window((20.0, 90.0, 20.0, 20.0), (20, 20), 0.0).part(slice(0, 0), slice(0, 9), low).show(mask).any()
        assert not Window((900.0, 0.0, 20.0, 20.0), (20, 20), 0.5).show(mask).any()


def test_a_crop_with_a_finding_is_better_than_one_of_air() -> None:
    """Where findings fill the breast there is no tissue without: air teaches nothing."""
    pixels = np.zeros((256, 512), np.uint8)
    pixels[:, :200] = 90
    mask = (pixels > 0).astype(np.uint8)
    draw = crops(centred=0.0, augment=OFF.model_copy(update={"tissue": 0.25}))
    shares = [(drawn(draw, sample(pixels, mask), epoch)[0] > 0).mean() for epoch in range(30)]
    assert min(shares) >= 0.25
