"""Checkpoints: bit-equal, checked by hash, and whole whenever the process dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from miram.engine.checkpoint import Checkpoint, load_latest, load_optimizer_tensors, optimizer_tensors, save, verify
from miram.engine.errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")
fork = multiprocessing.get_context("fork")


def tiny(step: int) -> Checkpoint:
    """A checkpoint whose every part knows its step."""
    tensor = torch.full((3,), float(step))
    return Checkpoint({"w": tensor}, {"step.w": tensor[:1].clone()}, {"torch": tensor.byte()}, {"step": step})


def steps_in(checkpoint: Checkpoint) -> set[float]:
    """The steps its parts know of: one, if the parts belong together."""
    tensors = [*checkpoint.model.values(), *checkpoint.optimizer.values(), *checkpoint.rng.values()]
    return {checkpoint.state["step"], *(value for tensor in tensors for value in tensor.tolist())}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------- round trip


class Network(nn.Module):
    """Two number types, buffers, and a count of batches without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16()

    def forward(self, data: Tensor) -> Tensor:
        return self.last(self.norm(self.first(data)).bfloat16()).float()


def network() -> tuple[Network, torch.optim.AdamW]:
    model = Network()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def advance(model: Network, optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        data = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).contiguous().view(torch.uint8)

    return one.keys() == other.keys() and all(
        a.dtype == other[k].dtype and a.shape == other[k].shape and torch.equal(bits(a), bits(other[k]))
        for k, a in one.items()
    )


def test_continued_training_is_bit_equal_to_uninterrupted_training(tmp_path: Path) -> None:
    model, optimizer = network()
    advance(model, optimizer, range(3))
    moments = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    rng = {"torch": torch.get_rng_state()[None]}
    saved = Checkpoint({k: v.clone() for k, v in model.state_dict().items()}, moments, rng, {"step": 3, "x": [0.1]})
    save(tmp_path, 3, saved, keep=1)
    advance(model, optimizer, range(3, 7))

    found, skipped = load_latest(tmp_path)
    assert found is not None
    assert skipped == []
    assert same(found.model, saved.model)
    assert same(found.optimizer, moments)
    assert same(found.rng, rng)
    assert found.state == {"schema": "miram.loop/1", "step": 3, "x": [0.1]}
    again, continued = network()
    again.load_state_dict(found.model)
    load_optimizer_tensors(again, continued, found.optimizer)
    advance(again, continued, range(3, 7))
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    assert same(optimizer_tensors(again, continued), optimizer_tensors(model, optimizer))


def test_optimizer_tensors_are_named_by_parameter_and_never_scalar() -> None:
    model, optimizer = network()
    advance(model, optimizer, range(1))
    tensors = optimizer_tensors(model, optimizer)
    parameters = dict(model.named_parameters())
    assert set(tensors) == {f"{moment}.{n}" for moment in ("step", "exp_avg", "exp_avg_sq") for n in parameters}
    assert all(tensors[f"step.{name}"].shape == (1,) for name in parameters)
    assert all(tensors[f"exp_avg.{name}"].shape == p.shape for name, p in parameters.items())


def test_moment_of_a_parameter_that_is_not_there_is_a_user_error() -> None:
    model, optimizer = network()
    with pytest.raises(UserError, match=r"'exp_avg\.other'"):
        load_optimizer_tensors(model, optimizer, {"exp_avg.other": torch.zeros(1)})


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_parameter_without_dimensions_goes_on_after_a_load() -> None:
    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters())
    model.scale.grad = torch.tensor(1.0)
    optimizer.step()
    tensors = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    load_optimizer_tensors(model, optimizer, tensors)
    assert {value.shape for value in optimizer.state[model.scale].values()} == {torch.Size([])}


def test_shared_parameter_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save(tmp_path, 1, Checkpoint(dict(model.state_dict()), {}, {}, {"step": 1}), keep=1)
    found, _ = load_latest(tmp_path)
    assert found is not None
    model.load_state_dict(found.model)


def test_slices_and_transposes_are_saved_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    save(tmp_path, 1, Checkpoint({"t": whole.T, "s": whole[:, 1:3], "n": torch.tensor(7)}, {}, {}, {}), keep=1)
    found, _ = load_latest(tmp_path)
    assert found is not None
    assert same(found.model, {"t": whole.T, "s": whole[:, 1:3], "n": torch.tensor(7)})


def test_files_hold_plain_tensors_and_json_only(tmp_path: Path) -> None:
    folder = save(tmp_path, 120, tiny(120), keep=1)
    assert folder.name == "step-00000120"
    assert names(folder) == sorted(FILES)
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        assert 8 + length + max(ends) == len(content)
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["schema"].startswith("miram.")


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES[:4])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path: Path, name: str, place: float) -> None:
    save(tmp_path, 1, tiny(1), keep=2)
    path = save(tmp_path, 2, tiny(2), keep=2) / name
    flip(path, int(place * (path.stat().st_size - 1)))
    found, skipped = load_latest(tmp_path)
    assert found is not None
    assert steps_in(found) == {1}
    assert skipped == [f"skipped checkpoint step-00000002: {name} does not match its sha256"]


def test_manifest_flipped_anywhere_is_never_an_exception(tmp_path: Path) -> None:
    save(tmp_path, 1, tiny(1), keep=2)
    manifest = save(tmp_path, 2, tiny(2), keep=2) / "manifest.json"
    for position in range(manifest.stat().st_size):
        flip(manifest, position)
        found, _ = load_latest(tmp_path)
        assert found is not None
        assert steps_in(found) == {1}
        flip(manifest, position)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_falls_back_to_the_checkpoint_before(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, tiny(1), keep=2)
    (save(tmp_path, 2, tiny(2), keep=2) / name).unlink()
    found, skipped = load_latest(tmp_path)
    assert found is not None
    assert steps_in(found) == {1}
    reason = "it was not finished (no manifest)" if name == "manifest.json" else f"{name} is missing"
    assert skipped == [f"skipped checkpoint step-00000002: {reason}"]


def test_nothing_sound_is_nothing_loaded(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") == (None, [])
    for step in (1, 2):
        (save(tmp_path, step, tiny(step), keep=2) / "manifest.json").unlink()
    found, skipped = load_latest(tmp_path)
    assert found is None
    assert [sentence.split()[2] for sentence in skipped] == ["step-00000002:", "step-00000001:"]


def test_manifest_holds_the_digest_of_every_other_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, tiny(1), keep=1)
    digests = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert sorted(digests) == sorted(FILES[:4])
    assert verify(folder) is None


# ---------------------------------------------------------------------------------------------- keeping


@pytest.mark.parametrize("keep", [1, 2, 4, 9])
def test_last_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (5, 10, 100, 1000, 20000):
        save(tmp_path, step, tiny(step), keep)
    kept = [f"step-{step:08d}" for step in (5, 10, 100, 1000, 20000)]
    assert names(tmp_path) == kept[-keep:]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoint_pushes_out_no_sound_one(tmp_path: Path, keep: int) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, tiny(step), keep=3)
    flip(tmp_path / "step-00000030" / "model.safetensors", -1)
    save(tmp_path, 25, tiny(25), keep)
    kept = [f"step-{step:08d}" for step in (10, 20, 25)][-keep:]
    assert names(tmp_path) == [*kept, "step-00000030"]
    found, skipped = load_latest(tmp_path)
    assert found is not None
    assert steps_in(found) == {25}
    assert len(skipped) == 1


def test_unfinished_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 10, tiny(10), keep=2)
    (save(tmp_path, 20, tiny(99), keep=2) / "manifest.json").unlink()
    shutil.copytree(tmp_path / "step-00000020", tmp_path / ".step-00000020")
    save(tmp_path, 20, tiny(20), keep=2)
    found, skipped = load_latest(tmp_path)
    assert found is not None
    assert steps_in(found) == {20}
    assert skipped == []
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


# ---------------------------------------------------------------------------------------------- sudden death


def save_and_die(folder: Path, step: int, operations: int) -> None:
    """Save, killed at the n-th file operation."""
    done = count()

    def die(event: str, _: object) -> None:
        if event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"} and next(done) == operations:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    save(folder, step, tiny(step), keep=1)


def test_death_before_any_file_operation_of_a_save_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    reached = []
    for operations in count():
        folder = tmp_path / str(operations)
        save(folder, 1, tiny(1), keep=1)
        process = fork.Process(target=save_and_die, args=(folder, 2, operations))
        process.start()
        process.join()
        found, _ = load_latest(folder)
        assert found is not None
        (step,) = steps_in(found)
        reached.append(step)
        save(folder, 2, tiny(2), keep=1)
        assert names(folder) == ["step-00000002"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert reached == sorted(reached)
    assert reached.count(1) > 8
    assert reached.count(2) > 5


def save_on_and_on(folder: Path, first: int) -> None:
    for step in count(first):
        save(folder, step, tiny(step), keep=2)


def test_death_at_random_moments_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    moments, last = random.Random(0), 1
    save(tmp_path, last, tiny(last), keep=2)
    for _ in range(10):
        process = fork.Process(target=save_on_and_on, args=(tmp_path, last + 1))
        process.start()
        while not (tmp_path / f"step-{last + 2:08d}").exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found, skipped = load_latest(tmp_path)
        assert found is not None
        (step,) = steps_in(found)
        assert step > last
        assert len(skipped) <= 1
        last = int(step)
