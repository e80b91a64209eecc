"""The stream: one order for all, whatever the ranks, workers and restarts."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miram.data.config import CropSection
from miram.data.shards import Sample, ShardDataset
from miram.data.stream import SHARDS_AT_ONCE, EpochStream, View, epoch_order
from miram.data.views import MultiScaleViews, Normalisation
from miram.engine.errors import UserError

Build = Callable[..., Path]
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=40).map(tuple).filter(any)


def mark(sample: Sample, epoch: int) -> dict[str, Any]:
    """A view that says whose it is and when."""
    return {"place": torch.tensor([int(sample.pixels[0, 0]), epoch])}


@pytest.fixture
def shards(build: Build) -> ShardDataset:
    """50 images in 17 shards; image i is of grey i."""
    return ShardDataset(build([np.full((8, 8), i, np.uint8) for i in range(50)], per_shard=3))


def stream(shards: ShardDataset, view: View = mark, batch: int = 8, seed: int = 0, workers: int = 0) -> EpochStream:
    return EpochStream(shards, view, batch, seed, workers)


def places(batches: Iterator[dict[str, Tensor]], count: int) -> list[list[int]]:
    return [place for batch in islice(batches, count) for place in batch["place"].tolist()]


# ---------------------------------------------------------------------------------------------- order


@given(SIZES, st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_always_the_same_one(sizes: tuple[int, ...], seed: int, epoch: int) -> None:
    order = epoch_order(sizes, seed, epoch)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    np.testing.assert_array_equal(order, epoch_order(sizes, seed, epoch))


def test_epochs_and_seeds_differ() -> None:
    orders = {epoch_order((20,) * 5, seed, epoch).tobytes() for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_every_sample_comes_early_as_often_as_late() -> None:
    """The mean place of a sample over n epochs is within 5 standard errors of the middle."""
    n, sizes = 2000, (5, 1, 9, 5)
    ranks = np.mean([np.argsort(epoch_order(sizes, 7, epoch)) for epoch in range(n)], axis=0)
    assert np.abs(ranks - 9.5).max() < 5 * np.sqrt((20**2 - 1) / 12 / n)


@given(SIZES, st.integers(0, 99))
def test_a_block_of_shards_is_done_before_the_next_one_is_opened(sizes: tuple[int, ...], epoch: int) -> None:
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[epoch_order(sizes, 1, epoch)]
    first = {s: int(np.argmax(shard_of == s)) for s in set(shard_of.tolist())}
    last = {s: len(shard_of) - 1 - int(np.argmax(shard_of[::-1] == s)) for s in first}
    open_at_once = [sum(first[s] <= t <= last[s] for s in first) for t in range(len(shard_of))]
    assert max(open_at_once) <= SHARDS_AT_ONCE


def test_samples_of_a_block_are_mixed() -> None:
    shard_of = epoch_order((100,) * 8, 0, 0) // 100
    assert (np.diff(shard_of) != 0).mean() == pytest.approx(7 / 8, abs=0.05)


# ---------------------------------------------------------------------------------------------- batches


def test_batches_are_the_epochs_cut_with_their_tails_dropped(shards: ShardDataset) -> None:
    expected = [[i, epoch] for epoch in range(3) for i in epoch_order((*[3] * 16, 2), 5, epoch)[:48].tolist()]
    assert places(stream(shards, seed=5).batches(0, 0, 1, 8), 18) == expected


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_and_micro_batches_share_out_the_same_batches(shards: ShardDataset, world: int, micro: int) -> None:
    whole = [places(stream(shards).batches(t, 0, 1, 8), 1) for t in range(8)]
    steps = 8 // world // micro
    ranks = [stream(shards).batches(0, rank, world, micro) for rank in range(world)]
    assert [[p for rank in ranks for p in places(rank, steps)] for _ in range(8)] == whole


@given(st.integers(0, 40))
def test_a_batch_is_a_function_of_its_number(shards_of_forty: EpochStream, batch: int) -> None:
    epoch, t = divmod(batch, 5)
    order = epoch_order(shards_of_forty.shard_sizes, 0, epoch)
    assert shards_of_forty.places(batch) == [(int(i), epoch) for i in order[8 * t : 8 * t + 8]]


@pytest.fixture(scope="module")
def shards_of_forty(phantoms: Path) -> EpochStream:
    forty = ShardDataset(phantoms)
    forty.rows = forty.rows.take([i % len(forty) for i in range(40)])
    return stream(forty)


@pytest.mark.parametrize("start", [1, 5, 6, 13])
def test_starting_at_a_batch_gives_the_rest_exactly(shards: ShardDataset, start: int) -> None:
    run = stream(shards)
    whole = places(run.batches(0, 0, 1, 4), 2 * 16)
    assert places(stream(shards).batches(start, 0, 1, 4), 2 * (16 - start)) == whole[8 * start :]


def crops(phantoms: Path, rank: int = 0, world: int = 1, workers: int = 0, start: int = 0) -> list[dict[str, Any]]:
    """Three epochs of augmented views in batches of four, from batch `start` on."""
    shards = ShardDataset(phantoms)
    views = MultiScaleViews((16, 8), (1, 2), 8, CropSection(), Normalisation(0.2, 0.1), seed=3)
    batches = EpochStream(shards, views, 4, 0, workers).batches(start, rank, world, 4 // world)
    return list(islice(batches, 3 * len(shards) // 4 - start))


@pytest.mark.parametrize(("world", "workers", "start"), [(1, 2, 0), (2, 0, 0), (4, 2, 0), (2, 2, 4), (1, 0, 7)])
def test_keys_and_augmented_pixels_depend_on_no_rank_worker_or_restart(
    phantoms: Path, world: int, workers: int, start: int
) -> None:
    alone = crops(phantoms)[start:]
    ranks = [crops(phantoms, rank, world, workers, start) for rank in range(world)]
    for one, *shares in zip(alone, *ranks, strict=True):
        assert one["key"] == [key for share in shares for key in share["key"]]
        for name in ("noise", "view/1", "view/2"):
            assert torch.equal(one[name], torch.cat([share[name] for share in shares])), name


def test_a_batch_larger_than_the_data_is_refused(shards: ShardDataset) -> None:
    assert stream(shards, batch=50).batches_per_epoch == 1
    with pytest.raises(UserError, match=r"batch_size=51 .*50"):
        stream(shards, batch=51)


# ---------------------------------------------------------------------------------------------- damage


def first_shard(shards: ShardDataset) -> Path:
    return min(Path(shards.roots[0]).glob("*.tar"))


@pytest.fixture
def damaged(shards: ShardDataset) -> ShardDataset:
    """The first shard is cut after its first header."""
    shard = first_shard(shards)
    shard.write_bytes(shard.read_bytes()[:600])
    return shards


def complaint(shards: ShardDataset, workers: int) -> str:
    """What an epoch over damaged shards ends with."""
    try:
        list(islice(stream(shards, workers=workers).batches(0, 0, 1, 8), 6))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def collected() -> Iterator[None]:
    """Garbage is collected after the test and not within it; workers that are left are killed first."""
    gc.disable()
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    gc.enable()
    gc.collect()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_one_sentence(damaged: ShardDataset, workers: int, collected: None) -> None:
    said = complaint(damaged, workers)
    assert str(first_shard(damaged)) in said
    assert "Traceback" not in said
    assert "\n" not in said.strip()


def test_a_worker_says_what_the_main_process_would_say(damaged: ShardDataset, collected: None) -> None:
    assert complaint(damaged, 2) == complaint(damaged, 0)


def test_after_an_error_no_worker_is_left(damaged: ShardDataset, collected: None) -> None:
    assert complaint(damaged, 2)
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------------------------- skipping


def skipping(shards: ShardDataset, workers: int = 0) -> EpochStream:
    return EpochStream(shards, mark, 8, 0, workers, skip=True)


@pytest.fixture
def holed(build: Build) -> ShardDataset:
    """50 images in 17 shards; image 20 is damaged and the shard of 30, 31 and 32 is gone."""
    shards = ShardDataset(build([np.full((8, 8), i, np.uint8) for i in range(50)], per_shard=3))
    row = shards.rows[20]
    path = Path(shards.roots[0]) / row["shard"]
    raw = bytearray(path.read_bytes())
    raw[int(row["png_offset"]) : int(row["png_offset"]) + 8] = b"\0" * 8
    path.write_bytes(raw)
    (Path(shards.roots[0]) / "shard-000010.tar").unlink()
    return shards


def test_what_is_damaged_is_replaced_and_nothing_else_changes(
    holed: ShardDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    given = skipping(holed)
    asked = [i for t in range(6) for i, _ in given.places(t)]
    seen = [place[0] for place in places(given.batches(0, 0, 1, 8), 6)]
    gone = {20, 30, 31, 32}
    assert all((i == j) == (i not in gone) for i, j in zip(asked, seen, strict=True))
    assert not gone & set(seen)
    assert given.skipped() == len(gone & set(asked))
    assert given.skipped() == 0
    assert ("miram: skipped: sample " + holed.rows[20]["key"]) in capsys.readouterr().err


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 2)])
def test_what_stands_in_is_the_same_for_all_ranks_and_workers(holed: ShardDataset, world: int, workers: int) -> None:
    alone = places(skipping(holed).batches(0, 0, 1, 8), 6)
    ranks = [places(skipping(holed, workers).batches(0, rank, world, 8 // world), 6) for rank in range(world)]
    share = 8 // world
    together = [p for t in range(6) for rank in ranks for p in rank[t * share : (t + 1) * share]]
    assert together == alone


def test_where_nothing_can_stand_in_it_stops(holed: ShardDataset) -> None:
    for path in Path(holed.roots[0]).glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="could stand in"):
        next(skipping(holed).batches(0, 0, 1, 8))
