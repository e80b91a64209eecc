"""Shards: what goes in comes out, any tool can read them, and damage is named."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image

from miram.data.breast import isolate
from miram.data.image import encode_png
from miram.data.index import read_index, read_manifest
from miram.data.layout import MANIFEST, Encoded, write_tar
from miram.data.phantom import PhantomSettings, records
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.data.store.local import OPEN_SHARDS
from miram.data.verify import verify
from miram.engine.errors import UserError
from miram.engine.files import sha256, write_json

Build = Callable[..., Path]
Images = list[NDArray[np.uint8]]


@pytest.fixture
def images() -> Images:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (10 + i, 12), dtype=np.uint8) for i in range(20)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.tar"))


def total(shards: ShardDataset) -> int:
    return sum(int(shards[i].pixels.sum()) for i in range(len(shards)))


# ---------------------------------------------------------------------------------------------- reading back


def test_what_is_written_is_read(phantoms: Path) -> None:
    shards = ShardDataset(phantoms)
    for i, record in enumerate(records(3, PhantomSettings(size=96))):
        film, geometry = isolate(record.read())
        sample = shards[i]
        np.testing.assert_array_equal(sample.pixels, film.pixels)
        np.testing.assert_array_equal(sample.mask, film.mask)
        assert (sample.pixels.dtype, sample.max_value, sample.meta["bits"]) == (np.uint16, 4095, 12)
        assert sample.meta["geometry"] == geometry.as_dict()
        assert (sample.meta["laterality"], sample.meta["view"]) == (record.laterality, record.view)
        assert [circle["x"] for circle in sample.meta["circles"]] == [circle.x for circle in film.circles]
        assert {k: sample.meta[f"label_{k}"] for k in record.labels} == record.labels
    assert len(shards) == 12


def test_the_index_says_what_the_json_says(phantoms: Path) -> None:
    shards = ShardDataset(phantoms)
    for i, row in enumerate(shards.rows):
        meta = shards[i].meta
        assert all(str(meta[column]) == row[column] for column in row if column in meta)
        assert (int(row["height"]), int(row["width"])) == shards[i].pixels.shape


def test_plain_webdataset_reads_the_same_keys_and_bytes(build: Build, images: Images) -> None:
    shards = ShardDataset(build(images, per_shard=7))
    urls = sorted(str(path) for path in Path(shards.roots[0]).glob("*.tar"))
    foreign = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(urls) == 3
    assert [sample["__key__"] for sample in foreign] == [row["key"] for row in shards.rows]
    for i, sample in enumerate(foreign):
        assert sample["png"] == shards.member(i, "png") == encode_png(images[i])
        assert json.loads(sample["json"]) == {"i": i} == shards[i].meta


def test_offsets_and_sizes_are_those_of_the_tar(phantoms: Path) -> None:
    rows = {row["key"]: row for row in csv.DictReader((phantoms / "index.csv").read_text().splitlines())}
    raw, seen = first_shard(phantoms).read_bytes(), 0
    with tarfile.open(first_shard(phantoms)) as tar:
        for member in tar.getmembers():
            key, kind = member.name.split(".", 1)
            assert rows[key]["shard"] == first_shard(phantoms).name
            start, size = int(rows[key][f"{kind}_offset"]), int(rows[key][f"{kind}_size"])
            file = tar.extractfile(member)
            assert file is not None
            assert raw[start : start + size] == file.read()
            seen += 1
    assert seen == 3 * sum(row["shard"] == first_shard(phantoms).name for row in rows.values()) == 24


def test_equal_input_gives_equal_bytes(phantoms: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "again", 3, PhantomSettings(size=96), workers=1)
    assert content(tmp_path / "again") == content(phantoms)
    make_phantoms(tmp_path / "other", 3, PhantomSettings(size=96, seed=1), workers=1)
    assert content(tmp_path / "other") != content(phantoms)


@pytest.mark.parametrize("name", ["100% mine", "a:b", "pipe:true"])
def test_a_folder_may_have_any_name(name: str, build: Build, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ShardDataset(build(images[:2]))
    monkeypatch.chdir(source.roots[0])
    folder = Path(name)
    folder.mkdir()
    write_tar(folder / "shard-000000.tar", [Encoded("k", {}, {"png": source.member(0, "png")})])
    assert [path.name for path in folder.iterdir()] == ["shard-000000.tar"]


# ---------------------------------------------------------------------------------------------- choosing


def test_a_split_keeps_its_rows_and_sets_without_splits(build: Build, images: Images) -> None:
    divided = build(images[:6], name="divided", splits=["train", "test", "", "train", "", "test"])
    whole = build(images[6:8], name="whole")
    test = ShardDataset([divided, whole], "test")
    assert [test[i].meta["i"] for i in range(len(test))] == [1, 5, 0, 1]
    assert [row["key"][-1] for row in ShardDataset(divided, "train").rows] == ["0", "3"]
    assert len(ShardDataset(divided)) == 6


def test_a_split_that_nothing_is_in_is_refused(build: Build, images: Images) -> None:
    with pytest.raises(UserError, match="'val'"):
        ShardDataset(build(images[:2], splits=["train", "test"]), "val")


@pytest.mark.parametrize("state", ["missing", "empty", "no manifest"])
def test_what_is_no_data_set_is_refused_by_name(tmp_path: Path, copied: Path, state: str) -> None:
    folder = tmp_path / "wanted"
    if state == "empty":
        folder.mkdir()
    if state == "no manifest":
        copied.rename(folder)
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=str(folder)):
        ShardDataset(folder)
    with pytest.raises(UserError, match=str(folder)):
        list(verify(folder))


def test_data_sets_with_other_label_columns_join(build: Build, images: Images) -> None:
    one = build(images[:2], name="one", labels=[{"mass": "1", "side": "L"}, {"mass": "0", "side": "R"}])
    two = build(images[2:5], name="two", labels=[{"mass": "1"}, {"calc": "x"}, {}])
    both = ShardDataset([one, str(two)])
    assert both.labels("mass") == ["1", "0", "1", "", ""]
    assert both.labels("side") == ["L", "R", "", "", ""]
    assert both.labels("calc") == ["", "", "", "x", ""]
    for i in range(5):
        np.testing.assert_array_equal(both[i].pixels, images[i])
    with pytest.raises(UserError, match="calc, mass, side"):
        both.labels("masses")


def test_labels_with_commas_quotes_and_line_ends_survive(build: Build, images: Images) -> None:
    odd = ['a, "b"', "two\nlines", "Größe", "=1+1"]
    assert ShardDataset(build(images[:4], labels=[{"note": text} for text in odd])).labels("note") == odd


# ---------------------------------------------------------------------------------------------- cache


def test_a_cache_gives_equal_samples(phantoms: Path) -> None:
    plain, cached = ShardDataset(phantoms), ShardDataset(phantoms, cache_mb=1)
    for i in (0, 1, 0, 11, 0):
        np.testing.assert_array_equal(cached[i].pixels, plain[i].pixels)
        np.testing.assert_array_equal(cached[i].mask, plain[i].mask)
        assert cached[i].meta == plain[i].meta
    assert cached[0] is cached[0]
    assert plain[0] is not plain[0]


def test_a_cache_keeps_what_was_used_last_and_stays_below_its_limit(build: Build) -> None:
    large = [np.full((400, 1000), i, np.uint8) for i in range(4)] + [np.zeros((1100, 1000), np.uint8)]
    shards = ShardDataset(build(large), cache_mb=1)
    first, second = shards[0], shards[1]
    assert shards[0] is first
    third = shards[2]
    assert (shards[0] is first, shards[2] is third, shards[1] is second) == (True, True, False)
    kept = [i for i in range(5) if shards[i] is shards[i]]
    assert kept == [0, 1, 2, 3]


def test_a_cache_counts_masks_too(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "set", 3, PhantomSettings(size=512), workers=1)
    shards = ShardDataset(tmp_path / "set", cache_mb=1)
    read = [shards[i] for i in range(len(shards))]
    newest_first = zip(reversed(range(len(shards))), reversed(read), strict=True)
    kept = [sample for _, sample in takewhile(lambda pair: shards[pair[0]] is pair[1], newest_first)]
    assert len(kept) > 1
    assert sum(s.pixels.nbytes + (0 if s.mask is None else s.mask.nbytes) for s in kept) <= 2**20


def test_another_process_reads_the_same(phantoms: Path) -> None:
    shards = ShardDataset(phantoms, cache_mb=1)
    here = total(shards)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(total, shards).result() == here > 0


# ---------------------------------------------------------------------------------------------- statistics


def fractions(*folders: Path) -> NDArray[np.float64]:
    shards = ShardDataset(folders)
    samples = [shards[i] for i in range(len(shards))]
    return np.concatenate([sample.pixels.ravel() / sample.max_value for sample in samples])


def test_statistics_are_those_of_every_pixel(phantoms: Path) -> None:
    x = fractions(phantoms)
    assert ShardDataset(phantoms).pixel_statistics == pytest.approx((x.mean(), x.std()), rel=1e-9)


def test_statistics_of_two_sets_of_equal_films_are_those_of_every_pixel(build: Build) -> None:
    rng = np.random.default_rng(0)
    dark = build([rng.integers(0, 90, (16, 16), dtype=np.uint8) for _ in range(3)], name="dark")
    light = build([rng.integers(30000, 65535, (16, 16), dtype=np.uint16) for _ in range(5)], name="light")
    x = fractions(dark, light)
    assert ShardDataset([dark, light]).pixel_statistics == pytest.approx((x.mean(), x.std()), rel=1e-9)


def test_statistics_of_sets_of_other_film_sizes_are_those_of_every_pixel(build: Build) -> None:
    dark = build([np.full((16, 16), 50, np.uint8)] * 3, name="dark")
    light = build([np.full((64, 64), 200, np.uint8)] * 3, name="light")
    x = fractions(dark, light)
    assert ShardDataset([dark, light]).pixel_statistics == pytest.approx((x.mean(), x.std()), rel=1e-9)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_statistics_of_flat_images_are_numbers(build: Build) -> None:
    found = [
        ShardDataset([build([np.full((8, 8), v, np.uint8)] * 3, name=f"{v} {k}") for k in range(3)]).pixel_statistics
        for v in range(1, 20)
    ]
    assert np.isfinite(found).all()


# ---------------------------------------------------------------------------------------------- damage


def test_a_sound_data_set_has_no_fault(phantoms: Path, build: Build, images: Images) -> None:
    assert list(verify(phantoms)) == []
    assert list(verify(build(images, per_shard=3))) == []


def flip_a_byte(folder: Path) -> str:
    content = bytearray(first_shard(folder).read_bytes())
    content[len(content) // 3] ^= 1
    first_shard(folder).write_bytes(content)
    return "shard-000000.tar"


def cut_a_shard(folder: Path) -> str:
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-1])
    return "shard-000000.tar"


def lose_a_shard(folder: Path) -> str:
    first_shard(folder).unlink()
    return "shard-000000.tar"


def change_the_index(folder: Path) -> str:
    text = (folder / "index.csv").read_text()
    (folder / "index.csv").write_text(text.replace("train", "test "))
    return "index.csv"


def lose_the_index(folder: Path) -> str:
    (folder / "index.csv").unlink()
    return "index.csv"


def add_a_shard(folder: Path) -> str:
    (folder / "stray.tar").write_bytes(first_shard(folder).read_bytes())
    return "stray.tar"


@pytest.mark.parametrize(
    "damage", [flip_a_byte, cut_a_shard, lose_a_shard, change_the_index, lose_the_index, add_a_shard]
)
def test_one_fault_names_the_file_that_was_damaged(copied: Path, damage: Callable[[Path], str]) -> None:
    name = damage(copied)
    (fault,) = verify(copied)
    assert name in fault


@pytest.mark.parametrize("damage", [cut_a_shard, lose_a_shard, lose_the_index])
def test_reading_what_is_cut_or_missing_names_the_file(copied: Path, damage: Callable[[Path], str]) -> None:
    name = damage(copied)
    if damage is cut_a_shard:
        first_shard(copied).write_bytes(first_shard(copied).read_bytes()[:2000])
    with pytest.raises(UserError, match=f"{copied}.*{name}|{copied / name}"):
        total(ShardDataset(copied))


def test_an_index_without_its_columns_is_refused(copied: Path) -> None:
    before = read_manifest(copied)
    (copied / "index.csv").write_text("key,shard\na,shard-000000.tar\n")
    index = {"samples": 1, "sha256": sha256(copied / "index.csv")}
    write_json(copied / "manifest.json", MANIFEST, before | {"index": index})
    with pytest.raises(UserError, match="png_offset"):
        read_index(copied)


@pytest.mark.parametrize("kind", ["png", "json"])
def test_a_damaged_member_is_named_by_its_key(copied: Path, kind: str) -> None:
    shards = ShardDataset(copied)
    row, shard = shards.rows[5], first_shard(copied)
    raw = bytearray(shard.read_bytes())
    start = int(row[f"{kind}_offset"])
    raw[start : start + 20] = b"\0" * 20
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=row["key"]):
        shards[5]
    assert shards[4].pixels.any()


def test_masks_are_plain_pngs(phantoms: Path) -> None:
    with tarfile.open(first_shard(phantoms)) as tar:
        name = next(name for name in tar.getnames() if name.endswith(".mask.png"))
        with Image.open(tar.extractfile(name)) as mask:  # type: ignore[arg-type]
            assert mask.mode == "L"


def test_the_same_images_twice_are_refused(build: Build, images: Images) -> None:
    one = build(images[:2], name="one")
    with pytest.raises(UserError, match="--name"):
        ShardDataset([one, one])


def test_many_shards_do_not_keep_as_many_files_open(build: Build, images: Images) -> None:
    shards = ShardDataset(build([images[0]] * (OPEN_SHARDS + 5), per_shard=1))
    for _ in range(2):
        for i in range(len(shards)):
            np.testing.assert_array_equal(shards[i].pixels, images[0])
        assert len(shards._store._local._files) <= OPEN_SHARDS


def test_a_subset_holds_the_samples_of_its_rows_and_shares_what_was_decoded(phantoms: Path) -> None:
    shards = ShardDataset(phantoms, cache_mb=64)
    part = shards.subset([7, 2, 5])
    assert [part[i].key for i in range(len(part))] == [shards[i].key for i in (2, 5, 7)]
    assert part.splits == [shards.splits[i] for i in (2, 5, 7)]
    assert sum(part.shard_sizes) == 3
    assert part[1] is shards[5], "an image was decoded twice"
    assert as_elsewhere(part)[1].key == part[1].key


def as_elsewhere(shards: ShardDataset) -> ShardDataset:
    """As another process gets it: its own files and images."""
    other = ShardDataset.__new__(ShardDataset)
    other.__setstate__(shards.__getstate__())
    return other
