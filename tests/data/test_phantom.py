"""The phantoms: reproducible, labelled as drawn, physical at every size, and not solved by a mean."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from miram.data.phantom import DENSITIES, FRAME_MM, PhantomSettings, records
from miram.data.phantom_texture import Grid, mass, stream
from miram.data.record import Film, Record

SMALL = PhantomSettings(size=256)


def films(patients: int, settings: PhantomSettings, **wanted: str) -> list[tuple[Record, Film]]:
    chosen = [r for r in records(patients, settings) if all(getattr(r, k) == v for k, v in wanted.items())]
    return [(r, r.read()) for r in chosen]


def breast(film: Film) -> NDArray[np.bool_]:
    """The largest thing on the film that is not background: markers and strips are smaller."""
    parts, count = ndimage.label(ndimage.gaussian_filter(film.pixels.astype(float), 1) > 350)
    sizes = ndimage.sum_labels(np.ones(parts.shape), parts, np.arange(1, count + 1))
    return np.asarray(parts == 1 + np.argmax(sizes))


def exponent(film: Film) -> float:
    """Minus the slope of log power over log frequency, 0.15 to 0.9 cycles/mm, in 52 mm of a CC view."""
    spacing, side = film.spacing_mm or 0.0, round(52 / (film.spacing_mm or 1))
    rows, columns = np.nonzero(breast(film))
    top, left = int(rows.mean()) - side // 2, int(columns.mean()) - side // 2
    patch = film.pixels[top : top + side, max(left, 0) : max(left, 0) + side].astype(float)
    window = np.outer(np.hanning(side), np.hanning(side))
    power = np.abs(np.fft.fft2((patch - (patch * window).sum() / window.sum()) * window)) ** 2
    f = np.hypot(np.fft.fftfreq(side, spacing)[:, None], np.fft.fftfreq(side, spacing)[None])
    edges = np.geomspace(0.15, 0.9, 9)
    bins = [(f >= a) & (f < b) for a, b in pairwise(edges)]
    slope = np.polyfit([np.log(f[b]).mean() for b in bins], [np.log(power[b].mean()) for b in bins], 1)[0]
    return float(-slope)


def auc(positive: list[float], negative: list[float]) -> float:
    return float(np.mean(np.array(positive)[:, None] > np.array(negative)[None]))


def test_a_film_depends_on_its_own_names_and_the_seed_alone() -> None:
    few, many = records(2, SMALL), records(5, SMALL)
    assert [r.image_id for r in few] == [r.image_id for r in many[:8]]
    assert [r.labels for r in few] == [r.labels for r in many[:8]]
    later = [r.read() for r in reversed(many)][::-1]
    for record, again in zip(few, later[:8], strict=True):
        film = record.read()
        assert film.circles == again.circles
        np.testing.assert_array_equal(film.pixels, again.pixels)
        np.testing.assert_array_equal(film.mask, again.mask)
    assert len({film.pixels.tobytes() for film in later}) == 20


def test_another_seed_is_another_patient() -> None:
    one, other = (records(1, replace(SMALL, seed=seed))[0].read() for seed in (1, 2))
    assert np.abs(one.pixels.astype(float) - other.pixels).mean() > 50


def test_films_are_twelve_bits_in_a_frame_of_known_scale() -> None:
    for record, film in films(3, SMALL):
        assert film.pixels.dtype == np.uint16
        assert film.pixels.shape == (256, 205)
        assert film.mask is not None
        assert film.mask.shape == film.pixels.shape
        assert film.max_value == 4095 >= film.pixels.max() > 2000
        assert film.spacing_mm == pytest.approx(FRAME_MM / 256)
        assert len(film.circles) == sum(int(record.labels[k]) for k in ("mass", "calc"))


def test_labels_have_the_rates_they_should_without_a_film_rendered() -> None:
    all_records = records(400, SMALL)
    assert 0.36 < np.mean([r.labels["mass"] for r in all_records]) < 0.48
    assert 0.19 < np.mean([r.labels["calc"] for r in all_records]) < 0.31
    balance = Counter((r.split, r.labels["density"]) for r in all_records)
    assert balance == {(split, d): 200 for split in ("train", "test") for d in DENSITIES}
    assert {r.split for r in records(2, SMALL)} == {"train", "test"}


def test_a_patient_has_one_density_and_one_split_and_a_breast_one_set_of_lesions() -> None:
    for patient in range(20):
        four = records(20, SMALL)[4 * patient : 4 * patient + 4]
        assert [(r.laterality, r.view) for r in four] == [("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")]
        assert len({(r.patient_id, r.split, r.labels["density"]) for r in four}) == 1
        assert four[0].labels == four[1].labels
        assert four[2].labels == four[3].labels


def test_circles_hold_the_masks_of_their_findings_and_no_more_than_they_need() -> None:
    seen = Counter[str]()
    for _, film in films(16, SMALL):
        assert film.mask is not None
        assert film.mask.max(initial=0) <= len(film.circles)
        for k, circle in enumerate(film.circles, start=1):
            y, x = np.nonzero(film.mask == k)
            reach = np.hypot(y - circle.y, x - circle.x)
            assert reach.size
            assert reach.max() <= circle.radius
            if circle.label == "mass" and len(film.circles) == 1:
                assert reach.max() >= circle.radius - 1
            seen[circle.label] += 1
    assert min(seen["mass"], seen["calc"]) > 8


def test_lesions_are_drawn_where_the_mask_says_on_both_sides() -> None:
    lost = films(16, replace(SMALL, contrast=0))
    for (record, with_), (_, without) in zip(films(16, SMALL), lost, strict=True):
        change = with_.pixels.astype(int) - without.pixels
        assert with_.mask is not None
        np.testing.assert_array_equal(with_.mask, without.mask)
        assert with_.circles == without.circles
        inside = with_.mask > 0
        near = np.zeros_like(inside)
        yy, xx = np.indices(near.shape)
        for circle in with_.circles:
            near |= np.hypot(yy - circle.y, xx - circle.x) <= 1.6 * circle.radius + 4
        assert not change[~near].any(), record.name
        if inside.any():
            assert change[inside].mean() > 60, record.name
            assert change[inside].mean() > 5 * change[~inside].mean()


def ring_contrasts(settings: PhantomSettings) -> list[float]:
    out = []
    for record, film in films(28, settings):
        if not record.labels["mass"]:
            continue
        assert film.mask is not None
        tissue, body = breast(film), film.mask == 1
        ring = ndimage.binary_dilation(body, iterations=7) & ~ndimage.binary_dilation(body, iterations=3) & tissue
        out.append(float(film.pixels[body].mean() - film.pixels[ring].mean()))
    return out


def test_masses_are_brighter_than_their_surroundings_and_contrast_is_the_reason() -> None:
    drawn, lost = ring_contrasts(SMALL), ring_contrasts(replace(SMALL, contrast=0))
    assert len(drawn) > 30
    assert np.mean(drawn) > 120
    assert abs(np.mean(lost)) < 0.5 * np.mean(drawn)


def test_spectra_are_power_laws_that_steepen_with_density() -> None:
    clean = PhantomSettings(size=512, contrast=0, noise=0)
    found: dict[str, list[float]] = {d: [] for d in DENSITIES}
    for record, film in films(24, clean, view="CC"):
        found[str(record.labels["density"])].append(exponent(film))
    medians = [float(np.median(found[d])) for d in DENSITIES]
    print("exponents", medians)
    assert all(2.2 < m < 3.6 for m in medians), medians
    assert medians[3] - medians[0] > 0.15, medians


def test_the_breast_fills_a_plausible_part_of_the_frame_from_its_own_edge() -> None:
    for record, film in films(12, SMALL):
        shape = breast(film)
        assert 0.15 < shape.mean() < 0.5, record.name
        chest, far = (0, -1) if record.laterality == "L" else (-1, 0)
        assert shape[:, chest].mean() > 0.4, record.name
        assert not shape[:, far].any(), record.name


def test_mean_grey_does_not_give_the_density_away() -> None:
    means: dict[str, list[float]] = {d: [] for d in DENSITIES}
    for record, film in films(36, SMALL):
        means[str(record.labels["density"])].append(float(film.pixels.mean()))
    area = auc(means["d"], means["a"])
    print("AUC", area)
    assert 0.1 < area < 0.9


def test_size_changes_the_resolution_and_nothing_else() -> None:
    fine, coarse = PhantomSettings(size=1024, noise=0), PhantomSettings(size=256, noise=0)
    for (record, large), (_, small) in zip(films(2, fine), films(2, coarse), strict=True):
        reduced = np.asarray(Image.fromarray(large.pixels.astype(np.float32)).resize(small.pixels.shape[::-1], 4))
        inside = breast(small)
        assert np.corrcoef(reduced[inside], small.pixels[inside])[0, 1] > 0.95, record.name
        for a, b in zip(large.circles, small.circles, strict=True):
            assert np.hypot(a.x / 4 - b.x, a.y / 4 - b.y) < 2.5, record.name


def test_a_frame_of_few_pixels_still_has_every_finding() -> None:
    crowded = PhantomSettings(size=64, mass_rate=1, calc_rate=1)
    assert all(len(film.circles) == 2 for _, film in films(60, crowded))


def test_calcifications_smaller_than_a_pixel_still_show() -> None:
    shown = replace(SMALL, size=192, mass_rate=0, calc_rate=1, noise=0)
    for (record, film), (_, empty) in zip(films(4, shown), films(4, replace(shown, contrast=0)), strict=True):
        assert (film.pixels.astype(int) - empty.pixels).max() > 120, record.name


def test_a_mass_is_spiculated_where_the_caller_says_so_and_drawn_otherwise() -> None:
    axis = (np.arange(96, dtype=np.float32) - 47.5) * np.float32(0.25)
    grid = Grid(spacing=0.25, y=axis[:, None], x=axis[None])
    outside = np.hypot(grid.y, grid.x) > 1.5 * 5  # the body ends about its radius, rays go on
    drawn = []
    for seed in range(12):
        free, told, smooth = (mass(5, grid, stream(seed), spiculated=s) for s in (None, True, False))
        assert told[outside].max() > 0.005 > smooth[outside].max()
        drawn.append(np.array_equal(free, told))
        assert drawn[-1] != np.array_equal(free, smooth)
    assert {True, False} == set(drawn)
