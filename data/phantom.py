"""Synthetic mammograms: films with labels, circles and masks for when there is no archive at hand.

A film is a sum of things that are each known to matter, all laid out in millimetres: an outline with the
skin's roll-off, adipose tissue as power-law noise (Burgess 2001: 1/f^beta, beta near 3), a fibroglandular
disc that opens from the nipple, strands and vessels, the pectoral muscle, masses after VICTRE's recipe
(Badano 2018) drawn in two dimensions, and calcification clusters. Sizes, exponents and grey levels were
measured on mini-MIAS. A film depends on (seed, patient, side, view) alone: its size changes the resolution
and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from .phantom_texture import (
    FRAME_MM,
    Array,
    Grid,
    cluster,
    frame_grid,
    lines,
    mass,
    power_law,
    ridge,
    stream,
    white_noise,
)
from .record import Circle, Film, Label, Record

DENSITIES = ("a", "b", "c", "d")
"""BI-RADS density classes, fatty to dense."""

SIDES = ("L", "R")
VIEWS = ("CC", "MLO")
MAX_VALUE = 4095

_BETA = {"a": 2.4, "b": 2.55, "c": 2.7, "d": 2.85}
_GLAND_SHARE = {"a": (0.05, 0.13), "b": (0.18, 0.32), "c": (0.38, 0.55), "d": (0.62, 0.8)}
_SKIN_MM = 8.0
_STRAND_MM = 0.4


@dataclass(frozen=True, kw_only=True)
class PhantomSettings:
    """What a set of phantoms looks like. Films of one seed are the same at every size, up to resolution."""

    size: int = 512
    """Height of the frame in pixels. It is 240 mm high, and its width is 0.8 of its height."""
    seed: int = 0
    """Another seed, other patients."""
    contrast: float = 1.0
    """Multiplies every lesion's contrast: the task's difficulty. 0 keeps the labels and draws nothing."""
    mass_rate: float = 0.42
    """The share of breasts with a mass."""
    calc_rate: float = 0.25
    """The share of breasts with a calcification cluster."""
    noise: float = 18.0
    """Standard deviation of a pixel's noise, of 4095."""
    artefacts: float = 0.25
    """The share of films with a bright strip along the far edge."""


@dataclass(frozen=True, kw_only=True)
class _Body:
    """What the four films of a patient share; lengths in mm."""

    density: str
    depth: float
    half_height: float
    pointed: float
    nipple: float
    gland_share: float
    gland_bright: float
    strand_bright: float
    pectoral: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A lesion of one breast: where it is (as shares of the breast's extent) and what it looks like."""

    label: str
    radius: float
    inward: float
    across: tuple[float, float]
    key: tuple[int, ...]


def records(patients: int, settings: PhantomSettings) -> list[Record]:
    """Four images a patient: both breasts, two views. Nothing is rendered before `read` is called."""
    return [r for patient in range(patients) for side in SIDES for r in _breast(settings, patient, side)]


def render(settings: PhantomSettings, patient: int, side: str, view: str) -> Film:
    """The film of one view: (H, 0.8 H) of 12 bits, the breast on the left of an L, right of an R."""
    body, grid = _body(settings.seed, patient), frame_grid(settings.size)
    rng = stream(settings.seed, patient, 1 + SIDES.index(side), 1 + VIEWS.index(view))
    nipple_y, contour = _outline(body, view, grid, rng)
    depth = _skin_depth(contour, grid)
    thickness = _thickness(body, nipple_y, depth, grid)
    tissue = _tissue(body, view, nipple_y, depth, grid, rng)
    mask, circles = np.zeros((settings.size, round(0.8 * settings.size)), np.uint8), []
    for k, finding in enumerate(findings(settings, patient, side), start=1):
        window, lesion = _lesion(finding, _place(finding, body, view, nipple_y), grid)
        lesion *= thickness[window]
        tissue[window] += settings.contrast * lesion
        found = lesion > 0.2 * lesion.max()
        mask[window][found] = k
        circles.append(_circle(found, window, finding.label))
    if side == "R":
        mask = np.ascontiguousarray(mask[:, ::-1])
        circles = [replace(circle, x=mask.shape[1] - 1 - circle.x) for circle in circles]
    return Film(
        pixels=_develop(tissue * thickness, body, side, view, settings, rng),
        max_value=MAX_VALUE,
        spacing_mm=grid.spacing,
        circles=tuple(circles),
        mask=mask,
    )


def _breast(settings: PhantomSettings, patient: int, side: str) -> list[Record]:
    found = {finding.label for finding in findings(settings, patient, side)}
    labels: dict[str, Label] = {
        "density": _body(settings.seed, patient).density,
        "mass": int("mass" in found),
        "calc": int("calc" in found),
    }
    name = f"s{settings.seed}-p{patient:04d}"
    return [
        Record(
            read=partial(render, settings, patient, side, view),
            name=f"{name} {side} {view}",
            image_id=f"{name}-{side}-{view}".lower(),
            patient_id=name,
            exam_id=name,
            laterality=side,
            view=view,
            split=("train", "test")[patient % 2],
            labels=labels,
        )
        for view in VIEWS
    ]


def _density(seed: int, patient: int) -> str:
    # Of any eight patients in a row each split gets every class once, so that few patients are enough.
    block, place = divmod(patient, 8)
    order = stream(seed, block).permuted(np.tile(np.arange(4), (2, 1)), axis=1)
    return DENSITIES[order[place % 2, place // 2]]


def _body(seed: int, patient: int) -> _Body:
    rng = stream(seed, patient, 0)
    density = _density(seed, patient)
    depth = rng.uniform(76, 104)
    return _Body(
        density=density,
        depth=depth,
        half_height=min(depth * rng.uniform(0.94, 1.1), 108),
        pointed=rng.uniform(1.0, 1.5),
        nipple=rng.uniform(0, 3),
        gland_share=rng.uniform(*_GLAND_SHARE[density]),
        gland_bright=rng.uniform(0.34, 0.46),
        strand_bright=rng.uniform(0.1, 0.2),
        pectoral=(rng.uniform(38, 62), rng.uniform(85, 135)),
    )


def findings(settings: PhantomSettings, patient: int, side: str) -> list[Finding]:
    """The lesions of a breast, in the order in which its masks number them."""
    key = (patient, 1 + SIDES.index(side), 0)
    rng = stream(settings.seed, *key)
    present = rng.random(2) < (settings.mass_rate, settings.calc_rate)
    radii = np.clip(np.exp(rng.normal(np.log((8.5, 4.6)), (0.38, 0.45))), (4, 2), (18, 9))
    return [
        Finding(
            label=label,
            radius=float(radius),
            inward=rng.uniform(0.25, 0.72),
            across=(rng.uniform(-0.55, 0.55), rng.uniform(-0.55, 0.55)),
            key=(settings.seed, *key, 1 + k),
        )
        for k, (label, radius) in enumerate(zip(("mass", "calc"), radii, strict=True))
        if present[k]
    ]


def _outline(body: _Body, view: str, grid: Grid, rng: np.random.Generator) -> tuple[float, Array]:
    """The nipple's height in mm and, per row, the outline's x squared (mm^2; negative beyond the breast)."""
    oblique = view == "MLO"
    nipple_y = FRAME_MM / 2 + rng.uniform(-6, 6) + oblique * rng.uniform(24, 34)
    high = body.half_height * rng.uniform(0.95, 1.05) * (1.35 if oblique else 1)
    low = body.half_height * rng.uniform(0.95, 1.05) * (0.88 if oblique else 1)
    t = (grid.y - nipple_y) / np.where(grid.y < nipple_y, high, low)
    phase = rng.uniform(0, 2 * np.pi)
    t = t + 0.03 * (np.sin(5 * t + phase) - np.sin(phase))
    share = 1 - np.abs(t) ** rng.uniform(1.9, 2.3)
    square = body.depth**2 * np.sign(share) * np.abs(share) ** (body.pointed + 0.3 * oblique)
    if oblique:
        # Above its bulge the breast runs on into the axilla, to the edge of the frame.
        tail = body.pectoral[0] + rng.uniform(0, 14)
        axilla = tail**2 + np.maximum(square, 0) * (1 - (tail / body.depth) ** 2)
        square = ndimage.gaussian_filter1d(np.where(t < 0, axilla, square), 5 / grid.spacing, axis=0, mode="nearest")
    return nipple_y, square.astype(np.float32)


def _skin_depth(contour: Array, grid: Grid) -> Array:
    """Millimetres below the skin: an implicit curve over its gradient, exact to first order at the skin."""
    slope = np.gradient(contour[:, 0], grid.spacing)[:, None].astype(np.float32)
    depth: Array = (contour - grid.x**2) / np.sqrt(slope**2 + 4 * grid.x**2 + 1)
    return depth


def _thickness(body: _Body, nipple_y: float, depth: Array, grid: Grid) -> Array:
    """How much of the beam's path is breast, 0 to 1: rounded off at the skin, and the nipple."""
    inward = (grid.x - body.depth + 4) / (3 + body.nipple)
    nipple = np.exp(-(((grid.y - nipple_y) / 5) ** 2)) * np.exp(-(inward**4))
    thickness: Array = np.maximum(1 - np.exp(-np.maximum(depth, 0) / np.float32(_SKIN_MM)), 0.42 * nipple)
    return thickness


def _tissue(body: _Body, view: str, nipple_y: float, depth: Array, grid: Grid, rng: np.random.Generator) -> Array:
    """What the beam meets at each pixel of a breast of full thickness, in units of adipose tissue."""
    beta = _BETA[body.density]
    whites = [white_noise(int(seed), *grid.shape) for seed in rng.integers(2**31, size=2)]
    fat, weave = (power_law(white, beta, grid) for white in whites)
    lobes = power_law(whites[1], beta + 1.4, grid)
    fan = (grid.y - nipple_y) / (body.depth + 35 - grid.x)
    septa = ridge(3.3 * fan + 0.4 * lobes + 0.05 * fat) + 0.7 * ridge(9 * fan + 0.9 * lobes + 0.2 * fat)
    gland = _gland(body, view, nipple_y, depth, 0.85 * lobes + 0.15 * weave, grid)
    tissue = 1 + 0.07 * fat + gland * (body.gland_bright + 0.09 * weave)
    tissue += body.strand_bright * septa * (0.25 + 0.75 * gland) * np.clip(0.9 + 0.6 * weave, 0, 2)
    tissue += _strands(body, nipple_y, grid, rng)
    if view == "MLO":
        tissue += _pectoral(body, fat, grid)
    present: Array = np.maximum(tissue, 0.2)
    return present


def _gland(body: _Body, view: str, nipple_y: float, depth: Array, lobes: Array, grid: Grid) -> Array:
    """How much of each pixel is fibroglandular, 0 to 1: a disc behind the nipple, broken up by noise."""
    lift = 8 if view == "MLO" else 0
    across = (grid.y - nipple_y + lift) / (0.62 * body.half_height)
    inward = (grid.x - 0.58 * body.depth) / (0.55 * body.depth)
    field = 0.8 * lobes - across**2 - inward**2
    step = max(1, grid.shape[0] // 64)
    inside = field[::step, ::step][depth[::step, ::step] > 0]
    level = np.quantile(inside, 1 - body.gland_share)
    share = np.clip((field - level) / 2.2 + 0.5, 0, 1)
    # Fat lies between the glands and the skin.
    gland: Array = share * share * (3 - 2 * share) * np.clip((depth - 2) / 10, 0, 1)
    return gland


def _pectoral(body: _Body, fat: Array, grid: Grid) -> Array:
    wide, high = body.pectoral
    bulge = 5 * np.sin(np.pi * np.clip(grid.y / high, 0, 1))
    inside = wide * (1 - grid.y / high) + bulge - grid.x
    edge = np.clip(inside / 5, 0, 1)
    muscle: Array = edge * (0.55 + 0.005 * np.clip(inside, 0, 60) - 0.03 * fat)
    return muscle


def _strands(body: _Body, nipple_y: float, grid: Grid, rng: np.random.Generator) -> Array:
    """Cooper's ligaments, ducts and vessels: curved lines that run towards a point beyond the nipple."""
    count, steps = 64, 128
    t = np.linspace(0, 1, steps)
    draw = rng.uniform(size=(10, count, 1))
    start, length = (0.35 + 0.85 * draw[0]) * body.depth, (0.15 + 0.5 * draw[1]) * body.depth
    distance = start - length * t
    angle = (draw[2] - 0.5) * 2.6 + (draw[3] - 0.5) * 0.9 * t**2
    angle += 0.03 * np.sin((4 + 8 * draw[4]) * t + 6.3 * draw[5]) + 0.008 * np.sin(31 * t * draw[7])
    vessel = draw[8] < 0.06
    spread = np.where(vessel, 0.9, 0.0) * ((np.arange(steps) * 0.618) % 1 - 0.5)
    y = nipple_y + distance * np.sin(angle) + spread
    x = body.depth + 6 - distance * np.cos(angle)
    bright = body.strand_bright * np.where(vessel, 2.5, 0.5 + 1.6 * draw[9] ** 2) * np.sin(np.pi * t) ** 0.5
    return lines(y, x, bright * length / steps, _STRAND_MM, grid)


def _place(finding: Finding, body: _Body, view: str, nipple_y: float) -> tuple[float, float]:
    """A lesion's (y, x) in mm. Both views share its distance to the chest wall, not its place across."""
    reach = body.half_height * np.sqrt(1 - finding.inward**2)
    return nipple_y + finding.across[VIEWS.index(view)] * reach, finding.inward * body.depth


def _lesion(finding: Finding, centre: tuple[float, float], grid: Grid) -> tuple[tuple[slice, slice], Array]:
    """A window of the grid and what the lesion adds there, in units of adipose tissue."""
    y, x = centre
    reach = 2.2 * finding.radius + 2
    limits = zip(centre, grid.shape, strict=True)
    rows, columns = (
        slice(max(0, int((c - reach) / grid.spacing)), min(n, int((c + reach) / grid.spacing) + 1)) for c, n in limits
    )
    local = Grid(spacing=grid.spacing, y=grid.y[rows] - np.float32(y), x=grid.x[:, columns] - np.float32(x))
    draw = mass if finding.label == "mass" else cluster
    return (rows, columns), draw(finding.radius, local, stream(*finding.key)).astype(np.float32)


def _circle(found: NDArray[np.bool_], window: tuple[slice, slice], label: str) -> Circle:
    """The circle about the middle of a finding's pixels that holds every one of them."""
    y, x = (at + part.start for at, part in zip(np.nonzero(found), window, strict=True))
    cy, cx = (y.min() + y.max()) / 2, (x.min() + x.max()) / 2
    reach = np.hypot(y - cy, x - cx).max() + 0.5
    return Circle(x=float(cx), y=float(cy), radius=float(reach), label=label)


def _develop(
    signal: Array, body: _Body, side: str, view: str, settings: PhantomSettings, film: np.random.Generator
) -> NDArray[np.uint16]:
    """The frame as a scanner gives it: grey levels, noise, a marker, sometimes a bright strip."""
    height, width = settings.size, round(0.8 * settings.size)
    # The exposure control holds the film's darkness, so grey alone does not tell how dense a breast is.
    gain = 1900 * film.uniform(0.88, 1.12) / (1 + 0.45 * body.gland_share)
    base, top = film.uniform(70, 160), film.uniform(6, 30)
    strip = film.uniform(1, 4) if film.random() < settings.artefacts else 0
    # The difference of two uniform numbers is close enough to a normal one and costs a third of it.
    values = film.random((height, width), np.float32) - film.random((height, width), np.float32)
    values *= np.float32(6**0.5 * settings.noise)
    values += np.float32(base)
    values[:, : signal.shape[1]] += gain * signal / (1 + np.float32(0.04) * signal)
    values[:, width - round(strip * height / FRAME_MM) :] += 2600
    values = values if side == "L" else values[:, ::-1]
    label = _marker(f"{side} {view}", round(9 * height / FRAME_MM))
    y, x = round(top * height / FRAME_MM), round(8 * height / FRAME_MM)
    x = x if side == "R" else width - x - label.shape[1]
    values[y : y + label.shape[0], x : x + label.shape[1]] += label
    pixels: NDArray[np.uint16] = np.clip(values, 0, MAX_VALUE).astype(np.uint16)
    return pixels


@lru_cache(maxsize=32)
def _marker(text: str, height: int) -> Array:
    font = ImageFont.load_default(max(6, height))
    left, top, right, bottom = (round(v) for v in font.getbbox(text))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return np.asarray(image, np.float32) * np.float32(12)
