"""Text planted on breasts is found; what belongs on a mammogram is not taken for text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from miram.data.breast import find_breast
from miram.data.burned import text_on
from miram.data.image import read_film
from miram.data.phantom import PhantomSettings, render
from miram.data.record import Film, Pixels

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere"))
FOLDERS = {
    "mini_mias": "all-mias/*.pgm",
    "nyu_gmic_samples": "images/*.png",
    "msynth_jpg": "*.jpg",
    "ddsm_tissue_seg": "*/fgt_seg/*.png",
    "cdd_cesm_seg512": "images/*DM*.jpg",
}
WORDS = ["DOE JANE 1957-03-12", "MRN 00423117", "Jane Doe", "12/03/1957", "ID: 8841-22", "R MLO 14:33", "SMITH^MARY"]
SIZES = (16, 24, 40)  # of the font; its capitals are three quarters of that high
Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def breasts() -> list[tuple[Film, Mask]]:
    films = [render(PhantomSettings(size=1200, seed=5), i, "LR"[i % 2], ("CC", "MLO")[i // 2 % 2]) for i in range(6)]
    return [(film, find_breast(film.pixels, film.max_value)) for film in films]


def drawn(word: str, size: int) -> NDArray[np.float32]:
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (int(right - left) + 1, int(bottom - top) + 1))
    ImageDraw.Draw(image).text((-left, -top), word, fill=255, font=font)
    return np.asarray(image, np.float32) / 255


def planted(film: Film, mask: Mask, ink: NDArray[np.float32], value: float, rng: np.random.Generator) -> Pixels | None:
    """The film with ink somewhere wholly inside the breast, or None where it does not fit."""
    room = ndimage.minimum_filter(mask[::8, ::8], tuple(side // 8 + 1 for side in ink.shape))
    places = np.argwhere(room)
    if not len(places) or any(a > b for a, b in zip(ink.shape, mask.shape, strict=True)):
        return None
    middle = places[rng.integers(len(places))] * 8
    y, x = (int(np.clip(m - a // 2, 0, b - a)) for m, a, b in zip(middle, ink.shape, mask.shape, strict=True))
    pixels = film.pixels.copy()
    window = pixels[y : y + ink.shape[0], x : x + ink.shape[1]]
    window[:] = np.rint(window * (1 - ink) + ink * value * film.max_value)
    return pixels


def hits(
    films: list[tuple[Film, Mask]], value: float, *, sizes: tuple[int, ...] = SIZES, turned: bool = False
) -> list[bool]:
    """Of a word planted in each size on each film where it fits: whether it was found."""
    rng, found = np.random.default_rng(3), []
    for film, mask in films:
        for size in sizes:
            ink = drawn(WORDS[rng.integers(len(WORDS))], size)
            pixels = planted(film, mask, ink.T if turned else ink, value, rng)
            found += [] if pixels is None else [text_on(pixels, mask, film.max_value)]
    return found


@pytest.mark.parametrize("value", [1.0, 0.85, 0.0])
@pytest.mark.parametrize("turned", [False, True])
def test_planted_text_is_found(breasts: list[tuple[Film, Mask]], value: float, turned: bool) -> None:
    found = hits(breasts, value, turned=turned)
    assert len(found) >= 2 * len(breasts)
    assert np.mean(found) >= 0.9


def test_phantoms_hold_no_text(breasts: list[tuple[Film, Mask]]) -> None:
    assert not [i for i, (film, mask) in enumerate(breasts) if text_on(film.pixels, mask, film.max_value)]


def test_text_beside_the_breast_does_not_count(breasts: list[tuple[Film, Mask]]) -> None:
    """Every phantom has a marker there; here a mask that leaves the planted text out."""
    film, mask = breasts[0]
    pixels = planted(film, mask, drawn("DOE JANE", 40), 1.0, np.random.default_rng(0))
    assert pixels is not None
    assert text_on(pixels, mask, film.max_value)
    changed = ndimage.binary_dilation(pixels != film.pixels, iterations=3)
    assert not text_on(pixels, mask & ~changed, film.max_value)
    assert not text_on(pixels, np.zeros_like(mask), film.max_value)


@pytest.mark.parametrize("kind", ["calcifications", "clips", "wire", "scratches", "markers", "dust"])
def test_what_lies_on_films_is_no_text(breasts: list[tuple[Film, Mask]], kind: str) -> None:
    for number, (film, mask) in enumerate(breasts):
        rng = np.random.default_rng(number)
        canvas = Image.new("L", mask.shape[::-1])
        draw, places = ImageDraw.Draw(canvas), np.argwhere(mask)[:, ::-1].astype(float)
        centre = places[rng.integers(len(places))]
        for _ in range({"calcifications": 40, "dust": 60, "clips": 4, "markers": 3}.get(kind, 2)):
            x, y = places[rng.integers(len(places))]
            if kind == "calcifications":  # a cluster of specks that differ
                (x, y), r = centre + rng.normal(0, 30, 2), rng.uniform(0.7, 4)
                draw.ellipse((x - r, y - r, x + r, y + r), fill=int(rng.integers(90, 256)))
            elif kind == "clips":
                draw.line((x, y, x + 12, y + 5), fill=255, width=3)
            elif kind == "markers":  # beads
                draw.ellipse((x, y, x + 14, y + 14), fill=255)
            elif kind == "dust":
                draw.point((x, y), fill=255)
            else:
                draw.line((x, y, *places[rng.integers(len(places))]), fill=255, width=1 if kind == "scratches" else 5)
        ink = np.asarray(canvas, np.float32) / 255
        pixels = np.rint(film.pixels * (1 - ink) + ink * film.max_value).astype(film.pixels.dtype)
        assert not text_on(pixels, mask, film.max_value)


def real_films(patterns: dict[str, str], every: int) -> Iterator[tuple[Film, Mask]]:
    for folder, pattern in patterns.items():
        for path in sorted((REAL / folder).glob(pattern))[::every]:
            film = read_film(path)
            yield film, find_breast(film.pixels, film.max_value)


@pytest.mark.skipif(not (REAL / "mini_mias").is_dir(), reason="MIRAM_REAL_DATA names no folder with mini_mias")
def test_real_films_hold_no_text_until_it_is_planted() -> None:
    films = list(real_films(FOLDERS, 4))
    assert len(films) >= 70
    assert not [film for film, mask in films if text_on(film.pixels, mask, film.max_value)]
    large = [(film, mask) for film, mask in films if min(mask.shape) >= 800][::3]
    assert np.mean(hits(large, 1.0)) >= 0.9


def measure() -> None:
    """The table of `miram.data.burned`: `MIRAM_REAL_DATA=... python tests/data/test_burned.py`."""
    settings = PhantomSettings(size=1400, seed=99)
    phantoms = [render(settings, i, "LR"[i % 2], ("CC", "MLO")[i // 2 % 2]) for i in range(40)]
    groups = {"phantoms": [(film, find_breast(film.pixels, film.max_value)) for film in phantoms]}
    groups["films it was made with"] = list(real_films(FOLDERS, 1))
    groups["others"] = list(real_films({"cdd_cesm_seg512": "images/*CM*.jpg"}, 1))
    for name, films in groups.items():
        alarms = sum(text_on(film.pixels, mask, film.max_value) for film, mask in films)
        print(f"{name}: {alarms} false alarms of {len(films)}")
        for sizes in ((12,), (16, 24, 40, 72)):
            for value in (1.0, 0.85, 0.0):
                found = hits(films, value, sizes=sizes)
                print(f"    font {sizes}, paint {value}: {sum(found)} of {len(found)}")


if __name__ == "__main__":
    measure()
