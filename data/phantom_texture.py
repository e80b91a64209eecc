"""What phantoms are drawn with, in millimetres: a grid, power-law noise, lines, masses, calcifications."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]
Points = NDArray[np.float64]

FRAME_MM = 240.0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The half of the frame a breast may fill, the chest wall at x = 0: pixel centres in mm."""

    spacing: float
    y: Array  # (H, 1)
    x: Array  # (1, W)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.y.shape[0], self.x.shape[1]


def stream(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on these integers alone, in any process and any order."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@lru_cache(maxsize=8)
def frame_grid(size: int) -> Grid:
    """The grid of a frame `size` pixels high."""
    spacing = FRAME_MM / size
    y = (np.arange(size, dtype=np.float32) + 0.5) * spacing
    y.setflags(write=False)
    return Grid(spacing=spacing, y=y[:, None], x=y[None, : size // 2])


def ridge(field: Array) -> Array:
    """1 along the contours of a field at whole numbers, falling to 0: thin sheets seen on edge."""
    height = np.maximum(1 - 4 * np.abs(field - np.rint(field)), 0)
    sharp: Array = height * height
    return sharp


@lru_cache(maxsize=8)
def _spectrum(grid_size: int, width: int) -> tuple[Array, NDArray[np.complex64]]:
    """log of the frequency in cycles/mm, and the phase that moves samples to pixel centres."""
    spacing = FRAME_MM / grid_size
    fy = np.fft.fftfreq(grid_size, spacing)[:, None]
    fx = np.fft.rfftfreq(width, spacing)[None]
    frequency = np.sqrt(fy**2 + fx**2 + 0.012**2)
    phase = np.exp(1j * np.pi * spacing * (fy + fx))
    return np.log(frequency).astype(np.float32), phase.astype(np.complex64)


def power_law(white: NDArray[np.complex64], beta: float, grid: Grid) -> Array:
    """Noise of power 1/f^beta, about unit variance. Burgess 2001."""
    height, width = grid.shape
    log_frequency, phase = _spectrum(height, width)
    spectrum = white * phase * np.exp(-beta / 2 * log_frequency)
    spectrum[0, 0] = 0
    coarse = np.exp(-beta * _spectrum(64, 32)[0])
    scale = height * width / np.sqrt(2 * coarse.sum() / 6)
    return np.fft.irfft2(spectrum, s=(height, width)).astype(np.float32) * np.float32(scale)


def white_noise(seed: int, height: int, width: int) -> NDArray[np.complex64]:
    """Fourier coefficients whose low frequencies do not depend on how many higher ones there are.

    Each doubling has its own stream. Uniform numbers do: a sum of so many waves is Gaussian all the same.
    """
    out = np.zeros((height, width // 2 + 1), np.complex64)
    sizes = [16 << k for k in range(16) if k == 0 or 8 << k < height]
    for level, size in reversed(list(enumerate(sizes))):
        draws = stream(seed, level).random((size, size // 4 + 1, 2), np.float32) - np.float32(0.5)
        block = draws.view(np.complex64)[..., 0]
        half, columns = min(size, height) // 2, min(size // 4 + 1, out.shape[1])
        out[:half, :columns] = block[:half, :columns]
        out[-half:, :columns] = block[-half:, :columns]
    return out


def lines(y: Points, x: Points, flux: Points, sigma: float, grid: Grid) -> Array:
    """Lines of Gaussian profile given as dense points in mm; `flux` is brightness times length."""
    rows, columns = grid.shape
    v = np.ravel((y - grid.y[0, 0]) / grid.spacing)
    u = np.ravel((x - grid.x[0, 0]) / grid.spacing)
    keep = (v >= 0) & (v < rows - 1) & (u >= 0) & (u < columns - 1)
    v, u, w = v[keep], u[keep], np.ravel(flux)[keep]
    j, i = v.astype(np.intp), u.astype(np.intp)
    v, u, at = v - j, u - i, j * columns + i
    at = np.concatenate([at, at + 1, at + columns, at + columns + 1])
    w = np.concatenate([w * (1 - v) * (1 - u), w * (1 - v) * u, w * v * (1 - u), w * v * u])
    drawn = np.bincount(at, w, rows * columns).reshape(rows, columns).astype(np.float32)
    drawn *= np.float32(np.sqrt(2 * np.pi) * sigma / grid.spacing**2)
    blurred: Array = ndimage.gaussian_filter(drawn, sigma / grid.spacing, truncate=2.5)
    return blurred


def mass(radius: float, grid: Grid, rng: np.random.Generator, spiculated: bool | None = None) -> Array:
    """A lobulated body with a soft margin; two in five are spiculated, unless the caller says."""
    drawn = rng.random() < 0.4
    spiculated = drawn if spiculated is None else spiculated
    k = np.arange(2, 8)[:, None, None]
    waves = rng.normal(0, 0.16, k.shape) / (k - 1) ** (0.6 if spiculated else 1.0)
    angle = np.arctan2(grid.y, grid.x)
    border = (
        radius * (0.75 if spiculated else 1.0) * (1 + (waves * np.cos(k * angle + rng.uniform(0, 6.3, k.shape))).sum(0))
    )
    q = np.hypot(grid.y, grid.x) / border
    body = np.clip(1.05 - q * q, 0, 1) ** rng.uniform(0.5, 0.9)
    bright = rng.uniform(0.2, 0.38)
    rays = _spicules(radius, grid, rng) if spiculated else 0
    added: Array = bright * (body + rays)
    return added


def _spicules(radius: float, grid: Grid, rng: np.random.Generator) -> Array:
    count = rng.integers(20, 60)
    t = np.linspace(0, 1, 80)
    draw = rng.uniform(size=(4, count, 1))
    distance = radius * (0.4 + (0.5 + 0.9 * draw[0]) * t)
    angle = 2 * np.pi * draw[1] + (draw[2] - 0.5) * 0.8 * t**2
    flux = (0.15 + 0.35 * draw[3]) * (1 - t) * np.gradient(distance, axis=1)
    return lines(distance * np.sin(angle), distance * np.cos(angle), flux, 0.35, grid)


def cluster(radius: float, grid: Grid, rng: np.random.Generator) -> Array:
    """5 to 20 specks of 0.1 to 0.5 mm."""
    count = int(rng.integers(5, 21))
    draw = rng.uniform(size=(6, count, 1, 1))
    far, where = radius * np.sqrt(draw[0]), 2 * np.pi * draw[1]
    dy, dx = grid.y - far * np.sin(where), grid.x - far * np.cos(where)
    diameter = 0.1 + 0.4 * draw[2]
    # A speck smaller than a pixel fills it in part, but a film that lost them would be mislabelled.
    covered = np.clip((diameter / grid.spacing) ** 2, 0.25, 1)
    long, turn = 1 + draw[3], np.pi * draw[4]
    sigma = np.maximum(diameter / 2.5, 0.6 * grid.spacing)
    along, across = dy * np.sin(turn) + dx * np.cos(turn), dy * np.cos(turn) - dx * np.sin(turn)
    specks = np.exp(-0.5 * ((along / long) ** 2 + across**2) / sigma**2)
    added: Array = ((0.7 + 0.7 * draw[5]) * covered * specks).sum(0)
    return added
