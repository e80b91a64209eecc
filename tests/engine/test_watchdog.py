"""The watchdog against ranks that hang, are stopped or killed: on a clock of the test's own, then as real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from miram.engine.watchdog import BYTES, READING, Heartbeats, Place, Watchdog, loader_workers, parse

SECONDS = 80.0  # how long a phase may last on the test's clock; a heartbeat every 10 s
fork = multiprocessing.get_context("fork")


class World:
    """Ranks in one process, each with a clock of its own that is hours off the others'; no threads."""

    def __init__(self, folder: Path, ranks: int, seconds: float = SECONDS) -> None:
        self.now, self.lines, self.stopped = 0.0, list[str](), set[int]()
        self.dogs = [
            Watchdog(
                folder, rank, ranks, seconds, clock=lambda rank=rank: self.now + 7200 * rank, say=self.lines.append
            )
            for rank in range(ranks)
        ]
        self.beats = 0.0

    def at(self, what: str, step: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.dogs)):
            self.dogs[rank].at(what, step)

    def step(self, number: int) -> None:
        """All ranks go through a step."""
        self.at(READING, number)
        self.at("learning", number)

    def live(self, seconds: float) -> list[str]:
        """Time passes; returns what was said meanwhile."""
        before, end = len(self.lines), self.now + seconds
        while self.now < end:
            self.now += self.dogs[0].tick
            awake = [dog for dog in self.dogs if dog.rank not in self.stopped]
            for dog in awake:
                dog.watch()
            if self.now >= self.beats:
                self.beats = self.now + self.dogs[0].beat
                for dog in awake:
                    if len(self.dogs) > 1:
                        dog.exchange()
        return self.lines[before:]


def by(rank: int, lines: list[str]) -> list[str]:
    """What a rank said."""
    return [line for line in lines if line.startswith(f"miram: rank {rank} ")]


def blamed(lines: list[str]) -> set[int]:
    """The ranks that others say they wait for."""
    return {int(rank) for line in lines for rank in re.findall(r"for rank (\d+), which", line)}


# --------------------------------------------------------------------------------------- one rank


def test_a_phase_that_lasts_is_said_with_rank_step_phase_and_duration(tmp_path: Path) -> None:
    alone = World(tmp_path, 1)
    alone.at("learning", 12)
    assert not alone.live(SECONDS - 1)
    (line,) = alone.live(5)
    assert re.match(r"miram: rank 0 has been learning for 8\d s \(step 12, at \S+\.py:\d+ \S+\)$", line)
    assert not list(tmp_path.iterdir())  # nobody would read it


def test_a_report_comes_again_after_as_long(tmp_path: Path) -> None:
    alone = World(tmp_path, 1)
    alone.at("saving", 3)
    assert len(alone.live(3.5 * SECONDS)) == 3
    assert [int(re.findall(r"for (\d+) s", line)[0]) // 80 for line in alone.lines] == [1, 2, 3]


def test_phases_that_change_are_never_said_even_where_they_are_called_alike(tmp_path: Path) -> None:
    alone = World(tmp_path, 1)
    for step in range(10):
        for what in (READING, "learning", "learning"):
            alone.at(what, step)
            assert not alone.live(0.9 * SECONDS)


def test_time_in_which_the_process_itself_was_stopped_is_no_stall(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.step(1)
    world.live(20)
    world.now += 100 * SECONDS
    assert not world.live(SECONDS / 2)


def test_a_rank_that_never_entered_a_phase_is_starting(tmp_path: Path) -> None:
    assert "rank 0 has been starting for" in World(tmp_path, 1).live(SECONDS + 5)[0]


# ----------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize("late", [0, 1, 2])
def test_the_rank_whose_data_do_not_come_is_named_by_itself_and_by_one_other(tmp_path: Path, late: int) -> None:
    world = World(tmp_path, 3)
    world.step(4)
    world.live(30)
    world.at(READING, 5)
    others = {0, 1, 2} - {late}
    world.at("learning", 5, *others)
    lines = world.live(SECONDS + 5)
    assert len(lines) == 2  # the third has nothing to add
    assert f"rank {late} has been reading data for" in by(late, lines)[0]
    assert re.search(
        rf"it waits for rank {late}, which has been reading data for [78]\d s \(step 5\)", lines[0] + lines[1]
    )
    assert by(min(others), lines)
    assert blamed(lines) == {late}
    assert len(world.live(SECONDS)) == 2


@pytest.mark.parametrize("behind", [0, 1])
def test_a_rank_in_an_earlier_step_or_phase_is_named(tmp_path: Path, behind: int) -> None:
    world = World(tmp_path, 2)
    for what, step in [(READING, 4), ("learning", 4), ("saving", 4)]:
        world.at(what, step)
    for what, step in [("looking", 4), (READING, 5), ("learning", 5)]:
        world.at(what, step, 1 - behind)
    lines = world.live(SECONDS + 5)
    assert f"rank {behind}, which has been saving for" in by(1 - behind, lines)[0]
    assert "the other ranks wait for it" in by(behind, lines)[0]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_rank_that_stops_is_named_by_the_lowest_one_left(tmp_path: Path, gone: int) -> None:
    world = World(tmp_path, 3)
    world.step(6)
    world.live(25)
    world.stopped = {gone}
    world.at(READING, 7, *({0, 1, 2} - {gone}))
    world.at("learning", 7, *({0, 1, 2} - {gone}))
    (line,) = world.live(SECONDS + 10)
    assert by(min({0, 1, 2} - {gone}), [line])
    age = re.search(rf"it waits for rank {gone}, which has not been heard of for (\d+) s \(.*learning, step 6\)", line)
    assert age
    assert SECONDS - 20 <= int(age[1]) <= SECONDS + 20


def test_a_rank_that_goes_on_is_no_longer_gone(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.step(1)
    world.live(20)
    world.stopped = {1}
    assert blamed(world.live(SECONDS + 10)) == {1}
    world.stopped = set()
    world.live(30)
    world.step(2)
    assert not blamed(world.live(SECONDS + 10))


def test_a_hang_of_all_names_none(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.step(1)
    lines = world.live(SECONDS + 5)
    assert len(lines) == 2
    assert all("no other rank is known to be behind it" in line for line in lines)


def test_of_many_ranks_that_are_gone_a_few_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    world = World(tmp_path, 10)
    world.step(1)
    world.live(30)
    world.stopped = {2, 3, 4, 5, 6}
    world.at("learning", 2, 0, 1, 7, 8, 9)
    (line,) = world.live(SECONDS + 10)
    assert blamed([line]) == {2, 3, 4}
    assert "and for 2 more ranks" in line


def test_heartbeats_of_an_earlier_run_are_not_believed(tmp_path: Path) -> None:
    old = World(tmp_path, 3)
    old.step(1)
    old.live(30)  # killed: its files are still there
    new = World(tmp_path, 3)
    new.stopped = {2}  # and this one has not come yet
    new.step(900)
    lines = new.live(SECONDS + 10)
    assert len(lines) == 2
    assert all("no other rank is known to be behind it, but 1 were never heard of" in line for line in lines)


def test_half_a_heartbeat_brings_nothing_new(tmp_path: Path) -> None:
    writer, reader = Heartbeats(tmp_path, 1), Heartbeats(tmp_path, 0)
    seen = reader.look(1, None, 0.0)
    writer.write(Place(7, 1, "learning"), 3.0)
    whole = writer.path(1).read_bytes()
    assert json.loads(whole)["schema"] == "miram.rank/1"
    assert len(whole) == BYTES
    for broken in (whole[:20], b"", b"null", b"[]", b'{"step": null}', b"\xff\xfe"):
        writer.path(1).write_bytes(broken)
        assert reader.look(1, seen, 1.0).place is None
    writer.path(1).write_bytes(whole)
    assert reader.look(1, seen, 2.0).place == Place(7, 1, "learning")
    assert parse(whole) == (Place(7, 1, "learning"), 3.0)


# ------------------------------------------------------------------- a folder that cannot be used


def no_folder(ranks: Path) -> None:
    shutil.rmtree(ranks)


def a_file_in_its_place(ranks: Path) -> None:
    shutil.rmtree(ranks)
    ranks.write_text("")


def no_permission(ranks: Path) -> None:
    for path in (*ranks.iterdir(), ranks):
        path.chmod(0o500)
    if os.getuid() == 0:  # who may write everywhere
        os.seteuid(65534)


def a_full_disk(ranks: Path) -> None:
    for path in ranks.iterdir():
        path.unlink()
        path.symlink_to("/dev/full")


@pytest.mark.parametrize("spoil", [no_folder, a_file_in_its_place, no_permission, a_full_disk])
def test_heartbeats_that_cannot_be_written_disturb_nothing_and_nobody_is_blamed(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    world = World(tmp_path, 2)
    world.step(1)
    world.live(30)
    try:
        spoil(tmp_path / ".ranks")
        world.step(2)
        lines = world.live(SECONDS + 5)
    finally:
        os.seteuid(os.getuid())
    assert len(lines) == 2
    assert all("which rank it waits for cannot be told, as" in line for line in lines)
    assert all("cannot be written (" in line for line in lines)
    for dog in world.dogs:
        dog.files.remove()


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_run_folder_that_is_none_disturbs_nothing(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    world = World(tmp_path / folder, 2)
    world.step(1)
    assert len(world.live(SECONDS + 5)) == 2


class Quick(Watchdog):
    """Heartbeats as often as a short test needs them."""

    SHORTEST_BEAT = 0.02


def test_a_disk_that_hangs_is_said_and_holds_nobody_up(tmp_path: Path) -> None:
    lines, threads = list[str](), threading.active_count()
    other = tmp_path / ".ranks/1.json"
    with Quick(tmp_path, 0, 2, 0.4, say=lines.append) as dog:
        wait_until((tmp_path / ".ranks/0.json").exists)
        os.mkfifo(other)  # opening it to read hangs for ever, as a dead network disk would
        dog.at("saving", 3)
        wait_until(lambda: lines)
        began = time.monotonic()
    assert time.monotonic() - began < 0.5
    assert ".ranks does not answer" in lines[0]
    wait_until(lambda: threading.active_count() == threads or let_go(other))


def let_go(fifo: Path) -> None:
    """End a read of a pipe that nobody writes to."""
    with suppress(OSError):
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


# ----------------------------------------------------------------------------------- the threads


def wait_until(true: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_line_goes_to_stderr_and_none_after_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    said = list[str]()
    with Quick(tmp_path, 0, 1, 0.1) as dog:
        dog.at("learning", 1)
        wait_until(lambda: said.append(capsys.readouterr().err) or said[-1])
        began = time.monotonic()
    assert time.monotonic() - began < 0.5
    assert threading.active_count() == before
    assert re.match(r"miram: rank 0 has been learning for \d+ s \(step 1, at .*\)\n", said[-1])
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_closed_stderr_disturbs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody, Quick(tmp_path, 0, 1, 0.05) as dog:
        monkeypatch.setattr(sys, "stderr", nobody)
        dog.at("learning", 1)
        time.sleep(0.3)
        assert threading.active_count() > 1
        monkeypatch.undo()
        with suppress(OSError):
            nobody.close()


def test_the_folder_is_gone_at_the_end_whoever_ends_first(tmp_path: Path) -> None:
    for first, second in [(0, 1), (1, 0)]:
        dogs = [Quick(tmp_path, rank, 2, 0.4, say=print) for rank in range(2)]
        for dog in dogs:
            dog.__enter__()
        wait_until(lambda: len(list(tmp_path.glob(".ranks/*.json"))) == 2)
        dogs[first].__exit__()
        time.sleep(0.2)
        dogs[second].__exit__()
        assert not list(tmp_path.iterdir())


def test_a_forked_process_has_no_watchdog_and_can_speak(tmp_path: Path) -> None:
    lines = list[str]()

    def child() -> None:
        dog.at("in the child", 9)
        print("from the child", file=sys.stderr, flush=True)
        time.sleep(0.3)
        os._exit(17 if threading.active_count() == 1 and not lines else 1)

    with Quick(tmp_path, 0, 2, 0.1, say=lines.append) as dog:
        for step in range(4):
            dog.at(READING, step)
            processes = [fork.Process(target=child) for _ in range(2)]
            for process in processes:
                process.start()
                dog.at("learning", step)
            for process in processes:
                process.join(15)
            assert [process.exitcode for process in processes] == [17, 17]
            lines.clear()
        wait_until(lambda: json.loads((tmp_path / ".ranks/0.json").read_bytes())["what"] == "learning")
    assert not list(tmp_path.iterdir())


def test_it_needs_no_torch() -> None:
    code = "import sys, miram.engine.watchdog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------ the loader's workers


@pytest.fixture
def children() -> Iterator[list[BaseProcess]]:
    """Two processes that never end."""
    processes: list[BaseProcess] = [fork.Process(target=time.sleep, args=(600,), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    yield processes
    for process in processes:
        process.kill()
        process.join()


def test_workers_that_live_stopped_or_died_are_told_apart_and_death_is_left_for_torch_to_find(
    tmp_path: Path, children: list[BaseProcess]
) -> None:
    first, second = (process.pid for process in children)
    assert first
    assert second
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: psutil.Process(second).status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: psutil.Process(first).status() == psutil.STATUS_STOPPED)
    alone = World(tmp_path, 1)
    alone.at(READING, 2)
    (line,) = alone.live(SECONDS + 5)
    assert f"{first} stopped" in line
    assert f"{second} died" in line
    assert os.waitid(os.P_PID, second, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # still to be had


def test_a_worker_that_was_waited_for_is_not_mentioned(children: list[BaseProcess]) -> None:
    children[1].kill()
    children[1].join()
    assert str(children[0].pid) in loader_workers()
    assert str(children[1].pid) not in loader_workers()


class Stuck(Dataset[int]):
    """Its samples come once somebody has complained."""

    def __init__(self) -> None:
        self.complained = fork.Event()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        self.complained.wait()
        return i


@pytest.mark.parametrize(("workers", "place"), [(0, "Stuck.__getitem__"), (2, "read")])
def test_a_loader_that_hangs_is_said_with_its_workers_and_the_place_outside_of_torch(
    tmp_path: Path, workers: int, place: str
) -> None:
    lines, stuck = list[str](), Stuck()

    def say(line: str) -> None:
        lines.append(line)
        stuck.complained.set()

    def read() -> None:
        assert (
            next(iter(DataLoader(stuck, num_workers=workers, multiprocessing_context=fork if workers else None))) == 0
        )

    with Quick(tmp_path, 0, 1, 0.5, say=say) as dog:
        dog.at(READING, 1)
        read()
    assert re.search(
        rf"rank 0 has been reading data for \d+ s \(step 1, at engine/test_watchdog\.py:\d+ .*{place}\)", lines[0]
    )
    assert len(re.findall(r"\d+ sleeping", lines[0])) == workers
    assert workers or "it has no worker processes" in lines[0]


# ------------------------------------------------------------------------------- real processes


def rank_process(folder: Path, rank: int, barrier: object, reads_for_ever: bool) -> None:
    """A training whose collective is a barrier; rank `rank` of two."""

    def say(line: str) -> None:
        with (folder / "said").open("a") as file:
            file.write(line + "\n")

    with Quick(folder, rank, 2, 1.2, say=say) as dog:
        for step in range(10**9):
            dog.at(READING, step)
            while reads_for_ever and step == 5:
                time.sleep(0.1)
            dog.at("learning", step)
            barrier.wait()  # type: ignore[attr-defined]
            (folder / f"reached-{rank}").write_text(str(step))
            time.sleep(0.01)


HANGS = [(1, "reads"), (0, "reads"), (1, "SIGSTOP"), (0, "SIGSTOP"), (1, "SIGKILL")]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], Callable[[], list[str]]]]:
    """What two real ranks say in each of the ways to hang; all pairs run at once, as they mostly sleep."""
    folders = {hang: tmp_path_factory.mktemp("run") for hang in HANGS}
    barriers = {hang: fork.Barrier(2) for hang in HANGS}  # kept: memory of one that is freed goes to the next
    pairs = {
        (rank, how): [
            fork.Process(target=rank_process, args=(folder, r, barriers[rank, how], how == "reads" and r == rank))
            for r in (0, 1)
        ]
        for (rank, how), folder in folders.items()
    }
    processes = [process for pair in pairs.values() for process in pair]
    try:
        for process in processes:
            process.start()
        time.sleep(0.6)  # heartbeats are heard
        for (rank, how), folder in folders.items():
            wait_until(lambda folder=folder: all((folder / f"reached-{r}").exists() for r in (0, 1)))
            if how != "reads":
                pid = pairs[rank, how][rank].pid
                assert pid
                os.kill(pid, signal.Signals[how])
        yield {hang: partial(lines_of, folder / "said") for hang, folder in folders.items()}
    finally:
        for process in processes:
            process.kill()
            process.join()


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(("rank", "how"), HANGS)
def test_of_two_real_ranks_the_right_one_is_named(
    said: dict[tuple[int, str], Callable[[], list[str]]], rank: int, how: str
) -> None:
    lines = said[rank, how]
    wait_until(lambda: rank in blamed(lines()))
    assert blamed(lines()) == {rank}
    other = next(line for line in by(1 - rank, lines()) if blamed([line]))
    assert "has been learning for" in other
    assert "rank_process" in other
    if how == "reads":
        assert f"rank {rank}, which has been reading data for" in other
        wait_until(lambda: any("has been reading data for" in line for line in by(rank, lines())))
    else:
        assert f"rank {rank}, which has not been heard of for" in other
        assert not by(rank, lines())
