"""Pretraining as a user runs it: repeated, killed, told to stop, on two ranks, and fed nonsense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from miram.engine.checkpoint import verify
from miram.engine.config import keys
from miram.engine.errors import UserError, exit_code
from miram.engine.run import FREE, read_metrics
from miram.pretrain.config import PretrainConfig
from miram.pretrain.stage import pretrain

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps the first run's precision for the whole process; a run of a user's is a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


SINGLE = os.environ | {"OMP_NUM_THREADS": "1"}
TIMES = ("images_per_s", "data_wait", "peak_memory_bytes")


def losses(run: Path) -> list[dict[str, float]]:
    """Metrics without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run / "metrics.jsonl")]


def start(arguments: list[object]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "miram.pretrain", "pretrain/demo", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=SINGLE)


def wait_for_lines(run: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, "the run ended before it could be struck"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def calm(miram: Command, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 12 steps."""
    out = tmp_path_factory.mktemp("runs") / "calm"
    done = miram("pretrain", "pretrain/demo", *tiny, "--train.steps=12", "--train.checkpoint_every=4", f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_what_the_contract_names(calm: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "encoder.json", "encoder.safetensors", "figures/reconstructions.png"):
        assert (calm / name).is_file(), name
    assert json.loads((calm / "state.json").read_text())["status"] == "finished"
    assert [p.name for p in sorted((calm / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]
    assert verify(calm / "checkpoints" / "step-00000012") is None
    lines = read_metrics(calm / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    keys = "step epoch samples loss loss/1 loss/2 grad_norm lr images_per_s data_wait peak_memory_bytes"
    assert list(lines[0]) == keys.split()
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["loss/1"] + lines[-1]["loss/2"])
    assert lines[-1]["samples"] == 96
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_same_command_twice_gives_the_same_bytes(
    calm: Path, miram: Command, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "again"
    miram("pretrain", "pretrain/demo", *tiny, "--train.steps=12", "--train.checkpoint_every=4", f"--out={out}")
    assert losses(out) == losses(calm)
    assert (out / "encoder.safetensors").read_bytes() == (calm / "encoder.safetensors").read_bytes()


def test_another_seed_gives_another_encoder(calm: Path, tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "other"
    pretrain("pretrain/demo", [*tiny, "--train.steps=1", "--seed=1", f"--out={out}"])
    assert (out / "encoder.safetensors").read_bytes() != (calm / "encoder.safetensors").read_bytes()


def test_data_workers_change_nothing(calm: Path, tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "workers"
    rest = [*tiny, "--data.workers=2", "--train.steps=12", "--train.checkpoint_every=4"]
    pretrain("pretrain/demo", [*rest, f"--out={out}"])
    assert losses(out) == losses(calm)


def test_a_finished_run_is_left_alone(calm: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = (calm / "encoder.safetensors").stat().st_mtime_ns
    rest = [*tiny, "--train.steps=12", "--train.checkpoint_every=4", f"--out={calm}"]
    pretrain("pretrain/demo", rest)
    assert "finished" in capsys.readouterr().out
    assert (calm / "encoder.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow  # test_exact.py does the same in forked processes
def test_a_killed_run_ends_like_an_undisturbed_one(calm: Path, tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = [*tiny, "--train.steps=12", "--train.checkpoint_every=4", f"--out={out}"]
    for struck_after in (2, 7):
        process = start(arguments)
        wait_for_lines(out, struck_after, process)
        process.kill()
        process.wait()
    assert start(arguments).wait() == 0
    assert losses(out) == losses(calm)
    assert (out / "encoder.safetensors").read_bytes() == (calm / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("number", "workers"), [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow), (signal.SIGUSR1, 2)]
)
def test_a_signal_leaves_a_checkpoint_and_exit_code_75(
    number: signal.Signals, workers: int, calm: Path, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    arguments = [*tiny, f"--data.workers={workers}", "--train.steps=12", "--train.checkpoint_every=4", f"--out={out}"]
    process = start(arguments)
    wait_for_lines(out, 1, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert json.loads((out / "state.json").read_text())["status"] == "preempted"
    newest = max((out / "checkpoints").iterdir())
    assert verify(newest) is None
    assert int(newest.name.removeprefix("step-")) == len(losses(out))
    assert start(arguments).wait() == 0
    assert (out / "encoder.safetensors").read_bytes() == (calm / "encoder.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="sees in Linux's /proc when signals are caught")
def test_a_signal_to_a_run_that_is_still_starting_is_obeyed_after_a_step(tiny: list[str], tmp_path: Path) -> None:
    """Long before torch is imported."""
    out = tmp_path / "told"
    command = [sys.executable, "-m", "miram.pretrain", "pretrain/demo", *tiny, "--train.steps=100000", f"--out={out}"]
    process = subprocess.Popen(command, env=SINGLE, stderr=subprocess.PIPE, text=True)
    while not catches(process.pid, signal.SIGTERM):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert json.loads((out / "state.json").read_text())["status"] == "preempted"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_accumulation_changes_rounding_only(calm: Path, tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "accumulated"
    rest = [*tiny, "--train.micro_batch=2", "--train.steps=12", "--train.checkpoint_every=4", f"--out={out}"]
    pretrain("pretrain/demo", rest)
    for a, b in zip(losses(out), losses(calm), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_two_ranks_learn_what_one_does(calm: Path, tiny: list[str], tmp_path: Path) -> None:
    """Same global batch, gloo: losses to 1e-5; matrices to 1e-4 of their size after 12 steps.

    Vectors are not compared: the keys' bias has no gradient but rounding, which Adam blows up to full steps.
    """
    out = tmp_path / "ranks"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "miram.pretrain",
    ]
    rest = [*tiny, "--train.steps=12", "--train.checkpoint_every=4", f"--out={out}"]
    done = subprocess.run([*launch, "pretrain/demo", *rest], capture_output=True, text=True, env=SINGLE, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(losses(out), losses(calm), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, two = (load_file(run / "encoder.safetensors") for run in (calm, out))
    assert max(((one[k] - two[k]).norm() / (one[k].norm() + 1e-6)).item() for k in one if one[k].ndim > 1) < 1e-4


def test_bf16_runs_and_learns(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "bf16"
    pretrain("pretrain/demo", [*tiny, "--train.precision=bf16", "--train.steps=12", f"--out={out}"])
    assert losses(out)[-1]["loss"] < losses(out)[0]["loss"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--train.batch_siez=3"], "train.batch_size"),
        (["--model.scales.1.dept=3"], "model.scales.1.dept"),
        (["--train.batch_size=many"], "train.batch_size"),
        (["--model.scales.0.attention=sofmax"], "softmax"),
        (["--model.scales.1.options={num_landmark: 3}"], "num_landmarks"),
        (["--data.shards=nosuch"], "nosuch"),
        (["--train.batch_size=1000"], "train.batch_size"),
        (["--train.micro_batch=3"], "train.micro_batch"),
        (["--model.image_size=40"], "model.image_size"),
        (["--model.encoder=vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        (["--data.split=val"], "val"),
        (["stray"], "stray"),
        (["--train.steps"], "train.steps"),
    ],
)
def test_nonsense_gets_one_line_and_exit_2_and_leaves_nothing(
    overrides: list[str], named: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never"
    arguments = [*tiny, "--train.steps=2", f"--out={out}", *overrides]
    assert exit_code(lambda: pretrain("pretrain/demo", arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert named in said[0]
    assert not out.exists()


def test_the_command_itself_refuses_without_a_traceback(miram: Command, tmp_path: Path) -> None:
    done = miram("pretrain", "pretrain/demo", "--train.batch_siez=3", f"--out={tmp_path / 'never'}")
    assert done.returncode == 2
    assert done.stderr.startswith("miram: --train.batch_siez")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_folder_of_another_configuration_is_refused_and_kept(calm: Path, tiny: list[str]) -> None:
    before = (calm / "config.yaml").read_bytes()
    arguments = [*tiny, "--train.steps=13", "--train.checkpoint_every=4", f"--out={calm}"]
    with pytest.raises(UserError, match=r"train\.steps was 12, now 13"):
        pretrain("pretrain/demo", arguments)
    assert (calm / "config.yaml").read_bytes() == before


def test_started_by_file_name_it_says_how_to_start(tmp_path: Path) -> None:
    import miram

    root = Path(miram.__file__).parent
    for name in ("pretrain/__main__.py", "data/__main__.py", "__main__.py"):
        done = subprocess.run([sys.executable, root / name], capture_output=True, text=True, cwd=tmp_path)
        assert "python -m miram" in done.stderr
        assert "Traceback" not in done.stderr


def test_every_key_that_may_change_exists() -> None:
    known = [key.replace(".0.", ".1.") for key, *_ in keys(PretrainConfig)]
    assert [free for free in FREE if not any(fnmatchcase(key, free) for key in known)] == []
