"""What goes wrong in a pretraining ends it clearly and loses nothing: the same command goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import (
    FREELY,
    Ended,
    assert_same_end,
    files,
    finish,
    killed_at,
    last_checkpoint,
    metrics,
    order,
    start,
    writing,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from miram.data.shards import Sample
from miram.data.views import MultiScaleViews
from miram.engine.checkpoint import verify
from miram.engine.loop import Trainer
from miram.engine.objective import Batch
from miram.engine.run import MetricsFile
from miram.pretrain import stage
from miram.pretrain.miram import Miram

slow = pytest.mark.slow
Command = Callable[..., "subprocess.CompletedProcess[str]"]
ASYNC = ["--train.checkpoint_async=true"]
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SETTINGS = [
    "--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3}",
    "--train.steps=8",
    "--train.checkpoint_every=2",
    "--train.keep_every=2",
    "--train.log_every=3",
    "--train.micro_batch=2",
    "--monitor.images=8",
    "--monitor.pictures=1",
]


@pytest.fixture(scope="module")
def settings(tiny: list[str]) -> list[str]:
    return [*tiny, *SETTINGS]


@pytest.fixture(scope="module")
def calm(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Undisturbed runs by number of ranks, with all their checkpoints."""
    folder = tmp_path_factory.mktemp("calm")
    for world in (1, 2):
        finish(folder / str(world), settings, world=world)
    return {world: folder / str(world) for world in (1, 2)}


def state(folder: Path) -> dict[str, str]:
    return json.loads((folder / "run/state.json").read_text())


def lines(said: str) -> list[str]:
    """What was said on stderr, without progress."""
    return [line for line in said.splitlines() if not line.startswith("step ")]


# ---------------------------------------------------------------------------------------------- losses


def poisoning(key: str, epoch: int) -> Callable[[int], None]:
    """One sample becomes NaN in one epoch, and each rank leaves the weights it ends with."""

    def spoil(rank: int) -> None:
        view, fit = MultiScaleViews.__call__, Trainer.fit

        def poisoned(self: MultiScaleViews, sample: Sample, now: int) -> dict[str, Tensor | str]:
            drawn = view(self, sample, now)
            if (sample.key, now) == (key, epoch):
                drawn |= {name: value * torch.nan for name, value in drawn.items() if name.startswith("view/")}  # type: ignore[operator]
            return drawn

        def fitted(self: Trainer) -> None:
            try:
                fit(self)
            finally:
                save_file({k: p.detach().clone() for k, p in self.objective.named_parameters()}, f"weights-{rank}")

        MultiScaleViews.__call__ = poisoned  # type: ignore[method-assign]
        Trainer.fit = fitted  # type: ignore[method-assign]

    return spoil


@pytest.mark.parametrize(("place", "step", "workers"), [(7, 4, 2), pytest.param(0, 5, 0, marks=slow)])
def test_a_poisoned_sample_stops_both_ranks_with_one_sentence_and_can_be_mended(
    place: int, step: int, workers: int, settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    """Sample number `place` of the global batch of `step`, counted from 0."""
    batch, rank = order(calm[2])[step], place // 4
    together = batch[place // 2 * 2 : place // 2 * 2 + 2]  # micro-batches of two
    arguments = [*settings, f"--data.workers={workers}"]
    ended = start(tmp_path, arguments, world=2, spoil=poisoning(batch[place], step // 3))
    said = [lines(end.err)[-1] for end in ended]
    assert [end.code for end in ended] == [1, 1]
    assert said[0] == said[1]
    assert f"on rank {rank} the loss of step {step + 1} of samples {', '.join(together)} is infinite" in said[0]
    assert "the checkpoint of step 4 is sound" in said[0]
    assert state(tmp_path)["status"] == "failed"
    assert together[0] in state(tmp_path)["reason"]
    assert last_checkpoint(tmp_path).name == "step-00000004"
    if step == 4:  # its weights at the end are those of its checkpoint
        expected = load_file(last_checkpoint(calm[2]).with_name("step-00000004") / "model.safetensors")
        for left in (load_file(tmp_path / f"weights-{rank}") for rank in (0, 1)):
            assert all(torch.equal(value, expected[name]) for name, value in left.items())
    finish(tmp_path, settings, world=2)
    assert_same_end(tmp_path, calm[2], but=FREELY)


# ---------------------------------------------------------------------------------------------- memory


def without_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")


def too_large() -> None:
    torch.empty(2**50)


def acting(act: Callable[[], Any], call: int, rank: int = 0) -> Callable[[int], None]:
    """Act in forward number `call`, counted from 0, of one rank."""

    def spoil(me: int) -> None:
        forward, calls = Miram.forward, iter(range(10**6))

        def spoilt(self: Miram, batch: Batch) -> Tensor:
            if next(calls) == call and me == rank:
                act()
            return forward(self, batch)

        Miram.forward = spoilt  # type: ignore[method-assign]

    return spoil


@pytest.mark.parametrize("act", [pytest.param(without_memory, marks=slow), pytest.param(too_large, marks=slow)])
def test_where_memory_runs_out_the_plan_tells_what_would_fit(
    act: Callable[[], Any], settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    (ended,) = start(tmp_path, settings, spoil=acting(act, call=4 * 4 + 1))
    said = lines(ended.err)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert all(line.startswith("miram: out of memory: rank 0 in step 5, with 2 images at once; ") for line in said[-2:])
    assert said[-1].index("by the plan") < said[-1].index("train.micro_batch=1") < said[-1].index("checkpointing=true")
    assert "decode_fraction" in said[-1]
    assert state(tmp_path)["status"] == "failed"
    assert "out of memory" in state(tmp_path)["reason"]
    finish(tmp_path, [*settings, "--model.checkpointing=true", "--model.scales.1.checkpointing=true"])
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == (calm[1] / "run/encoder.safetensors").read_bytes()


@slow
def test_memory_that_runs_out_on_one_rank_ends_both(settings: list[str], tmp_path: Path) -> None:
    one, other = start(tmp_path, settings, world=2, spoil=acting(without_memory, call=9, rank=1))
    assert other.code == 1
    assert "out of memory: rank 1 in step 5" in lines(other.err)[-1]
    assert "by the plan" in lines(other.err)[-1]
    assert getattr(one, "code", 1) == 1
    assert state(tmp_path)["status"] == "failed"


# ---------------------------------------------------------------------------------------------- disks


def fail() -> None:
    raise NO_SPACE


@pytest.mark.parametrize(("world", "more"), [pytest.param(1, [], marks=slow), (2, []), (1, ASYNC)])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    world: int, more: list[str], settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    ended = start(tmp_path, [*settings, *more], world=world, spoil=writing("optimizer", 4, fail))
    assert [end.code for end in ended] == [1] * world
    said = lines(ended[0].err)[-1]
    assert "the checkpoint of step 4 could not be written" in said
    assert "(No space left on device); checkpoint step-00000002 is whole; free space" in said
    if world == 2:
        assert lines(ended[1].err)[-1] == "miram: another rank cannot go on, and says why"
    assert "Traceback" not in "".join(end.err for end in ended)
    assert state(tmp_path)["status"] == "failed"
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-00000002"}
    assert "going on from step 2" in finish(tmp_path, settings, world=world).out
    assert_same_end(tmp_path, calm[world], but=FREELY)


def test_a_file_that_may_not_grow_is_a_full_disk(settings: list[str], calm: dict[int, Path], tmp_path: Path) -> None:
    """Refused by the system itself, at any write of more than 20 kB."""

    def limit(step: int, *_: Any) -> None:
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    (ended,) = start(tmp_path, settings, taking=limit)
    assert ended.code == 1
    assert "the checkpoint of step 6 could not be written" in lines(ended.err)[-1]
    assert "checkpoint step-00000004 is whole" in lines(ended.err)[-1]
    finish(tmp_path, settings)
    assert_same_end(tmp_path, calm[1])


@pytest.mark.parametrize("what", [pytest.param("line", marks=slow), "encoder"])
def test_a_line_or_an_encoder_that_finds_no_room_is_one_sentence(
    what: str, settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    def spoil(rank: int) -> None:
        append = MetricsFile.append

        def full(self: MetricsFile, line: dict[str, float]) -> None:
            if line["step"] == 6:
                fail()
            append(self, line)

        if what == "line":
            MetricsFile.append = full  # type: ignore[method-assign,assignment]
        else:
            stage.save_encoder = lambda *_: fail()

    (ended,) = start(tmp_path, settings, spoil=spoil)
    assert ended.code == 1
    assert "No space left on device" in lines(ended.err)[-1]
    assert "Traceback" not in ended.err
    assert state(tmp_path)["status"] == "failed"
    finish(tmp_path, settings)
    assert_same_end(tmp_path, calm[1])


# ---------------------------------------------------------------------------------------------- stalls


@pytest.mark.parametrize("workers", [pytest.param(0, marks=slow), 2])
def test_a_loader_that_stalls_is_named_and_the_run_goes_on(
    workers: int, settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    key = order(calm[1])[4][3]

    def spoil(rank: int) -> None:
        view = MultiScaleViews.__call__

        def slow(self: MultiScaleViews, sample: Sample, epoch: int) -> dict[str, Tensor | str]:
            if (sample.key, epoch) == (key, 1):
                time.sleep(2.5)
            return view(self, sample, epoch)

        MultiScaleViews.__call__ = slow  # type: ignore[method-assign]

    said = finish(tmp_path, [*settings, "--train.stall_seconds=1", f"--data.workers={workers}"], spoil=spoil).err
    assert "miram: rank 0 has been reading data for 1 s (step 5" in said
    assert ("worker processes: " if workers else "it has no worker processes") in said
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == (calm[1] / "run/encoder.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------- rehearsals


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file and folder: when it changed, and what it holds."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


@slow
def test_a_dry_run_prints_the_plan_and_leaves_nothing(miram: Command, settings: list[str], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = miram("pretrain", "pretrain/demo", *settings, "--dry-run", "--out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "miram: rehearsed step 1 of 8: loss " in done.stdout
    assert "GFLOP" in done.stdout
    assert "memory, micro-batch 2 of a batch of 8" in done.stdout
    assert "nothing was written to run" in done.stdout
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=slow)])
def test_a_dry_run_of_an_unfinished_run_takes_its_next_step_and_touches_nothing(
    world: int, settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    start(tmp_path, [*settings, "--train.log_every=1"], world=world, taking=killed_at(5, 0, world - 1))
    before = snapshot(tmp_path / "run")
    ended = start(tmp_path, [*settings, "--train.log_every=1"], world=world, dry_run=True)
    assert [end.code for end in ended] == [0] * world, ended
    assert "going on from step 4 of 8" in ended[0].out
    assert "rehearsed step 5 of 8: loss " in ended[0].out
    assert snapshot(tmp_path / "run") == before
    finish(tmp_path, [*settings, "--train.log_every=1"], world=world)
    loss = next(line["loss"] for line in metrics(tmp_path) if line["step"] == 5)
    assert f"rehearsed step 5 of 8: loss {loss:.4f}, " in ended[0].out
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == (calm[world] / "run/encoder.safetensors").read_bytes()


@slow
def test_what_ends_a_run_ends_a_dry_run_and_leaves_nothing(settings: list[str], tmp_path: Path) -> None:
    def ended(*more: str, **how: Any) -> Ended:
        (end,) = start(tmp_path, [*settings, *more], dry_run=True, **how)
        assert not (tmp_path / "run").exists()
        assert "Traceback" not in end.err
        return end

    broken = ended(taking=lambda step, micro, rank, batch: batch["view/1"].fill_(torch.nan))
    assert broken.code == 1
    assert "the loss of step 1 of samples" in broken.err
    memory = ended(spoil=acting(without_memory, call=1))
    assert memory.code == 1
    assert "by the plan" in memory.err
    assert ended("--train.batch_siez=3").code == 2
    assert ended("--train.micro_batch=3").code == 2
    assert ended("--data.shards=nosuch").code == 2


def test_a_dry_run_of_another_configuration_is_refused(
    settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    shutil.copytree(calm[1] / "run", tmp_path / "run")
    before = snapshot(tmp_path / "run")
    (ended,) = start(tmp_path, [*settings, "--train.blr=0.5"], dry_run=True)
    assert ended.code == 2
    assert "train.blr was" in ended.err
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=slow)])
def test_a_dry_run_of_a_finished_run_says_that_it_is_finished(
    world: int, settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    shutil.copytree(calm[world] / "run", tmp_path / "run")
    before = snapshot(tmp_path / "run")
    ended = start(tmp_path, settings, world=world, dry_run=True)
    assert [end.code for end in ended] == [0] * world, ended
    assert "finished" in ended[0].out
    assert "step 9" not in ended[0].out
    assert snapshot(tmp_path / "run") == before


# ---------------------------------------------------------------------------------------------- refusals on many ranks


def test_a_configuration_refused_by_the_main_rank_ends_the_others(settings: list[str], calm: dict[int, Path]) -> None:
    before = files(calm[2])
    one, other = start(calm[2], [*settings, "--train.blr=0.5"], world=2)
    assert one.code == 2
    assert getattr(other, "code", 1) != 0
    assert files(calm[2]) == before


# ---------------------------------------------------------------------------------------------- signals


def signalling(*places: tuple[int, int]) -> Callable[..., None]:
    """Ctrl-C whenever one of these (step, micro-batch) is taken."""

    def taking(step: int, micro: int, rank: int, batch: Batch) -> None:
        if (step, micro) in places:
            os.kill(os.getpid(), signal.SIGINT)

    return taking


def test_one_ctrl_c_saves(settings: list[str], calm: dict[int, Path], tmp_path: Path) -> None:
    (ended,) = start(tmp_path, settings, taking=signalling((4, 1)))
    assert ended.code == 75
    assert "stopped on a signal after step 5 of 8; run the same command to go on" in lines(ended.err)[-1]
    assert state(tmp_path)["status"] == "preempted"
    assert last_checkpoint(tmp_path).name == "step-00000005"
    finish(tmp_path, settings)
    assert metrics(tmp_path) == metrics(calm[1])
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == (calm[1] / "run/encoder.safetensors").read_bytes()


def test_two_leave_at_once(settings: list[str], calm: dict[int, Path], tmp_path: Path) -> None:
    (ended,) = start(tmp_path, settings, taking=signalling((4, 1), (4, 2)))
    assert ended.code == 1
    assert lines(ended.err)[-1] == "miram: interrupted; what was saved before is kept"
    assert state(tmp_path)["status"] == "failed"
    assert last_checkpoint(tmp_path).name == "step-00000004"
    finish(tmp_path, settings)
    assert_same_end(tmp_path, calm[1])


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_both_ranks_and_is_a_checkpoint(
    settings: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    """As the README has it; the agent's own exit code says nothing, state.json does."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*agent, "--signals-to-handle=SIGTERM,SIGUSR1,SIGINT", "-m", "miram.pretrain", "pretrain/demo"]
    more = ["--train.steps=8", "--train.log_every=1", "--train.stall_seconds=30", "--out=run"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*command, *settings, *more], cwd=tmp_path, stdout=said, stderr=said)
    log = tmp_path / "run/metrics.jsonl"
    while not log.exists() or not log.read_bytes():
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert state(tmp_path)["status"] == "preempted", (tmp_path / "said").read_text()
    newest = last_checkpoint(tmp_path)
    assert verify(newest) is None
    assert len(metrics(tmp_path)) == int(newest.name.removeprefix("step-"))
    finish(tmp_path, settings, world=2)
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == (calm[2] / "run/encoder.safetensors").read_bytes()
