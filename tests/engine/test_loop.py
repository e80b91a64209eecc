"""The loop against plain torch, and against itself interrupted, at every way of cutting a batch."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partialmethod
from itertools import count, pairwise
from math import cos, pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from miram.engine import checkpoint as checkpoints
from miram.engine import restore
from miram.engine.errors import Preempted, RunFailed, UserError
from miram.engine.launch import make_accelerator
from miram.engine.loop import Trainer
from miram.engine.objective import Batch, Objective, Stream
from miram.engine.recipe import TrainSection, split_batch
from miram.engine.run import Run, read_metrics

BATCH = 8
STEPS = 10
fork = multiprocessing.get_context("fork")


class Line(Objective):
    """Two regressions of one layer; the first loss counts only some of the rows, and never the same number.

    `edge` is zero, and so is its gradient, but for a row without room: there the gradient is no number.
    """

    loss_names = ("some", "all")
    loss_weights = (1.0, 0.5)

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = nn.Linear(3, 2), nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        error = (self.layer(self.dropout(batch["x"])) - batch["y"]).square().sum(1)
        edge = (batch["room"] + 0 * self.layer.weight.sum()).sqrt() - batch["room"].sqrt()
        return torch.stack([(error * batch["counted"]).sum(), (error + edge).sum()])

    def counts(self, batch: Batch) -> Tensor:
        return torch.stack([batch["counted"].sum(), torch.tensor(float(len(batch["x"])))])


def rows(step: int) -> Batch:
    """Global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    counted = (torch.rand(BATCH, generator=generator) < 0.6).float()
    counted[0] = 1
    return {
        "x": torch.randn(BATCH, 3, generator=generator),
        "y": torch.randn(BATCH, 2, generator=generator),
        "counted": counted,
        "room": torch.ones(BATCH),
    }


class Rows(Stream):
    """Global batches cut into micro-batches; `before` may spoil or stop any of them."""

    batches_per_epoch = 7

    def skipped(self) -> int:
        return 0

    def __init__(self, before: Callable[[int, int, Batch], None] = lambda *_: None) -> None:
        self.before = before

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Iterator[Batch]:
        for step in count(start):
            whole = rows(step)
            for part, begin in enumerate(range(0, BATCH, micro_batch)):
                batch = {name: values[begin : begin + micro_batch] for name, values in whole.items()}
                self.before(step, part, batch)
                yield batch


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def trainer(folder: Path, objective: Line, stream: Stream | None = None, **section: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": BATCH,
        "blr": 3.2,
        "warmup_steps": 4,
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": 3,
    }
    train = TrainSection(**{**defaults, **section})
    return Trainer(Run(folder, "test"), objective, stream or Rows(), train, 5, make_accelerator())


def fit(folder: Path, objective: Line | None = None, stream: Stream | None = None, **section: Any) -> Line:
    """Train as a fresh process would; accelerate keeps its state from one to the next."""
    AcceleratorState._reset_state(True)
    objective = objective or Line()
    trainer(folder, objective, stream, **section).fit()
    return objective


def weights(objective: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in objective.parameters()])


def gradient_norm(objective: nn.Module) -> float:
    return torch.cat([p.grad.reshape(-1) for p in objective.parameters() if p.grad is not None]).norm().item()


def expected_lr(step: int) -> float:
    """Of the step counted from 0: blr 3.2 at batch 8 is a peak of 0.1; four steps of warm-up out of ten."""
    return 0.1 * (step + 1) / 4 if step < 4 else 0.05 * (1 + cos(pi * (step - 4) / 6))


def losses(folder: Path) -> list[dict[str, float]]:
    """The lines of the log without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("images_per_s", "data_wait", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


# ---------------------------------------------------------------------------------------------- learning


def plain_torch() -> tuple[Tensor, list[list[float]], list[float]]:
    """Weights, losses and gradient norms of the same training, written out."""
    model = Line()
    layer = model.layer
    groups = [{"params": [layer.weight], "weight_decay": 0.05}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    logged, norms = [], []
    for step in range(STEPS):
        batch = rows(step)
        error = (layer(batch["x"]) - batch["y"]).square().sum(1)
        some, every = error[batch["counted"] == 1].mean(), error.mean()
        optimizer.zero_grad()
        (some + 0.5 * every).backward()
        for group in optimizer.param_groups:
            group["lr"] = expected_lr(step)
        norms.append(gradient_norm(model))
        optimizer.step()
        logged.append([some.item(), every.item()])
    return weights(model), logged, norms


@pytest.mark.parametrize("micro_batch", [None, 8, 4, 2, 1])
def test_every_way_of_cutting_a_batch_learns_what_plain_torch_learns(tmp_path: Path, micro_batch: int | None) -> None:
    found = fit(tmp_path, micro_batch=micro_batch)
    expected, logged, norms = plain_torch()
    assert (weights(found) - expected).abs().max() < 1e-6
    lines = losses(tmp_path)
    assert [[line["loss/some"], line["loss/all"]] for line in lines] == [
        pytest.approx(pair, rel=1e-5) for pair in logged
    ]
    assert [line["loss"] for line in lines] == pytest.approx([some + 0.5 * every for some, every in logged], rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-5)


def test_log_line_says_where_the_run_is(tmp_path: Path) -> None:
    fit(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in lines] == [BATCH * step for step in range(1, STEPS + 1)]
    assert [line["epoch"] for line in lines] == pytest.approx([step / 7 for step in range(1, STEPS + 1)], abs=1e-4)
    assert all(line["images_per_s"] > 0 and line["peak_memory_bytes"] > 2**20 for line in lines)


def test_learning_rate_of_the_log_is_the_schedules(tmp_path: Path) -> None:
    fit(tmp_path)
    assert [line["lr"] for line in losses(tmp_path)] == pytest.approx([expected_lr(s) for s in range(STEPS)], rel=1e-12)


def test_log_line_is_the_mean_since_the_line_before(tmp_path: Path) -> None:
    fit(tmp_path / "each")
    fit(tmp_path / "fourth", log_every=4)
    each = [line["loss"] for line in losses(tmp_path / "each")]
    fourth = losses(tmp_path / "fourth")
    assert [line["step"] for line in fourth] == [4, 8, 10]
    means = [sum(each[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert [line["loss"] for line in fourth] == pytest.approx(means, rel=1e-6)


class Still(Line):
    """Learns nothing: what changes is decay."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) * 0


def test_decay_is_of_matrices_only(tmp_path: Path) -> None:
    before, after = Still(), fit(tmp_path, Still(), weight_decay=0.3)
    shrunk = torch.tensor([1 - 0.3 * expected_lr(step) for step in range(STEPS)]).prod()
    assert shrunk < 0.9
    assert torch.allclose(after.layer.weight, before.layer.weight * shrunk, rtol=1e-5)
    assert torch.equal(after.layer.bias, before.layer.bias)


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    objective, before = Line(), Line()
    objective.layer.weight.requires_grad_(False)
    fit(tmp_path, objective)
    assert torch.equal(objective.layer.weight, before.layer.weight)
    assert not torch.equal(objective.layer.bias, before.layer.bias)


def test_clipping_bounds_what_is_applied_and_logs_the_norm_before(tmp_path: Path) -> None:
    one = trainer(tmp_path, Line(), clip_grad=1e-3)
    applied: list[float] = []
    one.learner.optimizer.register_step_pre_hook(lambda *_: applied.append(gradient_norm(one.objective)))
    one.fit()
    assert applied == pytest.approx([1e-3] * STEPS, rel=1e-2)
    assert min(line["grad_norm"] for line in losses(tmp_path)) > 0.1


@pytest.mark.parametrize(("epochs", "per_epoch", "steps"), [(2, 7, 14), (0.5, 7, 4), (0.01, 7, 1), (1.1, 50, 55)])
def test_epochs_are_counted_in_global_batches(tmp_path: Path, epochs: float, per_epoch: int, steps: int) -> None:
    stream = Rows()
    stream.batches_per_epoch = per_epoch
    assert trainer(tmp_path, Line(), stream, steps=None, epochs=epochs).steps == steps


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "world", "split"),
    [(8, None, 1, (8, 1)), (8, None, 4, (2, 1)), (8, 2, 1, (2, 4)), (8, 2, 2, (2, 2)), (1, None, 1, (1, 1))],
)
def test_batch_is_split_over_ranks_and_micro_batches(
    batch_size: int, micro_batch: int | None, world: int, split: tuple[int, int]
) -> None:
    section = TrainSection(steps=1, batch_size=batch_size, micro_batch=micro_batch)
    assert split_batch(section, world) == split


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "world"), [(8, 3, 1), (8, 16, 1), (10, 4, 2), (9, None, 2), (1, None, 2)]
)
def test_batch_that_does_not_divide_is_a_user_error(batch_size: int, micro_batch: int | None, world: int) -> None:
    section = TrainSection(steps=1, batch_size=batch_size, micro_batch=micro_batch)
    with pytest.raises(UserError, match=rf"train\.batch_size={batch_size} is no multiple of {world} ranks"):
        split_batch(section, world)


# ---------------------------------------------------------------------------------------------- stopping and going on


class Cut(Exception):
    """The stream breaks off."""


def cut(step: int, part: int, batch: Batch) -> None:
    if (step, part) == (7, 1):
        raise Cut


def kill(step: int, part: int, batch: Batch) -> None:
    if (step, part) == (7, 1):
        os.kill(os.getpid(), signal.SIGKILL)


def until_cut(folder: Path, section: dict[str, Any]) -> None:
    with pytest.raises(Cut):
        fit(folder, Line(dropout=0.5), Rows(cut), **section)


def until_killed(folder: Path, section: dict[str, Any]) -> None:
    process = fork.Process(target=lambda: fit(folder, Line(dropout=0.5), Rows(kill), **section))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("interrupted", [until_cut, until_killed])
@pytest.mark.parametrize("log_every", [1, 4])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    tmp_path: Path, interrupted: Callable[[Path, dict[str, Any]], None], log_every: int
) -> None:
    section: dict[str, Any] = {"micro_batch": 4, "log_every": log_every}
    whole = fit(tmp_path / "whole", Line(dropout=0.5), **section)
    interrupted(tmp_path / "cut", section)
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())[-1] == "step-00000006"
    assert losses(tmp_path / "cut")[-1]["step"] == {1: 7, 4: 4}[log_every]
    resumed = fit(tmp_path / "cut", Line(dropout=0.5), **section)
    assert torch.equal(weights(resumed), weights(whole))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    last = [tmp_path / name / "checkpoints" / "step-00000010" for name in ("cut", "whole")]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


def test_what_is_random_in_a_step_depends_on_the_step_alone(tmp_path: Path) -> None:
    one = trainer(tmp_path, Line())

    def draw(step: int) -> list[float]:
        one.learner.learn(step, [rows(step)])
        return torch.rand(3).tolist()

    first, second = draw(0), draw(1)
    assert first != second
    assert draw(0) == first


def test_finished_run_learns_no_more(tmp_path: Path) -> None:
    first = fit(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = fit(tmp_path)
    assert torch.equal(weights(again), weights(first))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_stops_after_the_step_with_a_checkpoint_of_it(tmp_path: Path, number: signal.Signals) -> None:
    def stop(step: int, part: int, batch: Batch) -> None:
        if (step, part) == (4, 0):
            os.kill(os.getpid(), number)

    whole = fit(tmp_path / "whole", micro_batch=4)
    handler = signal.getsignal(number)
    with pytest.raises(Preempted, match=f"after step 5 of {STEPS}"):
        fit(tmp_path / "run", stream=Rows(stop), micro_batch=4)
    assert signal.getsignal(number) == handler
    found, skipped = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert restore.read_state(found)["step"] == 5
    assert skipped == []
    resumed = fit(tmp_path / "run", micro_batch=4)
    assert torch.equal(weights(resumed), weights(whole))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fit(tmp_path / "whole")
    with pytest.raises(Cut):
        fit(tmp_path / "run", stream=Rows(cut), micro_batch=4)
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "rng.safetensors").write_bytes(b"")
    resumed = fit(tmp_path / "run", micro_batch=4)
    said = capsys.readouterr().out
    assert "skipped checkpoint step-00000006: rng.safetensors does not match" in said
    assert "going on from step 3 of 10" in said
    assert (weights(resumed) - weights(whole)).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------- broken losses


@pytest.mark.parametrize("log_every", [1, 2, 100])
@pytest.mark.parametrize("checkpoint_every", [2, 100])
@pytest.mark.parametrize(("name", "value"), [("y", float("nan")), ("x", float("inf")), ("x", 1e30), ("room", 0.0)])
def test_broken_loss_or_gradient_fails_and_reaches_no_file(
    tmp_path: Path, name: str, value: float, checkpoint_every: int, log_every: int
) -> None:
    def poison(step: int, part: int, batch: Batch) -> None:
        if (step, part) == (6, 1):
            batch[name] = batch[name].clone().fill_(value)

    section: dict[str, Any] = {"micro_batch": 4, "log_every": log_every, "checkpoint_every": checkpoint_every}
    with pytest.raises(RunFailed, match=r"(loss|gradient) of step 7 is infinite or not a number") as failure:
        fit(tmp_path, Line(), Rows(poison), **section)
    assert ("the checkpoint of step 6 is sound" in str(failure.value)) == (checkpoint_every == 2)
    saved = list((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in sorted(saved)] == ["step-00000004", "step-00000006"] * (checkpoint_every == 2)
    for path in saved:
        assert checkpoints.verify(path) is None
        for part in ("model", "optimizer"):
            assert all(tensor.isfinite().all() for tensor in restore.load_tensors(path, part).values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


# ---------------------------------------------------------------------------------------------- hooks


def test_warm_up_can_be_given_in_epochs(tmp_path: Path) -> None:
    """2 / 7 of an epoch of 7 batches are two steps."""
    fit(tmp_path, warmup_epochs=2 / 7)
    assert [line["lr"] for line in losses(tmp_path)[:3]] == pytest.approx([0.05, 0.1, 0.1])


class Counting(Line):
    """Notes when a step begins."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[int, int]] = []

    def begin_step(self, step: int, steps: int) -> None:
        self.begun.append((step, steps))


def test_a_step_begins_once_also_when_it_accumulates(tmp_path: Path) -> None:
    assert fit(tmp_path, Counting(), micro_batch=2).begun == [(step, STEPS) for step in range(STEPS)]


class Eye:
    """A monitor that draws random numbers and leaves a gradient-free trace."""

    def __init__(self, every: int | None) -> None:
        self.every, self.seen = every, []

    def __call__(self, step: int) -> dict[str, float]:
        torch.rand(step + 1)
        self.seen.append(step)
        return {"eye": float(step)}


@pytest.mark.parametrize(("every", "seen"), [(4, [4, 8, 10]), (None, [10])])
def test_a_monitor_looks_when_it_is_due_and_its_figures_are_logged(
    tmp_path: Path, every: int | None, seen: list[int]
) -> None:
    eye = Eye(every)
    watched = trainer(tmp_path / "watched", Line(dropout=0.5), log_every=3)
    watched.monitor = eye
    watched.fit()
    plain = fit(tmp_path / "plain", Line(dropout=0.5), log_every=3)
    assert torch.equal(weights(watched.objective), weights(plain))
    lines = losses(tmp_path / "watched")
    assert eye.seen == [line["step"] for line in lines if "eye" in line] == seen
    assert [line["step"] for line in lines] == sorted({3, 6, 9, 10, *seen})
    assert all(line["eye"] == line["step"] for line in lines if "eye" in line)


def test_a_batch_in_which_nothing_counts_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Its loss is zero, and the other loss is learnt as ever."""

    def nothing(step: int, part: int, batch: Batch) -> None:
        if step == 3:
            batch["counted"] = torch.zeros(BATCH)

    learnt = fit(tmp_path, stream=Rows(nothing))
    assert weights(learnt).isfinite().all()
    lines = losses(tmp_path)
    assert lines[3]["loss/some"] == 0
    assert lines[3]["loss/all"] > 0


def test_a_compiled_model_is_compiled_once_and_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of samples, which change from batch to batch, must not reach the compiler."""

    def name(step: int, part: int, batch: Batch) -> None:
        batch["key"] = [f"{step}-{part}"]

    backend = CompileCounterWithBackend("aot_eager")
    compiled = partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compiled)
    found = fit(tmp_path / "compiled", Line(dropout=0.5), Rows(name), compile=True, micro_batch=4)
    assert backend.frame_count == 1
    plain = fit(tmp_path / "plain", Line(dropout=0.5), Rows(name), micro_batch=4)
    assert (weights(found) - weights(plain)).abs().max() < 1e-6


@pytest.mark.parametrize("lost", ["manifest.json", "model.safetensors"])
def test_where_every_checkpoint_is_damaged_nothing_begins_anew(tmp_path: Path, lost: str) -> None:
    """A run that began again at step 1 would remove them as it goes."""
    with pytest.raises(Cut):
        fit(tmp_path, stream=Rows(cut), micro_batch=4)
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-00000003", "step-00000006"]
    for path in saved:
        (path / lost).rename(path / "elsewhere")
    with pytest.raises(
        UserError, match=r"no checkpoint in .*checkpoints is sound .*step-00000006.*step-00000003.*begin anew"
    ):
        fit(tmp_path, micro_batch=4)
    assert sorted((tmp_path / "checkpoints").iterdir()) == saved
    (saved[0] / "elsewhere").rename(saved[0] / lost)
    whole = fit(tmp_path / "whole", micro_batch=4)
    assert torch.equal(weights(fit(tmp_path, micro_batch=4)), weights(whole))


def test_a_first_checkpoint_that_was_cut_off_is_no_reason_not_to_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "whole")
    torn = tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000010", torn)
    (torn / "manifest.json").unlink()
    fit(tmp_path / "run")
    assert (
        "skipped checkpoint step-00000003: it was not finished (no manifest); nothing else was"
        in capsys.readouterr().out
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_checkpoints_that_are_kept_for_good_are_written(tmp_path: Path) -> None:
    fit(tmp_path, checkpoint_every=100, keep_every=4, keep_checkpoints=1)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-00000004", "step-00000008", "step-00000010"]


def test_a_checkpoint_is_written_when_the_last_one_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps that take half a minute each: noticed in the step in which a minute is over, written in the next."""
    clock = count(0, 30)
    one = trainer(tmp_path, Line(), checkpoint_every=100, checkpoint_minutes=1, log_every=100, keep_checkpoints=9)
    monkeypatch.setattr("miram.engine.loop.time", SimpleNamespace(monotonic=lambda: next(clock)))
    one.saved_at = 0
    one.fit()
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert saved[-1] == STEPS
    assert len(saved) >= 3
    assert all(1 < b - a < 5 for a, b in pairwise(saved[:-1]))


def test_a_profile_behind_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="profile_steps=11:12 begins after the last of 10 steps"):
        trainer(tmp_path, Line(), profile_steps="11:12")


class Blurred:
    """A monitor whose pictures find no room."""

    every = 4

    def __call__(self, step: int) -> dict[str, float]:
        raise OSError(errno.ENOSPC, "No space left on device", "figures/x.png")


def test_a_picture_without_room_on_the_disk_does_not_end_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trainer(tmp_path, Line())
    one.monitor = Blurred()
    one.fit()
    assert "nothing was looked at in step 4 (figures/x.png: No space left on device)" in capsys.readouterr().err
    assert losses(tmp_path)[-1]["step"] == STEPS


class Damaged(Rows):
    """Reads a damaged sample in step 2."""

    found = 0

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().batches(start, rank, world, micro_batch), start):
            self.found += step == 1
            yield batch

    def skipped(self) -> int:
        found, self.found = self.found, 0
        return found


def test_damaged_samples_are_counted_once_also_when_a_run_is_taken_up_again(tmp_path: Path) -> None:
    fit(tmp_path / "calm", stream=Damaged(), log_every=5, checkpoint_every=2)
    with pytest.raises(Cut):
        fit(
            tmp_path / "cut",
            stream=Damaged(lambda step, *_: cut(7 if step == 3 else 0, 1, {})),
            log_every=5,
            checkpoint_every=2,
        )
    fit(tmp_path / "cut", stream=Damaged(), log_every=5, checkpoint_every=2)
    assert losses(tmp_path / "cut") == losses(tmp_path / "calm")
    assert [line.get("damaged") for line in losses(tmp_path / "calm")] == [1, None]
