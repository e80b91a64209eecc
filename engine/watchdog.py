"""Says which rank, or whose data, holds a training up, instead of a silent hang.

A stall is only ever reported: it ends nothing. A network may come back, and torch's own timeouts end a collective that
is dead. Where a collective hangs every rank but one merely waits, so each leaves a heartbeat for the others to read:

RUN/.ranks/<rank>.json  {"schema": "miram.rank/1", "beat": 7, "step": 12, "phase": 1, "what": "learning", "seconds": 3}

`beat` counts the writes, `phase` the phases of the step that came before, `seconds` is how long this one has lasted.
Clocks of machines differ: a reader goes by its own clock and by when it saw a file change. They are files, not entries
of torch's store, because a store whose rank is stopped stops all others with it.

A process that hangs without letting go of Python's interpreter lock cannot speak; the others say it is not heard of.
"""

from __future__ import annotations

import json
import multiprocessing.process
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import psutil  # type: ignore[import-untyped, unused-ignore]

SCHEMA: Final = "miram.rank/1"
READING: Final = "reading data"  # the phase in which a rank waits for its own loader and for no other rank
BYTES: Final = 256  # of a heartbeat, always: written over in place, it needs no room on a full disk
MISSED: Final = 3  # heartbeats that may fail to come before a rank counts as gone
NAMED: Final = 3  # ranks that a sentence can list
NOT_OURS: Final = sys.stdlib_module_names | {"torch", "accelerate"}


class Place(NamedTuple):
    """Where a rank is. Ranks enter the same phases of a step in the same order, so that places compare."""

    step: int
    phase: int
    what: str


@dataclass(frozen=True)
class Peer:
    """What this rank knows of another; times are those of its own clock."""

    text: bytes  # the heartbeat last seen
    changed: float  # when it was another one than before
    looked: float  # when it was last looked for
    place: Place | None = None  # None: nothing was ever heard
    seconds: float = 0.0  # how long it had been there, as it said itself


class Heartbeats:
    """The files by which ranks know of each other. Every call may hang with the disk, so one thread makes them all."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank, self.count = folder / ".ranks", rank, 0

    def path(self, rank: int) -> Path:
        """The file of a rank."""
        return self.folder / f"{rank}.json"

    def write(self, place: Place, seconds: float) -> None:
        """Write this rank's own.

        Raises:
            OSError: it could not be written.
        """
        if not self.count:
            self._begin()
        self.count += 1
        content = {"schema": SCHEMA, "beat": self.count, **place._asdict(), "seconds": round(seconds, 1)}
        descriptor = os.open(self.path(self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(content).encode().ljust(BYTES))
        finally:
            os.close(descriptor)

    def _begin(self) -> None:
        if self.rank == 0:  # what a killed run left; ranks that came sooner will write again
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)  # at the first heartbeat only: at the end it has to stay removed

    def look(self, rank: int, before: Peer | None, now: float) -> Peer:
        """What is known of a rank after reading its file; one that is missing, or half written, brings nothing new."""
        text = b""
        with suppress(OSError), self.path(rank).open("rb", buffering=0) as file:
            text = file.read(BYTES)
        before = before or Peer(b"", changed=now, looked=now)
        heard = parse(text) if text != before.text else None
        return Peer(text, now, now, *heard) if heard else replace(before, looked=now)

    def remove(self) -> None:
        """Remove what this rank wrote; rank 0 removes whatever is there."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        with suppress(OSError):
            self.path(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # the last one out


def parse(text: bytes) -> tuple[Place, float] | None:
    """A heartbeat's place and how long its rank had been there; None if it is none, or half of one."""
    try:
        content = json.loads(text)
        return Place(int(content["step"]), int(content["phase"]), str(content["what"])), float(content["seconds"])
    except (ValueError, KeyError, TypeError):
        return None


class Watchdog:
    """Reports on stderr, in one line, whenever this rank has been in one phase for another so many seconds.

    Inside the `with` two daemon threads are at work: one watches and never touches the disk, as a disk that hangs is
    what it has to report; the other keeps the heartbeats. Processes forked from this one have neither.

    Where others hold this rank up, the line names them. Of the ranks that wait for others only the lowest speaks.

    Args:
        folder: the run folder, which all ranks should share.
        rank: this rank.
        world: how many ranks there are; one alone leaves no files.
        seconds: how long a phase may last unreported.
        clock: seconds that only grow.
        say: where lines go.
    """

    LONGEST_BEAT, SHORTEST_BEAT, TICK = 60.0, 1.0, 1.0  # seconds

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] | None = None,
    ):
        self.rank, self.world, self.seconds, self.clock, self.say = rank, world, seconds, clock, say or to_stderr
        self.tick = min(self.TICK, seconds / 8)
        self.beat = min(max(self.SHORTEST_BEAT, seconds / 8), self.LONGEST_BEAT)
        self.files, self.trouble = Heartbeats(folder, rank), ""
        self.peers: list[Peer | None] = [None] * world
        self._place = Place(0, 0, "starting")
        self._start()

    def _start(self) -> None:
        self._stop, self._threads = threading.Event(), list[threading.Thread]()
        self._watched = threading.get_ident()
        self._lived, self._ticked, self._exchanged = 0.0, self.clock(), 0.0
        self._stay, self._reports = (self._place, 0.0), 0  # the phase that is watched, and when it began

    def __enter__(self) -> Watchdog:
        self._start()
        loops = (self._watch, self._keep_heartbeats) if self.world > 1 else (self._watch,)
        self._threads = [threading.Thread(target=loop, name="watchdog", daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(0.2)  # one that hangs with the disk is left to itself

    def at(self, what: str, step: int) -> None:
        """This rank now enters a phase of a step: "reading data", "learning", … It costs next to nothing."""
        before = self._place
        self._place = Place(step, before.phase + 1 if before.step == step else 0, what)

    def _watch(self) -> None:
        while not self._stop.wait(self.tick):
            self.watch()

    def _keep_heartbeats(self) -> None:
        self.exchange()
        while not self._stop.wait(self.beat):
            self.exchange()
        self.files.remove()

    def watch(self) -> None:
        """Look at this rank, and report it if it is time to."""
        now = self.clock()
        # While this process was stopped (a queue that suspends, a lid that is closed), neither it nor others stalled.
        self._lived += min(now - self._ticked, 2 * self.tick)
        self._ticked = now
        if self._place is not self._stay[0]:
            self._stay, self._reports = (self._place, self._lived), 0
        place, since = self._stay
        if self._lived - since >= self.seconds * (self._reports + 1):
            self._reports += 1
            self._report(place, self._lived - since)

    def exchange(self) -> None:
        """Leave a heartbeat, and look for those of others: rank 0 for all of them, others when they stall."""
        (place, since), now = self._stay, self._lived
        try:
            self.files.write(place, now - since)
            self.trouble = ""
        except OSError as error:
            self.trouble = f"cannot be written ({error.strerror})"
        for rank in range(self.world) if self.rank == 0 or now - since > self.beat else (0,):
            if rank != self.rank:
                self.peers[rank] = self.files.look(rank, self.peers[rank], now)
        self._exchanged = self._lived

    def _report(self, place: Place, seconds: float) -> None:
        why: str | None = ""
        if place.what == READING:
            why = loader_workers()
        elif self.world > 1:
            why = self._held_up_by(place)
        if why is not None:
            spent = f"rank {self.rank} has been {place.what} for {seconds:.0f} s"
            self.say(f"miram: {spent} (step {place.step}{where(self._watched)}){why and '; '}{why}")

    def _held_up_by(self, mine: Place) -> str | None:
        """A clause about other ranks; None where another rank says it."""
        hanging = self._lived - self._exchanged > MISSED * self.beat
        trouble = "does not answer" if hanging else self.trouble
        known = {} if hanging else {rank: peer for rank, peer in enumerate(self.peers) if peer and peer.place}
        gone = [rank for rank, peer in known.items() if peer.looked - peer.changed > MISSED * self.beat]
        here = {rank: peer.place[:2] for rank, peer in known.items() if peer.place and rank not in gone}
        behind = [rank for rank, place in here.items() if place < mine[:2]]
        # Where this rank cannot write, neither may others: that nothing is heard of them is no sign then.
        blamed = behind if trouble else gone + behind
        if blamed:
            said = any(rank < self.rank for rank in here.keys() - behind)
            return None if said else f"it waits for {self._described(blamed, gone)}"
        if trouble:
            return f"which rank it waits for cannot be told, as {self.files.folder} {trouble}"
        if any(place > mine[:2] for place in here.values()):
            return "the other ranks wait for it"
        unheard = self.world - 1 - len(known)
        return f"no other rank is known to be behind it{f', but {unheard} were never heard of' if unheard else ''}"

    def _described(self, blamed: list[int], gone: list[int]) -> str:
        parts = [self._described_one(rank, rank in gone) for rank in blamed[:NAMED]]
        more = [f"{len(blamed) - NAMED} more ranks"] if len(blamed) > NAMED else []
        return ", and for ".join(parts + more)

    def _described_one(self, rank: int, gone: bool) -> str:
        peer = self.peers[rank]
        assert peer
        assert peer.place
        what, step, unheard = peer.place.what, peer.place.step, self._lived - peer.changed
        if gone:
            last = f"process stopped or machine gone? it was {what}, step {step}"
            return f"rank {rank}, which has not been heard of for {unheard:.0f} s ({last})"
        return f"rank {rank}, which has been {what} for {peer.seconds + unheard:.0f} s (step {step})"


def to_stderr(line: str) -> None:
    """Write a line at once, so that lines of several ranks do not mix; where nobody listens, do nothing."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def where(thread: int) -> str:
    """`, at FOLDER/FILE:LINE FUNCTION`: a thread's innermost frame that is in neither torch nor Python's library."""
    frame = sys._current_frames().get(thread)
    while frame and str(frame.f_globals.get("__name__")).partition(".")[0] in NOT_OURS:
        frame = frame.f_back
    if frame is None:
        return ""
    return f", at {'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_qualname}"


def loader_workers() -> str:
    """The state of every process that `multiprocessing` started here, in a clause.

    `active_children()` would also take note of those that ended, and torch would then learn of a dead worker late.
    """
    started = sorted(p.pid or 0 for p in getattr(multiprocessing.process, "_children", ()))
    if not started:
        return "it has no worker processes"
    return f"worker processes: {', '.join(f'{pid} {state(pid)}' for pid in started)}"


def state(pid: int) -> str:
    """What a process is doing, in the system's words, or "died"."""
    try:
        said = str(psutil.Process(pid).status())
    except psutil.Error:
        return "died"
    return "died" if said in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else said
