"""The trace is read back as JSON: which steps, and how many operations of known number, are in it."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import profiler

from miram.engine.profile import Profile, parse_window


def train(profile: Profile, first: int, last: int) -> None:
    """Step n multiplies n times."""
    x = torch.eye(8)
    for step in range(first, last + 1):
        profile.at(step)
        for _ in range(step):
            torch.mm(x, x)


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps(path: Path) -> list[int]:
    """Those with a span in the trace."""
    marked = [e for e in events(path) if e.get("ph") == "X" and e["name"].startswith("miram step ")]
    return [int(e["name"].split()[-1]) for e in sorted(marked, key=lambda e: e["ts"])]


def products(path: Path) -> int:
    return sum(e.get("ph") == "X" and e["name"] == "aten::mm" for e in events(path))


def test_the_trace_holds_exactly_the_steps_of_the_window(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profile = Profile("3:6", tmp_path, rank=0)
    train(profile, 1, 8)
    profile.close()
    trace = tmp_path / "profile" / "steps-3-6.rank0.json.gz"
    assert sorted(p.name for p in trace.parent.iterdir()) == [trace.name, "steps-3-6.rank0.txt"]
    assert steps(trace) == [3, 4, 5]
    assert products(trace) == 3 + 4 + 5
    said = f"miram: profile of steps 3 to 5 in {trace} (open in ui.perfetto.dev)\n"
    assert said in capfd.readouterr().err


def test_each_operation_lies_in_the_span_of_its_step(tmp_path: Path) -> None:
    profile = Profile("1:4", tmp_path, rank=0)
    train(profile, 1, 5)
    found = events(tmp_path / "profile" / "steps-1-4.rank0.json.gz")
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in found if e.get("ph") == "X" and "miram" in e["name"]}
    starts = [e["ts"] for e in found if e.get("ph") == "X" and e["name"] == "aten::mm"]
    inside = {name: sum(a <= start <= b for start in starts) for name, (a, b) in spans.items()}
    assert inside == {"miram step 1": 1, "miram step 2": 2, "miram step 3": 3}


def test_the_table_lists_at_most_ten_operations_and_no_steps(tmp_path: Path) -> None:
    profile = Profile("1:2", tmp_path, rank=0)
    profile.at(1)
    x = torch.ones(64, 64, requires_grad=True)
    (torch.mm(x, x).exp().sin().cos().relu().tanh().sigmoid().abs().sqrt().log().neg().sum()).backward()
    profile.close()
    rows = (tmp_path / "profile" / "steps-1-2.rank0.txt").read_text().split("-  \n")[2].splitlines()
    names = [row.split()[0] for row in rows if not row.startswith("---")]
    assert len(names) == 10
    assert not any("miram" in name for name in names)
    assert any(name.startswith("aten::") for name in names)


def test_without_a_window_nothing_is_written(tmp_path: Path) -> None:
    profile = Profile(None, tmp_path, rank=0)
    train(profile, 1, 5)
    profile.close()
    assert not list(tmp_path.iterdir())


def test_closing_early_writes_what_there_is_once(tmp_path: Path) -> None:
    profile = Profile("3:100", tmp_path, rank=0)
    train(profile, 1, 4)
    profile.close()
    profile.close()
    (trace,) = (tmp_path / "profile").glob("*.gz")
    assert trace.name == "steps-3-5.rank0.json.gz"
    assert steps(trace) == [3, 4]


def test_a_start_inside_the_window_takes_up_the_rest_beside_what_is_there(tmp_path: Path) -> None:
    for first, last in ((1, 4), (5, 9), (10, 11)):
        profile = Profile("3:7", tmp_path, rank=0)
        train(profile, first, last)
        profile.close()
    found = {p.name: steps(p) for p in (tmp_path / "profile").glob("*.gz")}
    assert found == {"steps-3-5.rank0.json.gz": [3, 4], "steps-5-7.rank0.json.gz": [5, 6]}


def test_each_rank_writes_its_own_files_and_one_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profile = Profile("1:2", tmp_path, rank=1)
    train(profile, 1, 2)
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "steps-1-2.rank1.json.gz",
        "steps-1-2.rank1.txt",
    ]
    assert capfd.readouterr().err == ""


def test_a_full_disk_costs_the_profile_and_not_the_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(profiler.profile, "export_chrome_trace", full)
    profile = Profile("1:2", tmp_path, rank=0)
    train(profile, 1, 3)
    profile.close()
    (said,) = capfd.readouterr().err.splitlines()
    assert "no profile" in said
    assert "No space left on device" in said


def test_a_window_is_half_open_and_counts_from_one() -> None:
    assert parse_window("10:20") == (10, 20)
    assert parse_window("1:2") == (1, 2)


@pytest.mark.parametrize(
    "text", ["20:10", "5:5", "a:b", "5", "-3:5", "3:-5", "0:4", "", ":", "1:", "1:2:3", " 1:2", "1.5:2"]
)
def test_any_other_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no window of steps; write 10:20 for steps 10 to 19") as refused:
        parse_window(text)
    assert repr(text) in str(refused.value)
