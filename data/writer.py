"""Writing a data set so that it can be killed at any moment and go on, and is the same however many processes write it.

.OUT.miram-partial/            gone once OUT is there under its name
    plan.json                  what is being written; another plan starts anew
    shard-000003.json          this shard is finished: its rows, what it left out
    set/shard-000003.tar       becomes OUT

A shard is a fixed run of items, written by one process under another name and then renamed: the unit of work, of
restart, and of the parts of an array job.
"""

from __future__ import annotations

import fcntl
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
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..engine.errors import RunFailed, UserError
from ..engine.files import read_json, sync_folder, write_json
from ..engine.track import Meter
from .layout import Encoded, Moments, Shard, finished, seal, write_tar

Item = TypeVar("Item")
PLAN, DONE = "miram.plan/1", "miram.shard/1"
FEWEST, MOST = 8, 64  # items a shard holds: few for small sets, so that many processes find work
POOL = 32  # from so many items on, starting processes pays


@dataclass(frozen=True)
class Skipped:
    """An item that was left out: its name on the user's own screen, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Work(Generic[Item]):
    """What is to be written: items by shard, and what makes a sample of one. `identity` is what makes it this set."""

    shards: Mapping[int, Sequence[Item]]
    prepare: Callable[[Item], Encoded | Skipped]
    identity: str
    facts: Mapping[str, Any]


@dataclass
class Outcome:
    """What was written. `skipped` maps an item's name to the reason."""

    samples: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    unchanged: bool = False  # the same data set was there already


def cut(items: Sequence[Item], per_shard: int | None = None) -> dict[int, Sequence[Item]]:
    """Items by number of their shard: the same for any number of processes and parts."""
    length = per_shard or min(max(len(items) // 64, FEWEST), MOST)
    return {start // length: items[start : start + length] for start in range(0, len(items), length)}


def write_set(work: Work[Item], out: Path, workers: int, name: str) -> Outcome:
    """Write a data set, or the rest of one that was interrupted.

    Raises:
        UserError: another process is writing it.
        RunFailed: a worker process was killed; what was finished is kept.
    """
    partial = partial_folder(out)
    with locked(partial):
        _prepare_folder(partial, work)
        todo = {number: items for number, items in work.shards.items() if not _is_done(partial, number)}
        done = sum(len(items) for number, items in work.shards.items() if number not in todo)
        total = done + sum(map(len, todo.values()))
        if done and todo:
            print(f"miram: going on after {done} of {total} {name}", file=sys.stderr)
        with Meter(name, total, done) as meter:
            _write_shards(work, partial, todo, workers, meter)
        shards, skipped = _collect(partial, work.shards)
        seal(partial / "set", shards, work.facts, len(skipped))
        return Outcome(samples=sum(len(shard.rows) for shard in shards), skipped=skipped)


def publish(out: Path) -> None:
    """Give a written set its name."""
    partial = partial_folder(out)
    (partial / "set").replace(out)
    sync_folder(out.parent)
    shutil.rmtree(partial)


def discard(out: Path) -> None:
    """Remove what was written for a set."""
    shutil.rmtree(partial_folder(out), ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """Where a set is written until it is complete."""
    return out.with_name(f".{out.name}.miram-partial")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the system lets go of it however this one ends."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {partial}; wait for it or name another folder") from error
        yield


def _prepare_folder(partial: Path, work: Work[Item]) -> None:
    """Keep what an interrupted run of the same plan finished, remove anything else."""
    plan = {"identity": work.identity, "shards": {str(k): len(items) for k, items in work.shards.items()}}
    with suppress(UserError):
        if {k: v for k, v in read_json(partial / "plan.json", PLAN).items() if k != "schema"} == plan:
            for left in (partial / "set").glob(".*"):
                left.unlink()
            return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    (partial / "set").mkdir()
    write_json(partial / "plan.json", PLAN, plan)


def _is_done(partial: Path, number: int) -> bool:
    try:
        done = read_json(partial / f"{shard_name(number)}.json", DONE)
    except UserError:
        return False
    path = partial / "set" / f"{shard_name(number)}.tar"
    return not done["rows"] or (path.exists() and path.stat().st_size == done["bytes"])


def shard_name(number: int) -> str:
    """shard-000007"""
    return f"shard-{number:06d}"


def _write_shards(
    work: Work[Item], partial: Path, todo: Mapping[int, Sequence[Item]], workers: int, meter: Meter
) -> None:
    if workers == 1 or len(todo) < 2 or sum(map(len, todo.values())) < POOL:
        for number, items in todo.items():
            _write_shard(partial, number, items, work.prepare, meter.advance)
        return
    context = multiprocessing.get_context("spawn")
    counter: Synchronized[int] = context.Value("q", 0)
    arguments = (counter, os.getpid())
    with ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_start_worker, initargs=arguments) as pool:
        waiting = {pool.submit(_write_one, partial, n, items, work.prepare) for n, items in todo.items()}
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


def _write_one(partial: Path, number: int, items: Sequence[Item], prepare: Callable[[Item], Encoded | Skipped]) -> None:
    _write_shard(partial, number, items, prepare, lambda: _count())


def _write_shard(
    partial: Path,
    number: int,
    items: Sequence[Item],
    prepare: Callable[[Item], Encoded | Skipped],
    count: Callable[[], None],
) -> None:
    """One shard, whole or not at all; its JSON last, which makes it count."""
    skipped: list[Skipped] = []

    def samples() -> Iterator[Encoded]:
        for item in items:
            made = prepare(item)
            if isinstance(made, Skipped):
                skipped.append(made)
            else:
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
    _record(partial, number, shard, skipped)


def _record(partial: Path, number: int, shard: Shard, skipped: Sequence[Skipped]) -> None:
    left_out = [[item.name, item.reason] for item in skipped]
    content = {**shard.fact(), "rows": list(shard.rows), "left_out": left_out}
    write_json(partial / f"{shard_name(number)}.json", DONE, content)


def _collect(partial: Path, numbers: Mapping[int, object]) -> tuple[list[Shard], dict[str, str]]:
    """What the finished shards hold, in order, and all that was left out."""
    shards: list[Shard] = []
    skipped: dict[str, str] = {}
    for number in sorted(numbers):
        done = read_json(partial / f"{shard_name(number)}.json", DONE)
        skipped |= dict(done["left_out"])
        moments = Moments(*done["pixels"])
        shards.append(Shard(done["name"], done["bytes"], done["sha256"], moments, done["rows"]))
    return shards, skipped


def identity_of(*parts: str) -> str:
    """A digest that tells one plan from another."""
    return sha256("\x1f".join(parts).encode()).hexdigest()
