"""Writing a data set so that it can be killed at any moment and go on, and is the same however many processes write it.

.OUT.miram-partial/            gone once OUT is there under its name
    plan.json                  what is being written; another plan starts anew
    shard-000003.json          this shard is finished: its rows, what it left out
    set/shard-000003.tar       becomes OUT

A shard is a fixed run of items, written by one process under another name and then renamed: the unit of work, of
restart, and of the parts of an array job.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..engine.errors import RunFailed, UserError
from ..engine.files import locked as file_lock
from ..engine.files import read_json, sync_folder, write_json
from ..engine.track import Meter
from .layout import Encoded, Moments, Remark, Shard, finished, partial_folder, seal, write_tar

Item = TypeVar("Item")
PLAN, DONE = "miram.plan/1", "miram.shard/1"
FEWEST, MOST = 8, 64  # items a shard holds: few for small sets, so that many processes find work
POOL = 32  # from so many items on, starting processes pays


@dataclass(frozen=True, kw_only=True)
class Work(Generic[Item]):
    """What is to be written: items by shard, and what makes a sample of one. `identity` is what makes it this set."""

    shards: Mapping[int, Sequence[Item]]
    prepare: Callable[[Item], Encoded | Remark]
    identity: str
    facts: Mapping[str, Any]


@dataclass
class Outcome:
    """What was written. `skipped` and `remarks` map an item's name to the reason."""

    samples: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)  # of items that are in, with less than they should have
    unchanged: bool = False  # the same data set was there already


def cut(items: Sequence[Item], per_shard: int | None = None) -> dict[int, Sequence[Item]]:
    """Items by number of their shard: the same for any number of processes and parts."""
    length = per_shard or min(max(len(items) // 64, FEWEST), MOST)
    return {start // length: items[start : start + length] for start in range(0, len(items), length)}


def write_set(work: Work[Item], out: Path, workers: int, name: str) -> Outcome:
    """Write a data set, or the rest of one that was interrupted; the caller holds its lock and publishes it.

    Raises:
        UserError: what was interrupted was something else.
        RunFailed: a worker process was killed; what was finished is kept.
    """
    partial = partial_folder(out)
    _prepare_folder(partial, work)
    todo = {number: items for number, items in work.shards.items() if not _is_done(partial, number, work.identity)}
    done = sum(len(items) for number, items in work.shards.items() if number not in todo)
    total = done + sum(map(len, todo.values()))
    if done and todo:
        print(f"miram: going on after {done} of {total} {name}", file=sys.stderr)
    with Meter(name, total, done) as meter:
        _write_shards(work, partial, todo, workers, meter)
    shards, outcome = _collect(partial, work.shards)
    seal(partial / "set", shards, work.facts, len(outcome.skipped))
    return outcome


def publish(out: Path) -> None:
    """Give a written set its name."""
    partial = partial_folder(out)
    (partial / "set").replace(out)
    sync_folder(out.parent)
    shutil.rmtree(partial)


def discard(out: Path) -> None:
    """Remove what was written for a set."""
    shutil.rmtree(partial_folder(out), ignore_errors=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes out while a set is written; the system lets go of it however this one ends.

    Raises:
        UserError: another process is at it, or `out` cannot be given to a finished set.
    """
    if out.is_mount():
        raise UserError(f"{out} is a mount point, which a finished set cannot take the place of; name a folder in it")
    partial = partial_folder(out)
    partial.mkdir(parents=True, exist_ok=True)
    said = f"another process is writing {partial}; wait for it or name another folder"
    with file_lock(partial / ".lock", said):
        try:
            yield
        finally:
            if not (partial / "plan.json").exists():  # nothing in it to go on from
                shutil.rmtree(partial, ignore_errors=True)


def _prepare_folder(partial: Path, work: Work[Item]) -> None:
    """Keep what an interrupted run of the same plan finished.

    Raises:
        UserError: shards of another plan are there.
    """
    plan = {"identity": work.identity, "shards": {str(k): len(items) for k, items in work.shards.items()}}
    with suppress(UserError):
        if {k: v for k, v in read_json(partial / "plan.json", PLAN).items() if k != "schema"} == plan:
            (partial / "set").mkdir(exist_ok=True)
            for left in (partial / "set").glob(".*"):
                left.unlink()
            return
    if before := list(partial.glob("set/shard-*.tar")):
        raise UserError(
            f"{partial} holds {len(before)} finished shards of an interrupted run with other images or options; repeat "
            "its command to go on, or remove the folder"
        )
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    (partial / "set").mkdir()
    write_json(partial / "plan.json", PLAN, plan)


def _is_done(partial: Path, number: int, identity: str) -> bool:
    try:
        done = read_json(partial / f"{shard_name(number)}.json", DONE)
    except UserError:
        return False
    path = partial / "set" / f"{shard_name(number)}.tar"
    if done["identity"] != identity:  # of a worker that outlived its parent
        return False
    return not done["rows"] or (path.exists() and path.stat().st_size == done["bytes"])


def shard_name(number: int) -> str:
    """shard-000007"""
    return f"shard-{number:06d}"


def _write_shards(
    work: Work[Item], partial: Path, todo: Mapping[int, Sequence[Item]], workers: int, meter: Meter
) -> None:
    if workers == 1 or len(todo) < 2 or sum(map(len, todo.values())) < POOL:
        for number, items in todo.items():
            _write_shard(partial, number, items, work, meter.advance)
        return
    context = multiprocessing.get_context("spawn")
    counter: Synchronized[int] = context.Value("q", 0)
    arguments = (counter, os.getpid())
    bare = replace(work, shards={})  # what a worker needs of it
    with ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_start_worker, initargs=arguments) as pool:
        waiting = {pool.submit(_write_one, partial, n, items, bare) for n, items in todo.items()}
        try:
            _watch(waiting, counter, meter)
        except BrokenProcessPool as error:
            raise RunFailed(
                "a worker process was killed, perhaps for memory: run the same command again with fewer --workers; "
                "finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _watch(waiting: set[Future[None]], counter: Synchronized[int], meter: Meter) -> None:
    """Follow the workers until all is written, or one of them fails."""
    while waiting:
        done, waiting = wait(waiting, timeout=0.3)
        for future in done:
            future.result()
        meter.reach(counter.value)


_count: Callable[[], None]


def _start_worker(counter: Synchronized[int], parent: int) -> None:
    """In a new process: count into the shared number, and end when the parent was killed."""

    def add() -> None:
        with counter.get_lock():
            counter.value += 1

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    global _count
    _count = add
    threading.Thread(target=follow, daemon=True).start()


def _write_one(partial: Path, number: int, items: Sequence[Item], work: Work[Item]) -> None:
    _write_shard(partial, number, items, work, lambda: _count())


def _write_shard(
    partial: Path, number: int, items: Sequence[Item], work: Work[Item], count: Callable[[], None]
) -> None:
    """One shard, whole or not at all; its JSON last, which makes it count."""
    skipped: list[Remark] = []
    remarks: list[Remark] = []

    def samples() -> Iterator[Encoded]:
        for item in items:
            made = work.prepare(item)
            if isinstance(made, Remark):
                skipped.append(made)
            else:
                remarks.extend([made.remark] if made.remark else [])
                yield made
            count()

    path = partial / "set" / f"{shard_name(number)}.tar"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    rows, moments = write_tar(temporary, samples())
    if rows:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        shard = finished(path, rows, moments)
    else:
        temporary.unlink()
        shard = Shard(path.name, 0, "", moments, [])
    told = {
        "identity": work.identity,
        "left_out": {one.name: one.reason for one in skipped},
        "remarks": {one.name: one.reason for one in remarks},
    }
    content = {**shard.fact(), "rows": list(shard.rows), **told}
    write_json(partial / f"{shard_name(number)}.json", DONE, content)


def _collect(partial: Path, numbers: Mapping[int, object]) -> tuple[list[Shard], Outcome]:
    """What the finished shards hold, in order, and what there is to say of it."""
    shards, outcome = [], Outcome()
    for number in sorted(numbers):
        done = read_json(partial / f"{shard_name(number)}.json", DONE)
        outcome.samples += done["samples"]
        outcome.skipped |= done["left_out"]
        outcome.remarks |= done["remarks"]
        shards.append(Shard(done["name"], done["bytes"], done["sha256"], Moments(*done["pixels"]), done["rows"]))
    return shards, outcome


def identity_of(*parts: str) -> str:
    """A digest that tells one plan from another."""
    return sha256("\x1f".join(parts).encode()).hexdigest()
