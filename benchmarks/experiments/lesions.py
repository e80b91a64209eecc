"""Squares of phantom films around planted lesions: two tasks that hang on fine detail.

A film is drawn without lesions and cut, where its tissue is, into squares that do not overlap. Even squares get a mass
near the middle (label `margin`: spiculated or indistinct), every other odd square a cluster of microcalcifications
(label `calc`: there or not), so that no task is the other's nuisance. The lesions are the phantom's own
(data/phantom_texture.py); which square has what depends neither on the tissue nor on the patient. A mass of indistinct
margin is a spiculated one blurred: body, halo and brightness are alike, and only the fine rays tell them apart. Every
square's tissue is levelled to one mean grey, as a reader's window does: otherwise how bright a patient is drowns all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from miram.data.archive import Archive
from miram.data.ingest import ingest
from miram.data.phantom import MAX_VALUE, SIDES, PhantomSettings, render
from miram.data.phantom_texture import FRAME_MM, Array, Grid, cluster, mass, stream
from miram.data.record import Film, Record

KEY = b"miram phantoms"  # as of all phantoms: no secret
MARGINS = ("indistinct", "spiculated")
LEVEL = 2048.0  # mean grey level of a square before anything is planted
GREY = 1700.0  # grey levels of one unit of the phantom's tissue
TISSUE = 600  # grey level above which a pixel is breast, not film
PLANTED = 77  # stream of what is planted, apart from the phantom's own

Corner = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class LesionSettings:
    """What the squares look like."""

    seed: int
    """another seed, other patients"""
    film: int = 1200
    """rows of a film of 240 mm"""
    side: int = 96
    """of a square, in pixels of the film"""
    per_film: int = 8
    """squares of a film"""
    margin: float = 2.5
    """contrast of masses, in units of the phantom's"""
    blur_mm: float = 0.5
    """standard deviation of an indistinct margin"""
    calc: float = 0.9
    """contrast of calcifications, in units of the phantom's"""
    mass_mm: tuple[float, float] = (2.5, 5.0)
    """smallest and largest radius of a mass"""
    cluster_mm: tuple[float, float] = (2.0, 4.0)
    """smallest and largest radius of a cluster"""
    off_mm: tuple[float, float] = (1.5, 4.0)
    """how far from the middle, down and across, a mass and a cluster may lie"""

    @property
    def phantom(self) -> PhantomSettings:
        """The film underneath: no lesions of its own, no bright strips."""
        return PhantomSettings(size=self.film, seed=self.seed, mass_rate=0, calc_rate=0, artefacts=0)

    @property
    def spacing(self) -> float:
        """Millimetres a pixel."""
        return FRAME_MM / self.film


def make_lesions(out: Path, patients: int, settings: LesionSettings, workers: int | None = None) -> None:
    """Write the squares of that many patients, two films each, as a data set."""
    # Lists as a manifest gives them back: a set is known again by comparing.
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    archive = Archive(
        dataset="phantom-lesions",
        licence="made by miram, free of rights",
        records=records(patients, settings),
        breast=False,
        quarantine=False,
        settings={"lesions": told},
    )
    ingest(archive, out, KEY, workers)


def records(patients: int, settings: LesionSettings) -> list[Record]:
    """Two films a patient, `per_film` squares a film; nothing is drawn before `read` is called."""
    places = [(p, side, k) for p in range(patients) for side in SIDES for k in range(settings.per_film)]
    return [_record(settings, *place) for place in places]


def _record(settings: LesionSettings, patient: int, side: str, number: int) -> Record:
    positive, name = _positive(settings, patient, side, number), f"s{settings.seed}-p{patient:04d}"
    return Record(
        read=partial(square, settings, patient, side, number),
        name=f"{name} {side} {number}",
        image_id=f"{name}-{side}-{number}".lower(),
        patient_id=name,
        exam_id=name,
        laterality=side,
        view="CC",
        labels={"calc": int(positive)} if number % 2 else {"margin": MARGINS[positive]},
    )


def _stream(settings: LesionSettings, patient: int, side: str, *key: int) -> np.random.Generator:
    return stream(settings.seed, PLANTED, patient, SIDES.index(side), *key)


def _positive(settings: LesionSettings, patient: int, side: str, number: int) -> bool:
    return bool(_stream(settings, patient, side, number, 0).random() < 0.5)


def square(settings: LesionSettings, patient: int, side: str, number: int) -> Film:
    """One square with what is planted in it: (side, side) of 12 bits."""
    film, corners = _film(settings, patient, side)
    top, left = corners[number]
    tissue = film[top : top + settings.side, left : left + settings.side].astype(np.float32)
    draw = plant_cluster if number % 2 else plant_mass
    positive, rng = _positive(settings, patient, side, number), _stream(settings, patient, side, number, 1)
    values = tissue - tissue.mean() + np.float32(LEVEL) + np.float32(GREY) * draw(settings, rng, positive)
    pixels = np.clip(values, 0, MAX_VALUE).astype(np.uint16)
    return Film(pixels=pixels, max_value=MAX_VALUE, spacing_mm=settings.spacing)


def plant_mass(settings: LesionSettings, rng: np.random.Generator, spiculated: bool) -> Array:
    """What a mass adds to a square, in units of tissue."""
    radius, off = rng.uniform(*settings.mass_mm), settings.off_mm[0]
    body = mass(radius, _around(settings, rng.uniform(-off, off, 2)), rng, spiculated=True)
    body = body if spiculated else ndimage.gaussian_filter(body, settings.blur_mm / settings.spacing)
    return np.float32(settings.margin) * body.astype(np.float32)


def plant_cluster(settings: LesionSettings, rng: np.random.Generator, there: bool) -> Array:
    """What a cluster of microcalcifications, or none, adds to a square, in units of tissue."""
    radius, off = rng.uniform(*settings.cluster_mm), settings.off_mm[1]
    specks = cluster(radius, _around(settings, rng.uniform(-off, off, 2)), rng)
    return np.float32(settings.calc * there) * specks.astype(np.float32)


def _around(settings: LesionSettings, centre: NDArray[np.float64]) -> Grid:
    """The square's pixels in mm, from a place given from the square's middle."""
    axis = (np.arange(settings.side, dtype=np.float32) + 0.5 - settings.side / 2) * np.float32(settings.spacing)
    y, x = (axis - np.float32(shift) for shift in centre)
    return Grid(spacing=settings.spacing, y=y[:, None], x=x[None])


@lru_cache(maxsize=2)
def _film(settings: LesionSettings, patient: int, side: str) -> tuple[NDArray[np.uint16], tuple[Corner, ...]]:
    """A film and the corners of its squares: those with most tissue of many drawn, none upon another."""
    pixels = render(settings.phantom, patient, side, "CC").pixels.astype(np.uint16)
    share = ndimage.uniform_filter((pixels[::8, ::8] > TISSUE).astype(np.float32), settings.side // 8)
    rng, half = _stream(settings, patient, side), settings.side // 2
    drawn = rng.uniform(half, np.array(pixels.shape) - half, (600, 2)).astype(int)
    full = np.minimum(share[drawn[:, 0] // 8, drawn[:, 1] // 8], 0.98)
    chosen: list[NDArray[np.int64]] = []
    for i in np.argsort(-full, kind="stable"):
        if all(np.abs(drawn[i] - other).max() >= settings.side for other in chosen):
            chosen.append(drawn[i])
        if len(chosen) == settings.per_film:
            break
    return pixels, tuple((int(y) - half, int(x) - half) for y, x in chosen)
