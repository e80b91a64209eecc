"""Fifty SIGKILLs at random moments, saves included: every start goes on, and the end is that of a run left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from forked import assert_same_end, metrics

from miram.engine import checkpoint as checkpoints
from miram.engine.errors import exit_code
from miram.pretrain.stage import pretrain

pytestmark = pytest.mark.slow
fork = multiprocessing.get_context("fork")


def command(folder: Path, arguments: list[str]) -> None:
    """`miram pretrain` as a process of its own, what it says into a file."""
    os.chdir(folder)
    with Path("said.txt").open("a", buffering=1) as said:
        sys.stdout = sys.stderr = said
        AcceleratorState._reset_state(True)
        code = exit_code(lambda: pretrain("pretrain/demo", [*arguments, "--out=run"]))
    os._exit(code)


def begin(folder: Path, arguments: list[str]) -> multiprocessing.process.BaseProcess:
    folder.mkdir(exist_ok=True)
    process = fork.Process(target=command, args=(folder, arguments))
    process.start()
    return process


def logged(folder: Path) -> int:
    """Whole lines of metrics.jsonl."""
    path = folder / "run/metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest(folder: Path) -> int:
    """Step of the newest sound checkpoint; 0 without one."""
    path, _ = checkpoints.newest(folder / "run/checkpoints")
    return checkpoints.step_of(path) if path else 0


def unfinished(folder: Path) -> bool:
    """Whether a save was cut off: a folder that has not got its name yet, or no manifest."""
    saves = list((folder / "run/checkpoints").glob("*step-*"))
    return any(path.name.startswith(".") or not (path / "manifest.json").exists() for path in saves)


def strike(folder: Path, arguments: list[str], steps: int, moment: random.Random) -> bool:
    """Start, kill after a random number of steps and then at a random moment; whether that was during a save."""
    before, process = newest(folder), begin(folder, arguments)
    first = time.monotonic()
    while logged(folder) > before:  # the lines of steps that are not in the checkpoint, until this start cuts them off
        if process.exitcode is not None or time.monotonic() > first + 60:
            break
        time.sleep(0.002)
    goal = before + moment.randint(0, 6)
    while logged(folder) < goal:
        assert process.exitcode is None, f"the start from step {before} ended: {(folder / 'said.txt').read_text()}"
        time.sleep(0.002)
    time.sleep(moment.random() * 0.1)
    assert process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert '"running"' in (folder / "run/state.json").read_text()
    assert logged(folder) < steps
    assert newest(folder) >= before
    return unfinished(folder)


def soak(folder: Path, arguments: list[str], steps: int, kills: int) -> int:
    """Run undisturbed, and run struck so many times; how many kills cut off a save."""
    arguments = [*arguments, f"--train.steps={steps}"]
    calm = begin(folder / "calm", arguments)
    calm.join()
    assert calm.exitcode == 0
    moment, saves, starts = random.Random(kills), 0, []
    for _ in range(kills):
        saves += strike(folder / "struck", arguments, steps, moment)
        starts.append(newest(folder / "struck"))
    last = begin(folder / "struck", arguments)
    last.join()
    assert last.exitcode == 0
    said = (folder / "struck/said.txt").read_text()
    resumed = [int(line.split()[5]) for line in said.splitlines() if line.startswith("miram: going on from step")]
    assert resumed == [step for step in starts if step]
    assert_same_end(folder / "struck", folder / "calm")
    assert [line["step"] for line in metrics(folder / "struck")] == list(range(1, steps + 1))
    return saves


QUICK = ["--train.ema=0.9", "--monitor.images=8", "--monitor.pictures=1", "--train.log_every=1"]
NOISY = "--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3, proj_drop_rate: 0.2}"


def test_fifty_kills_of_fifty_are_survived(tiny: list[str], tmp_path: Path) -> None:
    saves = soak(tmp_path, [*tiny, *QUICK, NOISY, "--train.checkpoint_every=2"], steps=300, kills=50)
    assert saves >= 3


def test_kills_while_a_thread_writes_are_survived(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, *QUICK, NOISY, "--train.checkpoint_every=2", "--train.checkpoint_async=true", "--data.workers=2"]
    soak(tmp_path, arguments, steps=80, kills=10)
