"""Balanced batches: every class as often, one order for all ranks, and no view twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from miram.data.shards import Sample, ShardDataset
from miram.data.stream import BalancedStream

Build = Callable[..., Path]
CLASSES = np.array([0] * 40 + [3] * 8 + [1] * 2)  # 50 samples; class 2 has none


def mark(sample: Sample, epoch: int) -> dict[str, Any]:
    """A view that says whose it is and when."""
    return {"place": torch.tensor([int(sample.pixels[0, 0]), epoch])}


@pytest.fixture
def shards(build: Build) -> ShardDataset:
    """50 images in 17 shards; image i is of grey i."""
    return ShardDataset(build([np.full((8, 8), i, np.uint8) for i in range(50)], per_shard=3))


def stream(shards: ShardDataset, seed: int = 0, batch: int = 10, workers: int = 0) -> BalancedStream:
    return BalancedStream(shards, mark, batch, seed, workers, classes=CLASSES)


def epoch_of(made: BalancedStream, epoch: int) -> list[tuple[int, int]]:
    batches = range(epoch * made.batches_per_epoch, (epoch + 1) * made.batches_per_epoch)
    return [place for batch in batches for place in made.places(batch)]


def test_each_class_and_each_of_its_samples_comes_equally_often(shards: ShardDataset) -> None:
    for epoch in range(5):
        numbers = [i for i, _ in epoch_of(stream(shards), epoch)]
        assert len(numbers) == 50
        times = Counter(CLASSES[numbers].tolist())
        assert sorted(times.values()) == [16, 17, 17]
        for c in times:
            often = [numbers.count(i) for i in np.flatnonzero(c == CLASSES)]
            assert max(often) - min(often) <= 1


def test_no_view_is_asked_for_twice(shards: ShardDataset) -> None:
    """A view is a function of sample and epoch: a sample that comes again must come as of another epoch."""
    made = stream(shards)
    places = [place for epoch in range(20) for place in epoch_of(made, epoch)]
    assert len(set(places)) == len(places)


def test_batches_are_mixed_and_a_large_class_is_seen_whole_in_the_end(shards: ShardDataset) -> None:
    made = stream(shards)
    assert all(len(set(CLASSES[[i for i, _ in made.places(batch)]].tolist())) > 1 for batch in range(30))
    assert len({i for epoch in range(30) for i, _ in epoch_of(made, epoch)}) == 50


def test_the_order_is_a_function_of_seed_and_epoch(shards: ShardDataset) -> None:
    forth, back = stream(shards), stream(shards)
    assert [forth.places(b) for b in range(20)] == [back.places(b) for b in reversed(range(20))][::-1]
    orders = {tuple(epoch_of(stream(shards, seed), epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (5, 0), (1, 2)])
def test_ranks_share_the_batches_of_one(shards: ShardDataset, world: int, workers: int) -> None:
    made = stream(shards, workers=workers)
    shares: list[list[Tensor]] = []
    for rank in range(world):
        batches = made.batches(3, rank, world, micro_batch=10 // world)
        shares.append([batch["place"] for batch in islice(batches, 7)])
        batches.close()
    joined = [torch.cat(parts).tolist() for parts in zip(*shares, strict=True)]
    assert joined == [[list(place) for place in made.places(batch)] for batch in range(3, 10)]


def test_classes_must_be_those_of_the_samples(shards: ShardDataset) -> None:
    with pytest.raises(AssertionError):
        BalancedStream(shards, mark, 10, 0, 0, classes=CLASSES[:-1])
