"""The pretraining stage in forked processes, spoilt or killed at a chosen place, and what it left compared.

A run goes to FOLDER/run, and is given as `run`: nothing in it depends on where the folder is. FOLDER/keys-<rank>.txt
holds `step place keys …` for each micro-batch that a rank took, from all starts: `place` of its first sample in the
global batch.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import on_ranks
from torch import Tensor

from miram.data.stream import EpochStream
from miram.engine import checkpoint as checkpoints
from miram.engine.errors import exit_code
from miram.engine.objective import Batch
from miram.engine.run import read_metrics
from miram.pretrain.stage import pretrain

FREELY = ("config.yaml", "encoder.json")  # name settings that may change on the way, and a digest of them
CLOCK = ("images_per_s", "data_wait", "peak_memory_bytes")
Taking = Callable[[int, int, int, Batch], None]  # (step counted from 0, micro-batch, rank, batch) as it is taken


@dataclass(frozen=True)
class Ended:
    """How a rank ended that was not killed."""

    code: int
    out: str
    err: str


def start(
    folder: Path,
    arguments: Sequence[str],
    *,
    world: int = 1,
    spoil: Callable[[int], None] = lambda rank: None,
    taking: Taking = lambda *_: None,
    timeout: float = 120,
    **options: Any,
) -> list[Any]:
    """`miram pretrain` on forked ranks: how each ended, the exception that no exit code stands for, or None if killed.

    Args:
        folder: where the run folder is or will be.
        arguments: of the command.
        world: ranks.
        spoil: called with the rank in each process before it starts, to patch what it likes.
        taking: called with every micro-batch that is about to be learnt from.
        timeout: seconds after which a rank counts as hung.
        options: of `pretrain`.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def work() -> Ended:
        rank, (out, err) = int(os.environ["RANK"]), (io.StringIO(), io.StringIO())
        os.chdir(folder)
        noting(taking)
        spoil(rank)
        with redirect_stdout(out), redirect_stderr(err):
            code = exit_code(lambda: pretrain("pretrain/demo", [*arguments, "--out=run"], **options))
        return Ended(code, out.getvalue(), err.getvalue())

    return on_ranks(world, work, timeout)


def finish(folder: Path, arguments: Sequence[str], **how: Any) -> Ended:
    """The same to its end on every rank; what the main one said."""
    ended = start(folder, arguments, **how)
    assert [getattr(end, "code", end) for end in ended] == [0] * len(ended), ended
    assert isinstance(ended[0], Ended)
    return ended[0]


def noting(taking: Taking) -> None:
    """From now on, in this process: write down which samples are taken, and let `taking` see them first."""
    original = EpochStream.batches

    def batches(self: EpochStream, start: int, rank: int, world: int, micro_batch: int) -> Generator[Batch]:
        accumulation = self.batch_size // (world * micro_batch)
        with (
            closing(original(self, start, rank, world, micro_batch)) as inner,
            Path(f"keys-{rank}.txt").open("a", buffering=1) as notes,
        ):
            for i, batch in enumerate(inner):
                step, micro = start + i // accumulation, i % accumulation
                taking(step, micro, rank, batch)
                place = (rank * accumulation + micro) * micro_batch
                notes.write(f"{step} {place} {' '.join(batch['key'])}\n")
                yield batch

    EpochStream.batches = batches  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------- killing


def kill() -> None:
    """This very process, as the system does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step: int, micro: int, rank: int) -> Taking:
    """Kill a rank when it takes a micro-batch."""

    def taking(*place: Any) -> None:
        if place[:3] == (step, micro, rank):
            kill()

    return taking


def writing(part: str, step: int, act: Callable[[], Any]) -> Callable[[int], None]:
    """Act when one tensor of a file of a checkpoint is written and the next would be."""

    def spoil(rank: int) -> None:
        original = checkpoints.write_tensors

        def write_tensors(path: Path, forms: Any, values: Iterable[Tensor]) -> str:
            if path.name == f"{part}.safetensors" and path.parent.name == f".step-{step:08d}":
                values = interrupted(values, act)
            return original(path, forms, values)

        checkpoints.write_tensors = write_tensors

    return spoil


def interrupted(values: Iterable[Tensor], act: Callable[[], Any]) -> Iterator[Tensor]:
    for i, value in enumerate(values):
        if i == 1:
            act()
        yield value


# ---------------------------------------------------------------------------------------------- comparing


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, in order and with the order of their keys, without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(folder / "run/metrics.jsonl")]


def order(folder: Path) -> dict[int, list[str]]:
    """Samples of every global batch, in its order. What several starts took was the same each time."""
    taken: dict[tuple[int, int], str] = {}
    for path in folder.glob("keys-*.txt"):
        for line in path.read_text().splitlines():
            step, place, *keys = line.split()
            for i, key in enumerate(keys, int(place)):
                assert taken.setdefault((int(step), i), key) == key, (step, i)
    return {step: [taken[at] for at in sorted(taken) if at[0] == step] for step, _ in sorted(taken)}


def files(folder: Path) -> dict[str, bytes]:
    """All of a run folder but metrics.jsonl, byte by byte."""
    run = folder / "run"
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("metrics.jsonl", ".lock")}


def last_checkpoint(folder: Path) -> Path:
    """The newest sound one."""
    path, _ = checkpoints.newest(folder / "run/checkpoints")
    assert path is not None
    return path


def assert_same_end(found: Path, expected: Path, *, but: Container[str] = ()) -> None:
    """Every file of both runs, but for some names, every line of the log, and the samples of every batch."""
    one, two = files(found), files(expected)
    assert one.keys() == two.keys()
    assert {"encoder.safetensors", "state.json"} < one.keys()
    assert [name for name in one if one[name] != two[name] and name not in but] == []
    assert [list(line.items()) for line in metrics(found)] == [list(line.items()) for line in metrics(expected)]
    assert order(found) == order(expected)
