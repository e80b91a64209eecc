"""Several ranks, as copies and as shards, learn what one does; what they write goes on on any number of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import on_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from miram.engine import checkpoint as checkpoints
from miram.engine import restore
from miram.engine.errors import Preempted, RunFailed
from miram.engine.launch import make_accelerator
from miram.engine.loop import Trainer
from miram.engine.objective import Batch, Objective, Stream
from miram.engine.parallel import Twin, needs_twin
from miram.engine.recipe import TrainSection
from miram.engine.run import Run, read_metrics

BATCH, STEPS, WIDTH = 8, 9, 5


class Block(nn.Module):
    """A residual layer that drops."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.layer(x).tanh())


class Deep(Objective):
    """Blocks, a token and a scalar; the first loss counts some of the rows only, the second weighs them by tissue."""

    loss_names = ("masked", "tissue")
    loss_weights = (1.0, 0.5)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.token, self.gain = nn.Parameter(torch.randn(1, WIDTH)), nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"] + self.token
        for block in self.blocks:
            x = block(x)
        error = (self.gain * x - batch["y"]).square().sum(1)
        return torch.stack([(error * batch["masked"]).sum(), (error * batch["tissue"]).sum()])

    def counts(self, batch: Batch) -> Tensor:
        return torch.stack([batch["masked"].sum(), batch["tissue"].sum()])


def rows(step: int) -> Batch:
    """Global batch of a step; how much a row counts differs from row to row."""
    generator = torch.Generator().manual_seed(step)
    masked = (torch.rand(BATCH, generator=generator) < 0.6).float()
    masked[0] = 1
    return {
        "x": torch.randn(BATCH, WIDTH, generator=generator),
        "y": torch.randn(BATCH, WIDTH, generator=generator),
        "masked": masked,
        "tissue": torch.rand(BATCH, generator=generator),
        "key": [f"s{step}-{i}" for i in range(BATCH)],
    }


class Rows(Stream):
    """Each rank's part of the global batches; `before` may spoil or stop any of them."""

    batches_per_epoch = 4

    def __init__(self, before: Callable[[int, int, Batch], None] = lambda *_: None) -> None:
        self.before = before

    def skipped(self) -> int:
        return 0

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Iterator[Batch]:
        share = BATCH // world
        for step in count(start):
            whole = rows(step)
            for begin in range(rank * share, (rank + 1) * share, micro_batch):
                batch = {name: values[begin : begin + micro_batch] for name, values in whole.items()}
                self.before(step, rank, batch)
                yield batch


def section(**changes: Any) -> TrainSection:
    defaults: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "blr": 1.6, "warmup_steps": 2}
    defaults |= {"precision": "fp32", "log_every": 1, "checkpoint_every": 4, "clip_grad": 2.0, "ema": 0.9}
    return TrainSection(**{**defaults, **changes})


def training(folder: Path, before: Callable[[int, int, Batch], None] = lambda *_: None, **changes: Any) -> Trainer:
    AcceleratorState._reset_state(True)
    train, accelerator, objective = section(**changes), make_accelerator(), Deep()
    twin = Twin(objective, accelerator, needed=needs_twin(train, accelerator))
    return Trainer(Run(folder, "test"), objective, Rows(before), train, 5, accelerator, None, twin)


def fit(folder: Path, *more: Any, **changes: Any) -> dict[str, Tensor]:
    """Train; the weights at the end, as they are looked at, from the main process."""
    trainer = training(folder, *more, **changes)
    if changes.get("parallel") == "fsdp2" and trainer.world > 1:
        assert all(isinstance(p, DTensor) for p in trainer.objective.parameters())
    trainer.fit()
    return {name: tensor.clone() for name, tensor in trainer.twin.model.state_dict().items()} if trainer.main else {}


def lines(folder: Path) -> list[dict[str, float]]:
    clock = ("images_per_s", "data_wait", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(folder / "metrics.jsonl")]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 2e-6, name


def assert_same_lines(found: Path, expected: Path) -> None:
    for a, b in zip(lines(found), lines(expected), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """One rank, the whole batch at once."""
    folder = tmp_path_factory.mktemp("parallel") / "alone"
    return folder, fit(folder)


@pytest.mark.parametrize(("world", "parallel"), [(2, "ddp"), (2, "fsdp2"), (4, "fsdp2")])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_every_number_of_ranks_learns_what_one_does(
    world: int, parallel: str, micro_batch: int | None, alone: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    found = on_ranks(world, lambda: fit(tmp_path, parallel=parallel, micro_batch=micro_batch))
    assert_close(found[0], alone[1])
    assert_same_lines(tmp_path, alone[0])


@pytest.mark.parametrize(
    "going",
    [[(2, "fsdp2"), (1, "ddp")], [(1, "ddp"), (4, "fsdp2")], [(4, "fsdp2"), (2, "ddp")], [(2, "ddp"), (2, "fsdp2")]],
)
def test_a_run_goes_on_on_another_number_of_ranks(
    going: list[tuple[int, str]], alone: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    def stop(step: int, rank: int, batch: Batch) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    (world, parallel), (other, otherwise) = going
    on_ranks(world, lambda: fit(tmp_path, stop, parallel=parallel))
    found, _ = checkpoints.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == "step-00000004"
    after = on_ranks(other, lambda: fit(tmp_path, parallel=otherwise))
    assert_close(after[0], alone[1])
    assert_same_lines(tmp_path, alone[0])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_killed_run_of_two_ranks_ends_in_the_same_bits(parallel: str, tmp_path: Path) -> None:
    def kill(step: int, rank: int, batch: Batch) -> None:
        if step == 6 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    on_ranks(2, lambda: fit(tmp_path / "calm", parallel=parallel, micro_batch=2))
    on_ranks(2, lambda: fit(tmp_path / "killed", kill, parallel=parallel, micro_batch=2))
    on_ranks(2, lambda: fit(tmp_path / "killed", parallel=parallel, micro_batch=2))
    last = [tmp_path / name / "checkpoints" / f"step-{STEPS:08d}" for name in ("calm", "killed")]
    files = sorted(path.name for path in last[0].iterdir())
    assert files == sorted(path.name for path in last[1].iterdir())
    assert "ema.safetensors" in files
    for name in files:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    assert lines(tmp_path / "calm") == lines(tmp_path / "killed")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_poisoned_batch_on_one_rank_stops_both_with_the_same_sentence(
    parallel: str, log_every: int, tmp_path: Path
) -> None:
    """Nothing is learnt from it or after it: weights are those of the step before, to the bit."""

    def poison(step: int, rank: int, batch: Batch) -> None:
        if step == 5 and rank == 1 and "s5-6" in batch["key"]:
            batch["x"] = batch["x"].clone().fill_(torch.nan)

    def poisoned() -> tuple[str, dict[str, Tensor]]:
        trainer = training(tmp_path / "poisoned", poison, **options)
        with pytest.raises(RunFailed) as failure:
            trainer.fit()
        return str(failure.value), {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights(trainer)}

    def before() -> dict[str, Tensor]:
        def leave(step: int, rank: int, batch: Batch) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer = training(tmp_path / "before", leave, **(options | {"log_every": 1}))
        with pytest.raises(Preempted, match="after step 5"):
            trainer.fit()
        return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights(trainer)}

    def weights(trainer: Trainer) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in trainer.objective.named_parameters()]

    options: dict[str, Any] = {"parallel": parallel, "micro_batch": 2, "log_every": log_every}
    (one, found), (other, _) = on_ranks(2, poisoned)
    assert one == other
    assert "on rank 1 the loss of step 6 of samples s5-6, s5-7 is infinite or not a number" in one
    assert "the checkpoint of step 4 is sound" in one
    expected = on_ranks(2, before)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    newest, skipped = checkpoints.newest(tmp_path / "poisoned" / "checkpoints")
    assert newest is not None
    assert (newest.name, skipped) == ("step-00000004", [])


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_either_rank_stops_both_at_the_same_step(
    told: int, alone: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    def stop(step: int, rank: int, batch: Batch) -> None:
        if step == 2 and rank == told:
            os.kill(os.getpid(), signal.SIGUSR1)

    stopped = on_ranks(2, lambda: fit(tmp_path, stop, checkpoint_every=100))
    assert all(isinstance(error, Preempted) for error in stopped)
    assert len({str(error) for error in stopped}) == 1
    found, _ = checkpoints.newest(tmp_path / "checkpoints")
    assert found is not None
    assert restore.read_state(found)["step"] in (3, 4)  # seen at the step's end, or agreed on a step later
    assert_close(on_ranks(2, lambda: fit(tmp_path))[0], alone[1])
    assert_same_lines(tmp_path, alone[0])


def test_the_average_is_what_is_looked_at_and_saved(alone: tuple[Path, dict[str, Tensor]]) -> None:
    folder, looked_at = alone
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    average, weights = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors")
    assert all(torch.equal(looked_at[name], value) for name, value in average.items())
    assert not torch.equal(average["token"], weights["token"])
    assert looked_at.keys() - average.keys() == {"seen"}
