"""What ranks tell each other, a step late, and how memory that runs out is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miram.engine.errors import RunFailed
from miram.engine.guard import FEW, Agreed, Bulletin, Culprits, OutOfMemory, telling_of_memory
from miram.engine.step import OnDevice

CPU = torch.device("cpu")


def flags(*values: int) -> Tensor:
    return torch.tensor(values) > 0


def test_a_bulletin_is_read_a_step_late_unless_someone_waits() -> None:
    bulletin = Bulletin(CPU)
    bulletin.post(5, flags(0, 1, 0))
    assert bulletin.read(waiting=False) == Agreed()
    bulletin.post(6, flags(1, 0, 0))
    assert bulletin.read(waiting=False) == Agreed(stop=True)
    assert bulletin.read(waiting=True) == Agreed(broken=6)
    assert bulletin.read(waiting=True) == Agreed()


def test_what_two_steps_said_is_added_up_and_the_first_broken_one_counts() -> None:
    bulletin = Bulletin(CPU)
    bulletin.post(1, flags(1, 0, 1))
    bulletin.post(2, flags(1, 1, 0))
    assert bulletin.read(waiting=True) == Agreed(broken=1, stop=True, save=True)


def test_pages_are_not_written_over_before_they_are_read() -> None:
    bulletin = Bulletin(CPU)
    found = []
    for step in range(7):
        bulletin.post(step, flags(0, step % 2, step % 3 == 0))
        found.append(bulletin.read(waiting=False))
    expected = [Agreed(stop=step % 2 == 1, save=step % 3 == 0) for step in range(6)]
    assert found == [Agreed(), *expected]


class Alone:
    """An accelerator of one rank."""

    process_index = 0


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miram.engine.guard.gather_object", lambda said: said)


def test_the_samples_of_broken_micro_batches_are_named() -> None:
    culprits = Culprits()
    culprits.note(6, flags(0, 0), [["a"], ["b"]])
    culprits.note(7, flags(0, 1), [["c", "d"], ["e", "f"]])
    assert culprits.named(Alone(), 7) == "on rank 0 the loss of step 7 of samples e, f is infinite or not a number"  # type: ignore[arg-type]


def test_no_more_samples_are_named_than_fit_a_sentence() -> None:
    culprits = Culprits()
    keys = [f"s{i}" for i in range(FEW + 4)]
    culprits.note(3, flags(1), [keys])
    culprits.note(4, flags(1), [["other"]])
    said = culprits.named(Alone(), 3)  # type: ignore[arg-type]
    assert f"step 3 of samples {', '.join(keys[:FEW])} and 4 more is" in said
    assert "other" not in said


def test_a_gradient_that_breaks_without_its_loss_is_no_samples_fault() -> None:
    culprits = Culprits()
    culprits.note(9, flags(0), [["a"]])
    said = culprits.named(Alone(), 9)  # type: ignore[arg-type]
    assert said == "the gradient of step 9 is infinite or not a number, though its losses are numbers"


def test_an_allocation_that_fails_is_told_in_one_sentence() -> None:
    with pytest.raises(RunFailed) as failure, telling_of_memory(lambda: "3 images"):
        torch.empty(2**50, dtype=torch.float64)
    assert isinstance(failure.value, OutOfMemory)
    assert str(failure.value) == "out of memory: 3 images"
    with pytest.raises(OutOfMemory), telling_of_memory(lambda: ""):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="size"), telling_of_memory(lambda: ""):
        torch.ones(2) @ torch.ones(3)


def test_a_tensor_goes_to_the_device_only_when_it_is_asked_for() -> None:
    batch = OnDevice({"x": torch.ones(2), "view": torch.ones(3), "key": ["a"]}, torch.device("meta"))
    assert batch["x"].device.type == "meta"
    assert batch.tensors["view"].device.type == "cpu"
    assert set(batch) == {"x", "view"}
    assert batch.take()["view"].device.type == "meta"
    assert len(batch) == 0
