"""Masks of whole images: back on the film where they were drawn, and tiles that nobody can see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from miram.data.breast import isolate
from miram.data.crops import Resolution, to_raster
from miram.data.geometry import Size
from miram.data.record import Film
from miram.data.shards import Sample
from miram.data.views import Normalisation
from miram.finetune.segment.inference import Reading, masked, probabilities

RAW = Normalisation(0, 1)


def sample(pixels: NDArray[np.generic], **meta: object) -> Sample:
    return Sample("k", pixels, int(np.iinfo(pixels.dtype).max), meta)  # type: ignore[arg-type]


def reading(size: tuple[int, int] = (64, 64), **changed: object) -> Reading:
    return Reading(**{"size": size, "resolution": Resolution(), "normalise": RAW, **changed})  # type: ignore[arg-type]


class Bright(nn.Module):
    """Says lesion where the second of the channels is bright: the mask was put there, so it cannot be wrong."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2, H, W): sure, and the surer the further from the threshold."""
        lesion = 20 * (images[:, 1:2] - 0.5)
        return torch.cat([-lesion, lesion], dim=1)


class Sharp(nn.Module):
    """Another model's answers, made thirty times as sure."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, K, H, W)."""
        return torch.as_tensor(30 * self.model(images))


def convolution(channels: int = 3, reach: int = 4) -> nn.Module:
    """A fully convolutional head that looks `reach` pixels far."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(reach):
        layers += [nn.Conv2d(8 if layers else 1, 8, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(8, channels, 1))


def film(height: int = 500, width: int = 380) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """A breast at the right of a film, with three discs in it."""
    y, x = np.mgrid[:height, :width]
    inside = np.hypot((y - height / 2) / (0.4 * height), (width - 1 - x) / (0.8 * width)) < 1
    pixels = (inside * (20000 + 3000 * np.sin(x / 9) * np.cos(y / 11))).astype(np.uint16)
    mask = np.zeros((height, width), np.uint8)
    places = ((0.5, 0.6, 40), (0.35, 0.8, 22), (0.65, 0.85, 16))
    for number, (row, column, radius) in enumerate(places, 1):
        mask[np.hypot(y - row * height, x - column * width) < radius] = number
    return pixels, mask


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("size", "resolution"),
    [
        (Size(), Resolution()),
        (Size(), Resolution(mm_per_pixel=0.13)),
        (Size(max_size=300), Resolution()),
        (Size(spacing_mm=0.13), Resolution(long_side=280)),
    ],
)
def test_a_perfect_model_gives_the_mask_back_on_the_film(size: Size, resolution: Resolution) -> None:
    """Cropped, flipped and made smaller by ingest; then raster, tiles, stitching, stored size, film."""
    pixels, mask = film()
    stored, geometry = isolate(Film(pixels=pixels, max_value=65535, mask=mask, mask_kind="instances", spacing_mm=0.1))
    assert geometry.flipped
    shape = size.shape(geometry.shape, 0.1)
    spacing = 0.1 * geometry.shape[0] / shape[0]
    geometry = geometry.resized(shape)
    both = np.stack([pixels, (mask > 0) * np.uint16(65535), pixels], axis=-1)
    told = probabilities(
        Bright(), sample(geometry.apply(both), spacing_mm=spacing), reading((96, 80), resolution=resolution)
    )
    assert told.shape == (2, *shape)
    np.testing.assert_allclose(told.sum(0), 1, atol=1e-5)
    said = masked(told)
    assert dice(geometry.restore(said) > 0, mask > 0) >= 0.99
    assert dice(said > 0, geometry.apply_mask(mask) > 0) >= 0.99
    assert stored.mask is not None
    assert geometry.restore(said).shape == mask.shape


@pytest.mark.parametrize("shape", [(1, 1), (17, 90), (63, 65), (130, 31)])
@pytest.mark.parametrize("long_side", [None, 47])
def test_images_of_any_size_are_answered_at_their_size(shape: tuple[int, int], long_side: int | None) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)
    told = probabilities(convolution(), sample(pixels), reading(resolution=Resolution(long_side=long_side)))
    assert told.shape == (3, *shape)
    assert told.dtype == np.float32
    np.testing.assert_allclose(told.sum(0), 1, atol=1e-5)


def test_a_small_image_lies_at_the_top_left_of_a_tile_of_air() -> None:
    """And is answered as the model answers that tile, by a forward written out here."""
    pixels = np.random.default_rng(0).integers(1, 256, (40, 20)).astype(np.uint8)
    normalise, model = Normalisation(0.3, 0.2), convolution()
    tile = np.zeros((64, 64), np.float32)
    tile[:40, :20] = pixels / np.float32(255)
    with torch.inference_mode():
        expected = model(torch.from_numpy((tile - 0.3) / 0.2).float()[None, None]).softmax(1)[0, :, :40, :20]
    told = probabilities(model, sample(pixels), reading(normalise=normalise))
    np.testing.assert_allclose(told, expected, atol=1e-5)


class Grey(nn.Module):
    """Says that a pixel is lesion with the probability of its grey level."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) between 0 and 1 -> (B, 2, H, W)."""
        return torch.cat([(1 - images).log(), images.log()], dim=1)


@pytest.mark.parametrize("shape", [(200, 120), (90, 200)])
def test_what_is_said_lies_where_it_was_seen_to_a_part_of_a_pixel(shape: tuple[int, int]) -> None:
    """A ramp is a ramp at every resolution: ten stored pixels a pixel seen, and none is off by a tenth."""
    ramp = sum(np.mgrid[: shape[0], : shape[1]]) * 100 + 5000
    how = reading(resolution=Resolution(long_side=20))
    told = probabilities(Grey(), sample(ramp.astype(np.uint16)), how)[1] * 65535
    np.testing.assert_allclose(told[20:-20, 20:-20], ramp[20:-20, 20:-20], atol=10)


# ---------------------------------------------------------------------------------------------- seams


@pytest.mark.parametrize("shape", [(288, 192), (300, 200), (257, 131)])
def test_tiled_is_whole_for_a_head_that_looks_less_far_than_tiles_overlap(shape: tuple[int, int]) -> None:
    """Inside and at the edge of the image alike: its own zero padding begins there in both."""
    pixels = np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)
    model = Sharp(convolution(reach=2))
    whole = probabilities(model, sample(pixels), reading(shape))
    with torch.inference_mode():
        raster = torch.from_numpy(to_raster(sample(pixels), Resolution()))[None]
        np.testing.assert_allclose(whole, model(raster).softmax(1)[0], atol=1e-5)
    tiled = probabilities(model, sample(pixels), reading((96, 96)))
    assert np.abs(tiled - whole).max() < 1e-3
    side = probabilities(model, sample(pixels[:96, :96].copy()), reading((96, 96)))  # a tile alone
    assert np.abs(side - whole[:, :96, :96]).max() > 0.1, "no seam to hide"


def test_the_number_of_tiles_at_once_changes_nothing_but_the_last_bits() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 130)).astype(np.uint8)
    pixels[:, 50:] = 0
    one, many = (probabilities(convolution(), sample(pixels), reading(batch_size=n)) for n in (1, 7))
    np.testing.assert_allclose(one, many, atol=1e-5)


# ---------------------------------------------------------------------------------------------- air


class Counting(nn.Module):
    """Lesion where there is anything, background on air; counts the tiles that it is shown."""

    def __init__(self, air: float = -50.0):
        super().__init__()
        self.air, self.tiles, self.modes = air, 0, set[bool]()

    def forward(self, images: Tensor) -> Tensor:
        self.tiles += len(images)
        self.modes.add(self.training)
        lesion = torch.where(images[:, :1] > 0, images[:, :1] * 4, self.air)
        return torch.cat([torch.zeros_like(lesion), lesion, torch.full_like(lesion, -60)], dim=1)


def half(shape: tuple[int, int] = (400, 320)) -> NDArray[np.uint8]:
    """Tissue in the lower left corner alone: the first tiles are air."""
    pixels = np.zeros(shape, np.uint8)
    pixels[250:, :100] = np.random.default_rng(0).integers(1, 256, (150, 100))
    return pixels


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_skipped_tiles_change_nothing_for_a_model_that_says_background_on_air(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miram.finetune.segment import inference

    skipping, reads_all = Counting(), Counting()
    told = probabilities(skipping, sample(half()), reading(batch_size=batch_size))
    inner = inference.sliding_window_inference

    def all_read(tiles: Tensor, size: object, n: int, predict: object, *rest: object, **named: object) -> object:
        tiles[:, -1] = 1  # says that there is tissue everywhere
        return inner(tiles, size, n, predict, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(inference, "sliding_window_inference", all_read)
    expected = probabilities(reads_all, sample(half()), reading(batch_size=batch_size))
    np.testing.assert_allclose(told, expected, atol=1e-6)
    assert skipping.tiles < 0.4 * reads_all.tiles


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_on_tiles_of_air_background_is_certain_whatever_the_model_would_say(batch_size: int) -> None:
    told = probabilities(Counting(air=50.0), sample(half()), reading(batch_size=batch_size, overlap=0.0))
    np.testing.assert_array_equal(told[:, :128, 128:], np.eye(3)[0][:, None, None] * np.ones((1, 128, 192)))
    empty = probabilities(Counting(air=50.0), sample(np.zeros((100, 90), np.uint8)), reading(batch_size=batch_size))
    np.testing.assert_array_equal(empty, np.eye(3)[0][:, None, None] * np.ones((1, 100, 90)))


def test_a_model_is_read_in_evaluation_and_left_as_it_was() -> None:
    model = Counting().train()
    probabilities(model, sample(half()), reading())
    assert model.modes == {False}
    assert model.training
    with pytest.raises(ValueError, match="unknown"):
        probabilities(model, sample(half()), reading(resolution=Resolution(mm_per_pixel=0.1)))
    assert model.training


# ---------------------------------------------------------------------------------------------- flips


def test_flips_are_averaged() -> None:
    """Against the mean of readings of flipped images; an image of one tile, so that the tiles are flipped alike."""
    pixels = np.random.default_rng(0).integers(1, 256, (64, 64)).astype(np.uint8)
    model = convolution()
    plain = probabilities(model, sample(pixels), reading())
    down = probabilities(model, sample(pixels[::-1].copy()), reading())[:, ::-1]
    both = probabilities(model, sample(pixels[::-1, ::-1].copy()), reading())[:, ::-1, ::-1]
    told = probabilities(model, sample(pixels), reading(flips=((-2,), (-2, -1))))
    np.testing.assert_allclose(told, (plain + down + both) / 3, atol=1e-5)
    assert np.abs(told - plain).max() > 1e-3


def test_a_reading_with_its_flip_is_the_same_for_the_flipped_image() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (128, 96)).astype(np.uint8)
    how = reading((64, 48), flips=((-2,),))
    told, turned = (probabilities(convolution(), sample(p.copy()), how) for p in (pixels, pixels[::-1]))
    np.testing.assert_allclose(told, turned[:, ::-1], atol=1e-5)


# ---------------------------------------------------------------------------------------------- from probabilities


def test_the_most_probable_class_is_said_or_the_most_probable_that_reaches_its_threshold() -> None:
    told = np.array([[0.6, 0.1, 0.3, 0.5, 0.0], [0.3, 0.5, 0.3, 0.2, 0.5], [0.1, 0.4, 0.4, 0.3, 0.5]], np.float32)[
        :, None
    ]
    np.testing.assert_array_equal(masked(told), [[0, 1, 2, 0, 1]])
    np.testing.assert_array_equal(masked(told, (0.3, 0.3)), [[1, 1, 2, 2, 1]])
    np.testing.assert_array_equal(masked(told, (0.6, 0.4)), [[0, 2, 2, 0, 2]])
    assert masked(told, (0.3, 0.3)).dtype == masked(told).dtype == np.uint8
    np.testing.assert_array_equal(masked(told, (1.0, 1.0)), 0)


def test_small_components_are_dropped_class_by_class() -> None:
    """Against a fill written out here, pixel by pixel."""
    rng = np.random.default_rng(0)
    told = rng.dirichlet([2, 1, 1], (40, 30)).astype(np.float32).transpose(2, 0, 1)
    told = np.stack([ndimage.gaussian_filter(plane, 0.7) for plane in told])
    plain = masked(told)
    for smallest in (0, 1, 2, 6, 30):
        expected, seen = plain.copy(), np.zeros(plain.shape, bool)
        for start in np.argwhere(plain > 0).tolist():
            piece, ends = [], [tuple(start)]
            while ends:
                y, x = ends.pop()
                if not seen[y, x]:
                    seen[y, x] = True
                    piece.append((y, x))
                    around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                    ends += [p for p in around if 0 <= p[0] < 40 and 0 <= p[1] < 30 and plain[p] == plain[y, x]]
            if 0 < len(piece) < smallest:
                expected[tuple(np.transpose(piece))] = 0
        np.testing.assert_array_equal(masked(told, smallest=smallest), expected)
    assert (masked(told, smallest=6) != plain).any()
