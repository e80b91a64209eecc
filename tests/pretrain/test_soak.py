"""Fifty SIGKILLs at random moments, saves included: every start goes on, and the end is that of a run left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from forked import assert_same_end

from miram.engine import checkpoint as checkpoints
from miram.engine.errors import exit_code
from miram.pretrain.stage import pretrain

pytestmark = pytest.mark.slow
fork = multiprocessing.get_context("fork")


def command(folder: Path, arguments: list[str], said: Path) -> None:
    """`miram pretrain` as a process of its own, what it says into a file."""
    os.chdir(folder)
    with said.open("w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        AcceleratorState._reset_state(True)
        code = exit_code(lambda: pretrain("pretrain/demo", [*arguments, "--out=run"]))
    os._exit(code)


def begin(folder: Path, arguments: list[str], said: Path) -> multiprocessing.process.BaseProcess:
    folder.mkdir(exist_ok=True)
    said.write_text("")
    process = fork.Process(target=command, args=(folder, arguments, said))
    process.start()
    return process


def finish(folder: Path, arguments: list[str], said: Path) -> None:
    process = begin(folder, arguments, said)
    process.join()
    assert process.exitcode == 0, said.read_text()


def newest(folder: Path) -> int:
    """Step of the newest sound checkpoint; 0 without one."""
    path, _ = checkpoints.newest(folder / "run/checkpoints")
    return checkpoints.step_of(path) if path else 0


def unfinished(folder: Path) -> bool:
    """Whether a save was cut off: a folder that has not got its name yet, or no manifest."""
    saves = list((folder / "run/checkpoints").glob("*step-*"))
    return any(path.name.startswith(".") or not (path / "manifest.json").exists() for path in saves)


def strike(folder: Path, arguments: list[str], said: Path, moment: random.Random) -> bool:
    """Start, and kill once it trains, some steps on and then at any moment; whether that was during a save."""
    before, process = newest(folder), begin(folder, arguments, said)
    steps, begun = moment.randint(0, 6), f"going on from step {before} of" if before else "step 1/"
    while begun not in said.read_text() or said.read_text().count("\nstep ") < steps:
        assert process.is_alive(), f"it ended before it could be struck: {said.read_text()}"
        time.sleep(0.002)
    time.sleep(moment.random() * 0.1)
    assert process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((folder / "run/state.json").read_text())["status"] == "running"
    assert not (folder / "run/encoder.safetensors").exists()
    assert newest(folder) >= before
    return unfinished(folder)


def soak(folder: Path, arguments: list[str], kills: int) -> int:
    """Run undisturbed, and run struck so many times; how many kills cut off a save."""
    finish(folder / "calm", arguments, folder / "calm.txt")
    struck, moment = folder / "struck", random.Random(kills)
    saves = [strike(struck, arguments, folder / f"said-{i}.txt", moment) for i in range(kills)]
    finish(struck, arguments, folder / "last.txt")
    assert_same_end(struck, folder / "calm")
    return sum(saves)


QUICK = ["--train.ema=0.9", "--monitor.images=8", "--monitor.pictures=1", "--train.log_every=1"]
NOISY = "--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3, proj_drop_rate: 0.2}"


def test_fifty_kills_of_fifty_are_survived(tiny: list[str], tmp_path: Path) -> None:
    saves = soak(tmp_path, [*tiny, *QUICK, NOISY, "--train.checkpoint_every=2", "--train.steps=300"], 50)
    assert saves >= 3
    print("SAVES", saves)


def test_kills_while_a_thread_writes_are_survived(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, *QUICK, NOISY, "--train.checkpoint_every=2", "--train.steps=100"]
    soak(tmp_path, [*arguments, "--train.checkpoint_async=true", "--data.workers=2"], 10)
