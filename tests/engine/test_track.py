"""Figures against a clock that the test turns by hand, and what a person gets to read."""

from __future__ import annotations

import io
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from miram.engine import track
from miram.engine.track import Meter, Tracker, duration, peak_memory_bytes, reset_peak_memory

LINE = {"step": 120.0, "loss": 0.61234, "lr": 1.2e-4, "images_per_s": 58.4, "data_wait": 0.031}
LINE["peak_memory_bytes"] = 1.94e9


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(track, "time", fake)
    return clock


def quiet(steps: int = 800, start: int = 0, batch_size: int = 8) -> Tracker:
    return Tracker("training", steps, start, batch_size, visible=False)


def train(tracker: Tracker, clock: Clock, steps: int, wait: float, work: float) -> None:
    for _ in range(steps):
        with tracker.waiting():
            clock.passes(wait)
        clock.passes(work)


def test_rate_and_wait_are_shares_of_the_time_that_was_training(clock: Clock) -> None:
    with quiet() as tracker:
        train(tracker, clock, 4, wait=1.0, work=3.0)
        with tracker.left_out():
            clock.passes(100.0)
        figures = tracker.figures(4)
    assert figures["images_per_s"] == pytest.approx(4 * 8 / 16)
    assert figures["data_wait"] == pytest.approx(1 / 4)
    assert figures["peak_memory_bytes"] > 2**20


def test_a_meter_foretells_nothing_before_the_first_item(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("films", 60) as meter:
        clock.passes(100)
        meter.reach(0)
        assert capsys.readouterr().err == ""
        clock.passes(20)
        meter.reach(20)
    assert capsys.readouterr().err == "films: 20/60, 0.2/s, 4 min left\n"


def test_figures_are_since_they_were_last_asked(clock: Clock) -> None:
    with quiet() as tracker:
        train(tracker, clock, 2, wait=5.0, work=5.0)
        with tracker.left_out():
            clock.passes(7.0)
        tracker.figures(2)
        train(tracker, clock, 5, wait=0.5, work=0.5)
        figures = tracker.figures(7)
    assert (figures["images_per_s"], figures["data_wait"]) == pytest.approx((8.0, 0.5))


def test_where_no_time_or_no_step_has_passed_the_figures_are_zero(clock: Clock) -> None:
    with quiet() as tracker:
        assert tracker.figures(0)["images_per_s"] == tracker.figures(0)["data_wait"] == 0
        with tracker.left_out():
            clock.passes(3.0)
        assert tracker.figures(0)["images_per_s"] == 0
        clock.passes(3.0)
        assert tracker.figures(0)["images_per_s"] == 0


def test_a_start_that_goes_on_counts_its_own_steps_only(clock: Clock) -> None:
    tracker = quiet(start=500)
    clock.passes(60.0)  # building the rest: no training either
    with tracker:
        train(tracker, clock, 10, wait=0.0, work=2.0)
        assert tracker.figures(510)["images_per_s"] == pytest.approx(4.0)


def test_time_counts_as_waited_where_the_draw_fails(clock: Clock) -> None:
    def draw() -> None:
        clock.passes(4.0)
        raise StopIteration

    with quiet() as tracker:
        with pytest.raises(StopIteration), tracker.waiting():
            draw()
        clock.passes(4.0)
        assert tracker.figures(1)["data_wait"] == pytest.approx(0.5)


def test_without_a_terminal_a_step_is_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker("training", 800, 0, 8, visible=True) as tracker:
        clock.passes(120 * 0.2)
        tracker.show(LINE)
    expected = "step 120/800  loss 0.6123  lr 1.20e-04  58 images/s  3% waiting  1.9 GB  2 min left\n"
    assert capsys.readouterr().err == expected


def test_time_left_is_at_the_pace_of_this_start(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker("training", 800, 110, 8, visible=True) as tracker:
        clock.passes(10 * 20.0)
        tracker.show(LINE)
        tracker.show({**LINE, "step": 110.0, "images_per_s": 0.53})
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("  3.8 h left")
    assert second.startswith("step 110/800")
    assert second.endswith("  0.5 images/s  3% waiting  1.9 GB")


def test_other_ranks_say_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with quiet() as tracker:
        tracker.advance(120)
        tracker.show(LINE)
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_on_a_terminal_the_figures_stand_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(track, "console", Console(file=screen, force_terminal=True, width=200))
    with Tracker("training", 800, 0, 8, visible=True) as tracker:
        tracker.advance(120)
        tracker.show(LINE)
    shown = screen.getvalue()
    assert "120/800" in shown
    assert "step 120/800" not in shown
    assert "loss 0.6123  lr 1.20e-04  58 images/s  3% waiting  1.9 GB" in shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5000, "83 min"), (5400, "1.5 h"), (360000, "100.0 h")],
)
def test_durations_read_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def hold(megabytes: int) -> None:
    """Touch so much memory and let go of it."""
    np.ones(megabytes * 2**20, dtype=np.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_a_peak_is_that_of_the_time_since_it_was_reset() -> None:
    hold(400)
    before = peak_memory_bytes()
    reset_peak_memory()
    idle = peak_memory_bytes()
    assert idle < before - 300 * 2**20
    hold(200)
    assert 150 * 2**20 < peak_memory_bytes() - idle < 250 * 2**20
    reset_peak_memory()
    assert peak_memory_bytes() - idle < 100 * 2**20


def test_where_the_system_keeps_no_such_file_the_peak_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status").write_text("Name: python\n\nVmRSS: 12 kB\n")
    monkeypatch.setattr(track, "FORGET", tmp_path / "absent" / "clear_refs")
    unit = 1 if sys.platform == "darwin" else 1024
    for name in ("absent", "status"):
        monkeypatch.setattr(track, "STATUS", tmp_path / name)
        reset_peak_memory()
        assert peak_memory_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
