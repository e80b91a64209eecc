import numpy as np
import pytest
from numpy.typing import NDArray

from miram.data.breast import find_breast, isolate
from miram.data.record import Circle, Film, Pixels

HEIGHT, WIDTH = 900, 760
Mask = NDArray[np.bool_]


def half_ellipse(side: str = "L") -> tuple[NDArray[np.float64], Mask]:
    """Brightness 0..1 that fades towards the skin, and where it is tissue, chest wall on the named side."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    radius = np.hypot((y - 470) / 400, x / 480)
    tissue = radius < 1
    light = np.where(tissue, 0.15 + 0.75 * np.sqrt(np.clip(1 - radius, 0, 1)), 0.0)
    return (light, tissue) if side == "L" else (light[:, ::-1], tissue[:, ::-1])


def film_scan(side: str = "L", seed: int = 0) -> tuple[NDArray[np.uint8], Mask]:
    """Eight bits, the film's own grey behind the breast, noise."""
    light, tissue = half_ellipse(side)
    noise = np.random.default_rng(seed).normal(0, 2, light.shape)
    return np.clip(np.where(tissue, 235 * light, 12) + noise, 0, 255).astype(np.uint8), tissue


def digital(side: str = "L", seed: int = 0) -> tuple[NDArray[np.uint16], Mask]:
    """Twelve bits, zero behind the breast."""
    light, tissue = half_ellipse(side)
    noise = np.random.default_rng(seed).normal(0, 30, light.shape)
    return np.where(tissue, np.clip(4000 * light + noise, 1, 4095), 0).astype(np.uint16), tissue


def overlap(found: Mask, true: Mask) -> float:
    return float((found & true).sum() / (found | true).sum())


def assert_found(pixels: Pixels, max_value: int, tissue: Mask) -> None:
    found = find_breast(pixels, max_value)
    assert found.shape == tissue.shape
    assert overlap(found, tissue) > 0.95
    assert (tissue & ~found).sum() < 0.005 * tissue.sum()  # generous: what is wrong is too much, not too little


@pytest.mark.parametrize("side", ["L", "R"])
class TestFindBreast:
    def test_film_with_grey_background(self, side: str) -> None:
        pixels, tissue = film_scan(side)
        assert_found(pixels, 255, tissue)

    @pytest.mark.parametrize("max_value", [4095, 65535])
    def test_twelve_bits_whatever_the_format_allows(self, side: str, max_value: int) -> None:
        pixels, tissue = digital(side)
        assert_found(pixels, max_value, tissue)

    def test_padded_scan(self, side: str) -> None:
        pixels, tissue = film_scan(side)
        edge = ((40, 40), (150, 150))
        assert_found(np.pad(pixels, edge), 255, np.pad(tissue, edge))

    def test_strip_along_the_top(self, side: str) -> None:
        pixels, tissue = film_scan(side)
        pixels[:35] = 250
        assert_found(pixels, 255, tissue)

    def test_strip_along_the_top_that_runs_into_the_breast(self, side: str) -> None:
        pixels, tissue = film_scan(side)
        pixels, tissue = pixels[90:], tissue[90:]  # the frame now cuts the breast
        pixels[:30] = 250
        assert_found(pixels, 255, tissue)

    def test_strip_along_the_far_edge(self, side: str) -> None:
        pixels, tissue = film_scan(side)
        far = np.s_[:, -70:] if side == "L" else np.s_[:, :70]
        pixels[far] = 250
        assert_found(pixels, 255, tissue)
        assert not find_breast(pixels, 255)[far].any()

    @pytest.mark.parametrize("padding", [0, 60])
    def test_white_edge_on_four_sides(self, side: str, padding: int) -> None:
        pixels, tissue = film_scan(side)
        edge = np.ones(tissue.shape, np.bool_)
        edge[10:-10, 10:-10] = False
        pixels[edge] = 255
        label = np.s_[60:120, 520:700] if side == "L" else np.s_[60:120, 60:240]
        pixels[label] = 235
        pixels, tissue, edge = (np.pad(part, padding) for part in (pixels, tissue, edge))
        found = find_breast(pixels, 255)
        assert_found(pixels, 255, tissue)
        assert not found[padding:, padding:][label].any()
        # Where the breast runs into the edge, some of it may stay, and a little beyond.
        assert (found & edge & ~tissue).sum() < 0.15 * edge.sum()

    def test_black_and_grey_behind_the_breast(self, side: str) -> None:
        pixels, tissue = film_scan(side)
        black = (np.arange(HEIGHT) > 450)[:, None] & ~tissue
        pixels[black] = np.random.default_rng(1).integers(1, 3, int(black.sum()))
        pixels, tissue = (np.pad(part, ((0, 120), (0, 0)), mode="edge") for part in (pixels, tissue))
        assert_found(pixels, 255, tissue)

    def test_dark_half_of_a_breast_is_no_second_background(self, side: str) -> None:
        light, tissue = half_ellipse(side)
        y = np.arange(HEIGHT)[:, None]
        faded = 4000 * light * np.where(y > 500, np.clip(1 - (y - 500) / 250, 0.05, 1), 1)
        pixels = np.where(tissue, np.maximum(faded, 190), 4).astype(np.uint16)
        pixels[:, ::9] += 1
        assert find_breast(pixels, 4095)[tissue].mean() > 0.97

    def test_dark_gap_inside_is_filled(self, side: str) -> None:
        pixels, _ = digital(side)
        x = 200 if side == "L" else WIDTH - 240
        pixels[400:440, x : x + 40] = 0
        assert find_breast(pixels, 4095)[400:440, x : x + 40].all()


def test_outline_is_smooth_on_a_large_film() -> None:
    pixels, _ = digital()
    found = find_breast(np.kron(pixels, np.ones((4, 4), np.uint16)), 4095)
    width = np.count_nonzero(found, axis=1)[1000:2600]  # away from where the outline runs along the rows
    assert np.abs(np.diff(width)).max() < 7  # the blocks of the search are 14 pixels


def test_mirrored_films_have_mirrored_masks() -> None:
    pixels, _ = film_scan()
    pixels = pixels[:896, :752]  # whole blocks
    assert np.array_equal(find_breast(pixels[:, ::-1], 255), find_breast(pixels, 255)[:, ::-1])
    assert np.array_equal(find_breast(pixels[::-1], 255), find_breast(pixels, 255)[::-1])


def test_corner_of_the_frame_and_nipple_are_kept() -> None:
    pixels, tissue = digital()
    nipple = np.s_[455:485, 475:500]
    pixels[nipple], tissue[nipple] = 1500, True
    pixels, tissue = pixels[300:, :], tissue[300:, :]  # the breast fills the upper left corner
    found = find_breast(pixels, 4095)
    assert found[tissue].all()


def test_dark_tissue_beside_a_black_background_is_kept() -> None:
    # Processing may leave a fold near the armpit far darker than the rest: it is no film's grey.
    pixels, tissue = digital()
    fold = np.s_[760:, :90]
    pixels[fold], tissue[fold] = 300, True
    assert find_breast(pixels, 4095)[fold].mean() > 0.95


@pytest.mark.parametrize("shape", [(3000, 2400), (1024, 1024), (257, 300), (1023, 511)])
def test_any_size(shape: tuple[int, int]) -> None:
    rows, columns = (np.arange(n) * m // n for n, m in zip(shape, (HEIGHT, WIDTH), strict=True))
    pixels, tissue = digital()
    assert_found(pixels[np.ix_(rows, columns)], 4095, tissue[np.ix_(rows, columns)])


class TestIsolate:
    @pytest.mark.parametrize("side", ["L", "R"])
    def test_chest_wall_comes_to_the_left(self, side: str) -> None:
        pixels, _ = film_scan(side)
        stored, geometry = isolate(Film(pixels=pixels, max_value=255))
        assert geometry.flipped == (side == "R")
        assert np.count_nonzero(stored.pixels[:, :20]) > 5 * np.count_nonzero(stored.pixels[:, -20:])

    def test_chest_wall_of_a_breast_amid_padding(self) -> None:
        # More of the breast lies in the right half of the frame, but its straight side is on the left.
        pixels, _ = film_scan("L")
        _, geometry = isolate(Film(pixels=np.pad(pixels, ((0, 0), (600, 0))), max_value=255))
        assert not geometry.flipped

    @pytest.mark.parametrize("make", [film_scan, digital])
    @pytest.mark.parametrize("side", ["L", "R"])
    def test_inside_is_unchanged_and_outside_is_zero(self, make, side: str) -> None:  # type: ignore[no-untyped-def]
        pixels, _ = make(side)
        before = pixels.copy()
        found = find_breast(pixels, 4095)
        stored, geometry = isolate(Film(pixels=pixels, max_value=4095))
        back = geometry.restore(stored.pixels)
        assert stored.pixels.dtype == pixels.dtype
        assert np.array_equal(back, np.where(found, pixels, 0))
        assert np.array_equal(pixels, before)

    def test_marker_is_gone(self) -> None:
        pixels, tissue = film_scan()
        pixels[40:130, 600:720] = 255
        pixels[60:110, 630:640] = 0
        stored, geometry = isolate(Film(pixels=pixels, max_value=255))
        assert not geometry.restore(stored.pixels)[40:130, 600:720].any()
        assert overlap(find_breast(pixels, 255), tissue) > 0.95

    def test_marker_in_the_crop_box_is_gone(self) -> None:
        pixels, _ = film_scan()
        pixels[120:150, 400:430] = 255  # the rounded corner of the box
        stored, geometry = isolate(Film(pixels=pixels, max_value=255))
        assert geometry.top < 120 < 150 < geometry.bottom
        assert geometry.left < 400 < 430 < geometry.right
        assert not geometry.restore(stored.pixels)[120:150, 400:430].any()

    def test_crop_is_tight_but_for_the_margin(self) -> None:
        pixels, _ = digital("R")
        found = find_breast(pixels, 4095)
        rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
        _, g = isolate(Film(pixels=pixels, max_value=4095), margin=0.02)
        assert (g.top, g.bottom) == (rows[0] - 18, rows[-1] + 1 + 18)
        assert (g.left, g.right) == (columns[0] - 18, WIDTH)  # the frame ends at the chest wall

    @pytest.mark.parametrize("side", ["L", "R"])
    def test_findings_follow(self, side: str) -> None:
        pixels, _ = digital(side)
        x = 250 if side == "L" else WIDTH - 1 - 250
        mask = np.zeros(pixels.shape, np.uint8)
        pixels[500, x], mask[500, x] = 4095, 2
        film = Film(pixels=pixels, max_value=4095, mask=mask, circles=(Circle(x=x, y=500, radius=9, label="M"),))
        stored, _ = isolate(film)
        assert stored.mask is not None
        (circle,) = stored.circles
        place = int(circle.y), int(circle.x)
        assert (stored.pixels[place], stored.mask[place]) == (4095, 2)
        assert (stored.mask > 0).sum() == 1
        assert (circle.radius, circle.label) == (9, "M")

    def test_crop_holds_all_of_the_mask(self) -> None:
        pixels, _ = digital()
        mask = np.zeros(pixels.shape, np.uint8)
        mask[2, -3] = 1
        stored, geometry = isolate(Film(pixels=pixels, max_value=4095, mask=mask))
        assert stored.mask is not None
        assert np.array_equal(geometry.restore(stored.mask), mask)

    def test_keeps_what_it_does_not_touch(self) -> None:
        pixels, _ = digital()
        stored, _ = isolate(Film(pixels=pixels, max_value=4095, spacing_mm=0.07))
        assert (stored.max_value, stored.spacing_mm, stored.mask, stored.circles) == (4095, 0.07, None, ())

    @pytest.mark.parametrize("value", [0, 7, 200])
    def test_constant_frame_raises(self, value: int) -> None:
        with pytest.raises(ValueError, match="No breast found"):
            isolate(Film(pixels=np.full((400, 300), value, np.uint8), max_value=255))

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("mean", [5, 60])
    def test_noise_alone_raises(self, mean: int) -> None:
        pixels = np.random.default_rng(0).poisson(mean, (700, 600)).astype(np.uint16)
        with pytest.raises(ValueError, match="No breast found"):
            isolate(Film(pixels=pixels, max_value=4095))

    def test_frame_that_never_leaves_the_dark_raises(self) -> None:
        light, _ = half_ellipse()
        faint = (60 * light).astype(np.uint16)
        with pytest.raises(ValueError, match="No breast found"):
            isolate(Film(pixels=faint, max_value=65535))
        isolate(Film(pixels=faint, max_value=255))

    @pytest.mark.filterwarnings("error")
    def test_specks_alone_raise(self) -> None:
        pixels = np.zeros((700, 600), np.uint16)
        pixels[::50, ::50] = 4000
        with pytest.raises(ValueError, match=r"covers 0\.0% of the frame"):
            isolate(Film(pixels=pixels, max_value=4095))

    def test_white_edges_alone_raise(self) -> None:
        pixels = np.random.default_rng(0).poisson(30, (700, 600)).astype(np.uint16)
        pixels[:9], pixels[-9:], pixels[:, :9], pixels[:, -9:] = 4000, 4000, 4000, 4000
        with pytest.raises(ValueError, match="No breast found"):
            isolate(Film(pixels=pixels, max_value=4095))

    def test_marker_alone_raises(self) -> None:
        pixels = np.zeros((1000, 800), np.uint16)
        pixels[50:130, 600:720] = 4000
        with pytest.raises(ValueError, match=r"covers 1\.\d% of the frame"):
            isolate(Film(pixels=pixels, max_value=4095))
