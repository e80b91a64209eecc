"""Near-duplicates: the hash's symmetries, pairs against brute force, copies of phantoms and of real films."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from miram.data import duplicates
from miram.data.breast import isolate
from miram.data.duplicates import (
    NO_HASH,
    THRESHOLD,
    Words,
    close_pairs,
    distance,
    near_duplicates,
    phash,
    summary,
    table,
    words_of,
)
from miram.data.phantom import PhantomSettings
from miram.data.record import Film, Pixels
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.engine.errors import UserError

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere"))
ALL = 2**64 - 1


def noise(seed: int, shape: tuple[int, int] = (512, 384)) -> Pixels:
    """A soft random texture in a frame of zeros."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.uniform(0, 1, (24, 18)).astype(np.float32))
    image = np.asarray(small.resize(shape[::-1], Image.Resampling.BICUBIC)).clip(0.05, 1)
    image[:40], image[:, 300:] = 0, 0
    return (image * 4095).astype(np.uint16)


def words(pixels: Pixels) -> list[int]:
    return [int(word) for word in words_of([phash(pixels)])[0]]


def bits(a: str, b: str) -> int:
    return int(distance(words_of([a]), words_of([b]))[0, 0])


# ---------------------------------------------------------------------------------------------- hash


@pytest.mark.parametrize("shape", [(512, 384), (1024, 768)])
def test_mirroring_flips_whole_words(shape: tuple[int, int]) -> None:
    image = noise(0, shape)
    both, rows, columns, neither = words(image)
    assert words(image[:, ::-1]) == [both ^ ALL, rows, columns ^ ALL, neither]
    assert words(image[::-1]) == [both ^ ALL, rows ^ ALL, columns, neither]
    assert words(image[::-1, ::-1]) == [both, rows ^ ALL, columns ^ ALL, neither]
    assert len({phash(image), phash(image[::-1]), phash(image[:, ::-1]), phash(image[::-1, ::-1])}) == 4


def test_half_of_the_bits_are_set() -> None:
    ones = [sum(word.bit_count() for word in words(noise(seed))) for seed in range(30)]
    assert 118 < np.mean(ones) < 138


def test_brightness_borders_depth_and_channels_do_not_matter() -> None:
    image = noise(1)
    code = phash(image)
    assert phash(image * 16) == code
    assert phash(np.stack([image] * 3, axis=2)) == code
    assert bits(code, phash(np.pad(image, ((64, 0), (0, 128))))) <= 6
    assert bits(code, phash((image >> 4).astype(np.uint8))) <= 12


@pytest.mark.parametrize("image", [np.zeros((300, 200)), np.full((9, 4), 7), np.zeros((1, 1))])
def test_an_image_of_nothing_has_no_hash(image: np.ndarray) -> None:
    assert phash(image.astype(np.uint16)) == NO_HASH


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (3, 4000), (63, 64)])
def test_any_shape_has_a_hash(shape: tuple[int, int]) -> None:
    code = phash(np.random.default_rng(0).integers(1, 255, shape).astype(np.uint8))
    assert len(code) == 64
    assert set(code) <= set("0123456789abcdef")


# ---------------------------------------------------------------------------------------------- distances


def brute_force(a: list[int], b: list[int]) -> int:
    """The fewest differing bits over the four mirrorings, one bit after the other."""
    masks = [(0, 0, 0, 0), (ALL, 0, ALL, 0), (ALL, ALL, 0, 0), (0, ALL, ALL, 0)]
    return min(sum((x ^ y ^ m).bit_count() for x, y, m in zip(a, b, mask, strict=True)) for mask in masks)


def random_words(n: int) -> Words:
    """Hashes among which are mirrored and slightly changed copies of others."""
    rng = np.random.default_rng(n)
    made = rng.integers(0, 2**64, (n, 4), dtype=np.uint64)
    made[1::3] = made[::3][: len(made[1::3])] ^ np.array([ALL, 0, ALL, 0], np.uint64)
    made[2::3] = made[::3][: len(made[2::3])] ^ rng.integers(0, 2**20, (len(made[2::3]), 4), dtype=np.uint64)
    return made


def test_distances_and_pairs_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_words(61)
    plain = [[int(x) for x in row] for row in made]
    wanted = np.array([[brute_force(a, b) for b in plain] for a in plain])
    np.testing.assert_array_equal(distance(made, made), wanted)
    pairs = sorted((int(wanted[i, j]), i, j) for i in range(61) for j in range(i + 1, 61) if wanted[i, j] <= 60)
    assert len(pairs) > 30
    for block in (1, 7, 61, 100):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        assert sorted(close_pairs(made, 60)) == pairs


# ---------------------------------------------------------------------------------------------- pairs


def row(key: str, code: str, patient: str, split: str = "", dataset: str = "a") -> dict[str, str]:
    return {"key": key, "phash": code, "patient": patient, "split": split, "dataset": dataset}


def test_pairs_are_told_by_what_they_cross() -> None:
    code, near, far = "0123456789abcdef" * 4, "1123456789abcdef" * 4, "fedcba9876543210" * 4
    rows = [
        row("k0", code, "p", "train"),
        row("k1", code, "p", "train"),  # of the same patient in the same split
        row("k2", near, "p", "test"),
        row("k3", code, "p"),  # in no split
        row("k4", code, "q", "train"),
        row("k5", code, "p", "train", dataset="b"),
        row("k6", far, "r", "test"),
        row("k7", "", "s", "test"),
        row("k8", NO_HASH, "t"),
        row("k9", NO_HASH, "u"),
    ]
    pairs = near_duplicates(rows)
    assert pairs == sorted(pairs)
    found = {(pair.first, pair.second): (pair.across, pair.distance) for pair in pairs}
    sets = {(i, 5): ("data sets", 0) for i in (0, 1, 3, 4)} | {(2, 5): ("data sets", 4)}
    splits = {(0, 2): ("splits", 4), (1, 2): ("splits", 4), (2, 4): ("splits", 4)}
    patients = {(i, 4): ("patients", 0) for i in (0, 1)} | {(3, 4): ("patients", 0)}
    assert found == sets | splits | patients
    assert {p.second for p in near_duplicates(rows, threshold=0)} == {4, 5}
    moved = near_duplicates(rows[:2], splits=["train", "val"])
    assert [(pair.across, pair.first, pair.second) for pair in moved] == [("splits", 0, 1)]
    assert near_duplicates([]) == []


def test_a_damaged_hash_is_refused() -> None:
    for code in ("12", "x" * 64):
        with pytest.raises(UserError, match="damaged perceptual hash"):
            near_duplicates([row("k", code, "p")])


def test_findings_are_told_in_lines_and_a_table() -> None:
    code = "0123456789abcdef" * 4
    rows = [row("left", code, "p", "train"), row("right", code, "q"), row("none", "", "r")]
    pairs = near_duplicates(rows)
    assert summary(rows, pairs) == [
        "2 images compared, mirrored or not, at 64 of 256 bits; 1 have no hash (ingest them again)",
        "1 near-duplicate pair across patients",
    ]
    assert summary(rows[:1], [])[-1].startswith("no near-duplicates")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(rows, pairs))
    told = console.export_text()
    assert all(word in told for word in ("left", "right", "train", "patients"))


# ---------------------------------------------------------------------------------------------- copies


def jpeg(pixels: Pixels, top: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(np.round(pixels / top * 255).astype(np.uint8)).save(buffer, "jpeg", quality=50)
    return np.asarray(Image.open(buffer))


def resized(pixels: Pixels, scale: float) -> Pixels:
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    small = Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return np.asarray(small).round().astype(np.uint16)


COPIES: dict[str, Callable[[Pixels, int], Pixels]] = {
    "8 bits": lambda x, top: np.round(x / top * 255).astype(np.uint8),
    "JPEG 50": jpeg,
    "half": lambda x, top: resized(x, 0.5),
    "a third, mirrored": lambda x, top: resized(x, 1 / 3)[:, ::-1],
    "upside down": lambda x, top: x[::-1],
    "rows and columns cut off": lambda x, top: x[x.shape[0] // 100 : -x.shape[0] // 100, : -x.shape[1] // 100],
}


def copies(images: list[tuple[Pixels, int]]) -> Iterator[tuple[str, list[str]]]:
    """Each kind of copy with the hashes of all images copied so."""
    for name, copy in COPIES.items():
        yield name, [phash(copy(pixels, top)) for pixels, top in images]


def test_copies_of_phantoms_are_found_and_other_phantoms_are_not(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "set", 6, PhantomSettings(size=384), workers=1)
    shards = ShardDataset(tmp_path / "set")
    images = [(np.asarray(shards[i].pixels), shards[i].max_value) for i in range(len(shards))]
    codes = words_of([phash(pixels) for pixels, _ in images])
    apart = distance(codes, codes)[np.triu_indices(len(codes), 1)]
    assert apart.min() > THRESHOLD + 8
    for name, others in copies(images):
        assert np.diag(distance(codes, words_of(others))).max() <= THRESHOLD, name


@pytest.mark.skipif(not (REAL / "mini_mias").is_dir(), reason="MIRAM_REAL_DATA names no folder with mini_mias")
def test_a_hundred_real_films_are_told_apart_and_their_copies_found() -> None:
    files = sorted((REAL / "mini_mias" / "all-mias").glob("*.pgm"))
    films = [Film(pixels=np.asarray(Image.open(file)), max_value=255) for file in files]
    images = [(isolate(film)[0].pixels, 255) for film in films]
    codes = words_of([phash(pixels) for pixels, _ in images])
    apart = distance(codes, codes)[np.triu_indices(len(codes), 1)]
    assert apart.min() > THRESHOLD + 8
    for name, others in copies(images):
        assert np.mean(np.diag(distance(codes, words_of(others))) <= THRESHOLD) >= 0.99, name


@pytest.mark.skipif(not (REAL / "cdd_cesm_seg512").is_dir(), reason="MIRAM_REAL_DATA names no folder with CDD-CESM")
def test_the_flipped_and_mirrored_files_of_a_repackager_are_found() -> None:
    files = sorted((REAL / "cdd_cesm_seg512" / "images").glob("*.jpg"))
    origin = [file.stem.removeprefix("flipped_").removeprefix("mirrored_") for file in files]
    films = [Film(pixels=np.asarray(Image.open(file).convert("L")), max_value=255) for file in files]
    codes = words_of([phash(isolate(film)[0].pixels) for film in films])
    found = {(i, j) for _, i, j in close_pairs(codes, THRESHOLD)}
    wanted = {(i, j) for i in range(len(files)) for j in range(i + 1, len(files)) if origin[i] == origin[j]}
    assert wanted
    assert found == wanted
