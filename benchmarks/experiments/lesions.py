"""Squares of phantom films around planted lesions: two labels that hang on fine detail.

A film is drawn without lesions; then, at places of its tissue that do not overlap, each square gets a mass (label
`margin`: spiculated or indistinct) and half of the squares a cluster of microcalcifications (label `calc`). The
lesions are the phantom's own (data/phantom_texture.py); only which square has what is decided here, so that neither
label depends on the other, on the tissue or on the patient. A mass of indistinct margin is a spiculated one blurred:
body, halo and brightness are alike, and only the fine rays tell them apart.
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
BLUR_MM = 0.5  # standard deviation of an indistinct margin
GREY = 1700.0  # grey levels of one unit of the phantom's tissue
TISSUE = 600  # grey level above which a pixel is breast, not film
PLANTED = 77  # stream of what is planted, apart from the phantom's own

Corner = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class LesionSettings:
    """What the squares look like."""

    seed: int
    """another seed, other patients"""
    film: int = 800
    """rows of a film of 240 mm"""
    side: int = 160
    """of a square, in pixels of the film"""
    per_film: int = 4
    """squares of a film"""
    margin: float = 1.0
    """contrast of masses, in units of the phantom's"""
    calc: float = 1.0
    """contrast of calcifications, likewise"""
    mass_mm: tuple[float, float] = (4.0, 8.0)
    """smallest and largest radius of a mass"""
    cluster_mm: tuple[float, float] = (2.0, 5.0)
    """smallest and largest radius of a cluster"""

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
    spiculated, calcified = _labels(settings, patient, side, number)
    name = f"s{settings.seed}-p{patient:04d}"
    return Record(
        read=partial(square, settings, patient, side, number),
        name=f"{name} {side} {number}",
        image_id=f"{name}-{side}-{number}".lower(),
        patient_id=name,
        exam_id=name,
        laterality=side,
        view="CC",
        labels={"margin": MARGINS[spiculated], "calc": int(calcified)},
    )


def _stream(settings: LesionSettings, patient: int, side: str, *key: int) -> np.random.Generator:
    return stream(settings.seed, PLANTED, patient, SIDES.index(side), *key)


def _labels(settings: LesionSettings, patient: int, side: str, number: int) -> tuple[bool, bool]:
    spiculated, calcified = _stream(settings, patient, side, number, 0).random(2) < 0.5
    return bool(spiculated), bool(calcified)


def square(settings: LesionSettings, patient: int, side: str, number: int) -> Film:
    """One square with its lesions: (side, side) of 12 bits."""
    film, corners = _film(settings, patient, side)
    top, left = corners[number]
    tissue = film[top : top + settings.side, left : left + settings.side].astype(np.float32)
    planted = plant(settings, _stream(settings, patient, side, number, 1), *_labels(settings, patient, side, number))
    pixels = np.clip(tissue + np.float32(GREY) * planted, 0, MAX_VALUE).astype(np.uint16)
    return Film(pixels=pixels, max_value=MAX_VALUE, spacing_mm=settings.spacing)


def plant(settings: LesionSettings, rng: np.random.Generator, spiculated: bool, calcified: bool) -> Array:
    """What is added to a square, in units of tissue. Every square draws alike, so that labels change nothing else."""
    mass_mm, cluster_mm = (float(rng.uniform(*bounds)) for bounds in (settings.mass_mm, settings.cluster_mm))
    mass_at, cluster_at = rng.uniform(-3, 3, 2), rng.uniform(-9, 9, 2)
    mass_rng, cluster_rng = rng.spawn(2)
    body = mass(mass_mm, _around(settings, mass_at), mass_rng, spiculated=True)
    body = body if spiculated else ndimage.gaussian_filter(body, BLUR_MM / settings.spacing)
    added = settings.margin * body
    if calcified:
        added = added + settings.calc * cluster(cluster_mm, _around(settings, cluster_at), cluster_rng)
    return added.astype(np.float32)


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
