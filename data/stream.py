"""The training stream: which sample comes when is a function of (seed, epoch) alone, whatever the ranks and workers.

An epoch is a permutation: shards are shuffled, taken a few at a time so that few are open at once, and the samples of
those are shuffled together. Global batch t of an epoch is samples t*B … (t+1)*B of it; the tail that fills no batch is
dropped. Where a run stands is one integer, the number of batches it has taken.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from ..engine.errors import UserError
from ..engine.seeding import generator
from ..engine.signals import ignore_stop_signals
from .resample import keep_freed_memory
from .shards import Sample, ShardDataset
from .store.local import Outage

Place = tuple[int, int]  # sample number, epoch
SHARDS_AT_ONCE = 16
FAULT = "fault"  # stands in a batch for a sample that cannot be read
DAMAGED = "damaged"  # why another sample stands in for this one, or ""
REACH = tuple(2**k for k in range(12))  # how far substitutes lie: beyond the end of a shard that is missing whole

View = Callable[[Sample, int], dict[str, Any]]


def epoch_order(shard_sizes: tuple[int, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of samples 0 … n-1 that is epoch `epoch`."""
    rng = generator(seed, epoch, "order")
    starts = np.cumsum((0, *shard_sizes))
    shards = rng.permutation(len(shard_sizes))
    blocks = [shards[i : i + SHARDS_AT_ONCE] for i in range(0, len(shards), SHARDS_AT_ONCE)]
    samples = [np.concatenate([np.arange(starts[s], starts[s + 1]) for s in block]) for block in blocks]
    return np.concatenate([rng.permutation(block) for block in samples])


class ViewDataset(Dataset[dict[str, Any]]):
    """Samples as views, by (sample number, epoch).

    A damaged sample is a fault, or, with `skip`, replaced by another one: which, depends on its number alone, so that
    batches stay equal and every rank and every restart does the same.
    """

    def __init__(self, shards: ShardDataset, view: View, skip: bool = False):
        self.shards, self.view, self.skip = shards, view, skip

    def __getitem__(self, place: Place) -> dict[str, Any]:
        i, epoch = place
        try:
            return {**self.view(self.shards[i], epoch), DAMAGED: ""}
        except Outage as error:  # a network that is down is no damage: the sample is sound
            return {FAULT: str(error)}
        except UserError as error:  # raised in a worker, torch would wrap it into its traceback and keep the workers
            reason = f"sample {self.shards.rows[i]['key']}: {error}"
            return self._instead(i, epoch, reason) if self.skip else {FAULT: str(error)}

    def __getitems__(self, places: list[Place]) -> list[dict[str, Any]]:
        """Several samples, fetched at once where they are remote."""
        with suppress(UserError):  # whichever it is, says so when it is read
            self.shards.prefetch([i for i, _ in places])
        return [self[place] for place in places]

    def _instead(self, i: int, epoch: int, reason: str) -> dict[str, Any]:
        for step in REACH:
            try:
                return {**self.view(self.shards[(i + step) % len(self.shards)], epoch), DAMAGED: reason}
            except Outage as error:
                return {FAULT: str(error)}
            except UserError:
                continue
        return {FAULT: f"{reason}; so are {len(REACH)} samples that could stand in for it"}

    def __len__(self) -> int:
        return len(self.shards)


class EpochStream:
    """Global batches of a data set without end, of which each rank is given its share.

    Args:
        skip: replace damaged samples instead of stopping at them, and name them.

    Raises:
        UserError: the data set does not fill one batch.
    """

    def __init__(
        self, shards: ShardDataset, view: View, batch_size: int, seed: int, workers: int, *, skip: bool = False
    ):
        self.dataset = ViewDataset(shards, view, skip)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self._named: set[str] = set()
        self._skipped = 0
        self.shard_sizes = shards.shard_sizes
        self.batches_per_epoch = len(shards) // batch_size
        if not self.batches_per_epoch:
            raise UserError(
                f"train.batch_size={batch_size} is more than the {len(shards)} samples of data.shards; lower it"
            )
        self._order = lru_cache(maxsize=2)(epoch_order)

    def places(self, batch: int) -> list[Place]:
        """The samples of global batch number `batch`, counted from the start of training."""
        epoch, t = divmod(batch, self.batches_per_epoch)
        order = self._order(self.shard_sizes, self.seed, epoch)
        return [(int(i), epoch) for i in order[t * self.batch_size : (t + 1) * self.batch_size]]

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Generator[dict[str, Any]]:
        """Micro-batches of this rank from global batch `start` on."""
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self.dataset,
            batch_sampler=_Share(self, start, rank, world, micro_batch),
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker if self.workers else None,
        )
        if not self.workers:
            keep_freed_memory()
        for batch in loader:
            if FAULT in batch:
                raise UserError(batch[FAULT])
            self._name(reason for reason in batch.pop(DAMAGED) if reason)
            yield batch

    def skipped(self) -> int:
        """How often another sample stood in for a damaged one on this rank, since this was last asked."""
        count, self._skipped = self._skipped, 0
        return count

    def _name(self, reasons: Iterable[str]) -> None:
        """Count what was skipped, and say it once of each sample."""
        for reason in reasons:
            self._skipped += 1
            if reason not in self._named:
                self._named.add(reason)
                print(f"miram: skipped: {reason}", file=sys.stderr, flush=True)


class BalancedStream(EpochStream):
    """As `EpochStream`, but each class comes equally often in an epoch, and each sample of a class give or take one.

    An epoch has as many samples as the data set, so those of a large class are not all in it. What comes again is
    asked for with another epoch, as a view is a function of that: it is another view.

    Args:
        classes: (n,) of the samples.
    """

    def __init__(
        self,
        shards: ShardDataset,
        view: View,
        batch_size: int,
        seed: int,
        workers: int,
        *,
        classes: NDArray[np.int64],
        skip: bool = False,
    ):
        super().__init__(shards, view, batch_size, seed, workers, skip=skip)
        assert len(classes) == len(shards), (len(classes), len(shards))
        self.members = [np.flatnonzero(classes == c) for c in np.unique(classes)]
        self._drawn = lru_cache(maxsize=2)(self._draw)

    def places(self, batch: int) -> list[Place]:
        """The samples of global batch number `batch`, counted from the start of training."""
        epoch, t = divmod(batch, self.batches_per_epoch)
        return self._drawn(epoch)[t * self.batch_size : (t + 1) * self.batch_size]

    def _draw(self, epoch: int) -> list[Place]:
        rng, total = generator(self.seed, epoch, "balanced"), len(self.dataset)
        counts = np.diff(np.arange(len(self.members) + 1) * total // len(self.members))
        drawn = [_again(rng, of, n) for of, n in zip(self.members, counts.tolist(), strict=True)]
        order = rng.permutation(np.concatenate(drawn)).tolist()
        came: Counter[int] = Counter()
        found = []
        for i in order:
            found.append((i, epoch * total + came[i]))  # no sample comes more often than there are places
            came[i] += 1
        return found


def _again(rng: np.random.Generator, members: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` of them: all, again and again, each time in another order."""
    return np.concatenate([rng.permutation(members) for _ in range(count // len(members) + 1)])[:count]


def start_worker(number: int) -> None:
    """In a worker process, before its first sample."""
    ignore_stop_signals(number)
    keep_freed_memory()


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Views stacked into a batch, or the first fault among them."""
    faults = [item for item in items if FAULT in item]
    return faults[0] if faults else default_collate(items)


class _Share:
    """One rank's micro-batches: each global batch is cut into `world` equal runs, each run into micro-batches."""

    def __init__(self, stream: EpochStream, start: int, rank: int, world: int, micro_batch: int):
        self.stream, self.start, self.rank, self.world, self.micro_batch = (stream, start, rank, world, micro_batch)

    def __iter__(self) -> Iterator[list[Place]]:
        share = self.stream.batch_size // self.world
        batch = self.start
        while True:
            mine = self.stream.places(batch)[self.rank * share : (self.rank + 1) * share]
            yield from (mine[i : i + self.micro_batch] for i in range(0, share, self.micro_batch))
            batch += 1
