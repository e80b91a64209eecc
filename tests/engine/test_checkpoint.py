"""Checkpoints: bit-equal, checked by hash, free of the number of ranks, and kept by policy."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from miram.engine import checkpoint as checkpoints
from miram.engine.checkpoint import Checkpoints, newest, verify
from miram.engine.errors import RunFailed, UserError
from miram.engine.restore import load_into, load_model, load_optimizer, load_tensors, optimizer_tensors, read_state

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")
Parts = dict[str, dict[str, Tensor]]
fork = multiprocessing.get_context("fork")


def tiny(step: int) -> Parts:
    """A checkpoint whose every part knows its step."""
    tensor = torch.full((3,), float(step))
    return {"model": {"w": tensor}, "optimizer": {"step.w": tensor[:1].clone()}, "rng": {"torch": tensor.byte()}}


def save(folder: Path, step: int, keep: int = 2, parts: Parts | None = None, **options: Any) -> Path:
    Checkpoints(folder, keep_last=keep, **options).save(step, tiny(step) if parts is None else parts, {"of": step})
    return folder / f"step-{step:08d}"


def step_in(path: Path | None) -> int:
    """The step all parts of a checkpoint agree on."""
    assert path is not None
    tensors = [t for part in ("model", "optimizer", "rng") for t in load_tensors(path, part).values()]
    state = read_state(path)
    (step,) = {state["step"], state["of"], *(value for t in tensors for value in t.tolist())}
    return int(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).contiguous().view(torch.uint8)

    return one.keys() == other.keys() and all(
        a.dtype == other[k].dtype and a.shape == other[k].shape and torch.equal(bits(a), bits(other[k]))
        for k, a in one.items()
    )


# ---------------------------------------------------------------------------------------------- round trip


class Network(nn.Module):
    """Two number types, buffers, and a count of batches without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16()

    def forward(self, data: Tensor) -> Tensor:
        return self.last(self.norm(self.first(data)).bfloat16()).float()


def network(**options: Any) -> tuple[Network, torch.optim.AdamW]:
    model = Network()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, **options)


def advance(model: nn.Module, optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        data = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def parts_of(model: nn.Module, optimizer: torch.optim.AdamW) -> Parts:
    return {"model": dict(model.state_dict()), "optimizer": optimizer_tensors(model, optimizer), "rng": {}}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_continued_training_is_bit_equal_to_uninterrupted_training(
    tmp_path: Path, fused: bool, background: bool
) -> None:
    model, optimizer = network(fused=fused)
    advance(model, optimizer, range(3))
    writer = Checkpoints(tmp_path, background=background)
    writer.save(3, parts_of(model, optimizer), {"x": [0.1]})
    advance(model, optimizer, range(3, 7))  # meanwhile: a background write must not see this
    writer.wait()

    path, skipped = newest(tmp_path)
    assert path is not None
    assert skipped == []
    assert read_state(path) == {"step": 3, "x": [0.1]}
    again, continued = network(fused=fused)
    advance(again, continued, range(100, 102))  # whatever they were before does not show
    load_model(path, again)
    load_optimizer(path, again, continued)
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


def test_names_are_free_of_wrappers(tmp_path: Path) -> None:
    model, optimizer = network()
    advance(model, optimizer, range(1))
    model.first = torch.compile(model.first)  # renames its parameters to first._orig_mod.*
    assert "first._orig_mod.weight" in model.state_dict()
    path = save(tmp_path, 1, parts=parts_of(model, optimizer))
    bare, other = network()
    load_model(path, bare)
    load_optimizer(path, bare, other)
    assert same(dict(bare.first.state_dict()), dict(model.first._orig_mod.state_dict()))
    load_model(path, model)
    load_optimizer(path, model, optimizer)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_parameter_without_dimensions_goes_on_after_a_load(tmp_path: Path) -> None:
    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters())
    model.scale.grad = torch.tensor(1.0)
    optimizer.step()
    path = save(tmp_path, 1, parts=parts_of(model, optimizer))
    other = Scaled()
    moved = torch.optim.AdamW(other.parameters())
    load_model(path, other)
    load_optimizer(path, other, moved)
    assert {value.shape for value in moved.state[other.scale].values()} == {torch.Size([])}
    assert torch.equal(model.scale, other.scale)
    assert load_tensors(path, "model")["scale"].shape == (1,)


def test_parameter_that_never_had_a_gradient_has_no_moments(tmp_path: Path) -> None:
    model, optimizer = network()
    model.last.requires_grad_(False)
    advance(model, optimizer, range(1))
    path = save(tmp_path, 1, parts=parts_of(model, optimizer))
    other, moved = network()
    advance(other, moved, range(2))
    load_optimizer(path, other, moved)
    assert not moved.state.get(other.last.weight)
    assert same(optimizer_tensors(other, moved), optimizer_tensors(model, optimizer))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight


def test_shared_parameter_is_saved_once_and_loaded_under_both_names(tmp_path: Path) -> None:
    model = Tied()
    path = save(tmp_path, 1, parts={"model": dict(model.state_dict())})
    assert sorted(load_file(path / "model.safetensors")) == ["first.bias", "first.weight", "last.bias"]
    assert json.loads((path / "state.json").read_text())["aliases"] == {"model": {"last.weight": "first.weight"}}
    assert "aliases" not in read_state(path)
    assert same(load_tensors(path, "model"), dict(model.state_dict()))
    other = Tied()
    load_model(path, other)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.last.weight is other.first.weight
    apart = Tied()
    apart.last.weight = nn.Parameter(torch.zeros(3, 3))
    load_model(path, apart)
    assert torch.equal(apart.last.weight, model.first.weight)


def test_averages_take_the_place_of_the_parameters_they_are_of(tmp_path: Path) -> None:
    model = Network()
    averages = {"first.weight": torch.full((4, 3), 7.0)}
    path = save(tmp_path, 1, parts={"model": dict(model.state_dict()), "ema": averages})
    other = Network()
    other.norm.running_mean.fill_(3.0)
    load_model(path, other, "ema")
    assert same(dict(other.state_dict()), dict(model.state_dict()) | averages)
    target = {"first.weight": torch.zeros(4, 3)}
    load_into(path, "ema", target)
    assert same(target, averages)


def test_checkpoint_of_another_model_is_a_user_error(tmp_path: Path) -> None:
    model, optimizer = network()
    advance(model, optimizer, range(1))
    path = save(tmp_path, 1, parts=parts_of(model, optimizer))
    weights = dict(model.state_dict())
    with pytest.raises(UserError, match=r"its model lacks 'more', unlike this run"):
        load_into(path, "model", weights | {"more": torch.ones(1)})
    less = {name: w for name, w in weights.items() if "norm" not in name}
    with pytest.raises(UserError, match=r"its model holds 'norm\.bias' and 4 more, unlike this run"):
        load_into(path, "model", less)
    with pytest.raises(UserError, match=r"first.weight is float32 \[4, 3\], here float32 \[3, 4\]"):
        load_into(path, "model", weights | {"first.weight": torch.ones(3, 4)})
    with pytest.raises(UserError, match=r"holds no ema\.safetensors"):
        load_tensors(path, "ema")
    with pytest.raises(UserError, match=r"its optimizer holds 'exp_avg\.first\.bias' and 17 more"):
        load_optimizer(path, nn.Linear(3, 4), optimizer)


def test_files_hold_plain_tensors_and_json_only(tmp_path: Path) -> None:
    folder = save(tmp_path, 120)
    assert folder.name == "step-00000120"
    assert names(folder) == sorted(FILES)
    for path in folder.glob("*.safetensors"):
        assert same(load_file(path), tiny(120)[path.stem])
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["schema"].startswith("miram.")


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_any_byte_flipped_is_detected_and_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    said = "manifest|missing|does not match" if name == "manifest.json" else f"{name} does not match its sha256"
    chance = random.Random(0)
    for position in range(0, path.stat().st_size, 1 + 2 * (name == "manifest.json")):
        mask = chance.choice([1, 9, 0x20, chance.randrange(1, 256)])
        flip(path, position, mask)
        found, skipped = newest(tmp_path)
        assert step_in(found) == 1
        (sentence,) = skipped
        assert sentence.startswith("skipped checkpoint step-00000002: ")
        assert any(words in sentence for words in said.split("|"))
        flip(path, position, mask)
    assert step_in(newest(tmp_path)[0]) == 2


def test_white_space_of_a_manifest_is_part_of_it(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1) / "manifest.json"
    flip(manifest, manifest.read_text().index('"sha256"') - 1, ord(" ") ^ ord("\t"))
    assert verify(manifest.parent) == "its manifest is damaged"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_missing_or_cut_file_falls_back_to_the_checkpoint_before(
    tmp_path: Path, name: str, harm: Callable[[Path], object]
) -> None:
    save(tmp_path, 1)
    harm(save(tmp_path, 2) / name)
    found, skipped = newest(tmp_path)
    assert step_in(found) == 1
    assert len(skipped) == 1


def test_unreadable_file_is_damage_not_a_crash(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "model.safetensors"
    path.unlink()
    path.mkdir()
    found, skipped = newest(tmp_path)
    assert step_in(found) == 1
    assert "model.safetensors" in skipped[0]


def test_nothing_sound_is_nothing_found(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") == (None, [])
    for step in (1, 2):
        (save(tmp_path, step) / "manifest.json").unlink()
    found, skipped = newest(tmp_path)
    assert found is None
    assert [sentence.split()[2] for sentence in skipped] == ["step-00000002:", "step-00000001:"]


def test_manifest_holds_the_digest_of_every_other_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    digests = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert sorted(digests) == sorted(FILES[:4])
    assert verify(folder) is None


# ---------------------------------------------------------------------------------------------- keeping


def model_of_keeping(there: set[int], damaged: set[int], step: int, last: int, every: int | None) -> set[int]:
    """What may go: reached steps that are no keepers and have `last` newer sound ones that are reached."""
    sound = {s for s in there if s <= step and s not in damaged}
    keepers = {s for s in there if every and s % every == 0}
    return {s for s in there if s > step or s in keepers or sum(other > s for other in sound) < last}


@pytest.mark.parametrize("seed", range(12))
def test_pruning_agrees_with_brute_force(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    last, every = chance.choice([1, 2, 3, 5]), chance.choice([None, 2, 4, 10])
    writer = Checkpoints(tmp_path, keep_last=last, keep_every=every)
    step, there, damaged = 0, set[int](), set[int]()
    for _ in range(15):
        step += chance.choice([1, 1, 2, 3])
        if chance.random() < 0.2:  # a resume that skips later ones: they are damaged, or could not be read at the time
            sound = there - damaged
            skipped = {s for s in sound if s >= step - 3 and s != min(sound)}
            for lost in [s for s in skipped if chance.random() < 0.5]:
                (tmp_path / f"step-{lost:08d}" / "manifest.json").unlink()
                damaged.add(lost)
            step = max(sound - skipped, default=0) + 1
            writer = Checkpoints(tmp_path, keep_last=last, keep_every=every)
        damaged.discard(step)  # it is written anew
        writer.save(step, tiny(step), {"of": step})
        there = model_of_keeping(there | {step}, damaged, step, last, every)
        assert names(tmp_path) == [f"step-{s:08d}" for s in sorted(there)]
        if chance.random() < 0.2:  # one of them rots under the eyes of the writer
            rotten = chance.choice(sorted(there))
            if rotten not in damaged:
                time.sleep(0.01)  # the clock of the file system ticks
                flip(tmp_path / f"step-{rotten:08d}" / "model.safetensors", -1)
            damaged |= {rotten}
    assert step_in(newest(tmp_path)[0]) == max(there - damaged, default=None)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoint_pushes_out_no_sound_one(tmp_path: Path, keep: int) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    flip(tmp_path / "step-00000030" / "model.safetensors", -1)
    save(tmp_path, 25, keep)
    kept = [f"step-{step:08d}" for step in (10, 20, 25)][-keep:]
    assert names(tmp_path) == [*kept, "step-00000030"]
    found, skipped = newest(tmp_path)
    assert step_in(found) == 25
    assert len(skipped) == 1


def test_unfinished_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (save(tmp_path, 20) / "manifest.json").unlink()
    shutil.copytree(tmp_path / "step-00000020", tmp_path / ".step-00000020")
    (tmp_path / ".step-00000015").mkdir()
    save(tmp_path, 20)
    found, skipped = newest(tmp_path)
    assert step_in(found) == 20
    assert skipped == []
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_sound_checkpoint_of_the_same_step_is_never_put_at_risk(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    inodes = {p.name: p.stat().st_ino for p in path.iterdir()}
    save(tmp_path, 10, parts=tiny(99))
    assert {p.name: p.stat().st_ino for p in path.iterdir()} == inodes
    assert step_in(path) == 10


def test_foreign_names_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("step-last", "notes", "step-00000001.bak"):
        (tmp_path / name).mkdir()
    for step in (2, 3):
        save(tmp_path, step, keep=1)
    assert step_in(newest(tmp_path)[0]) == 3
    assert names(tmp_path) == ["notes", "step-00000001.bak", "step-00000003", "step-last"]


# ---------------------------------------------------------------------------------------------- in the background


def test_background_and_foreground_write_the_same_bytes(tmp_path: Path) -> None:
    model, optimizer = network()
    advance(model, optimizer, range(2))
    for background in (False, True):
        writer = Checkpoints(tmp_path / str(background), background=background)
        writer.save(2, parts_of(model, optimizer), {"x": 1})
        writer.wait()
    one, other = (tmp_path / str(b) / "step-00000002" for b in (False, True))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_background_save_returns_before_the_disk_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), checkpoints.write_checkpoint

    def slow(*arguments: Any) -> None:
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    writer, parts, state = Checkpoints(tmp_path, background=True), tiny(1), {"of": 1}
    writer.save(1, parts, state)
    assert newest(tmp_path) == (None, [])
    parts["model"]["w"].zero_()
    state["of"] = 2
    gate.set()
    writer.save(2, tiny(2), state)  # waits for the first
    assert step_in(tmp_path / "step-00000001") == 1
    writer.wait()
    assert step_in(newest(tmp_path)[0]) == 2


@pytest.mark.parametrize("told_by", ["save", "wait"])
def test_failure_in_the_background_is_raised_once_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    writer = Checkpoints(tmp_path, background=True)
    writer.save(1, tiny(1), {"of": 1})
    writer.wait()
    with monkeypatch.context() as broken:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        broken.setattr("os.fsync", full)
        writer.save(2, tiny(2), {"of": 2})
        said = (
            "checkpoint of step 2 could not be written .*No space left.* checkpoint step-00000001 is whole; free space"
        )
        with pytest.raises(RunFailed, match=said):
            writer.save(3, tiny(3), {"of": 3}) if told_by == "save" else writer.wait()
    writer.wait()
    assert names(tmp_path) == ["step-00000001"]
    writer.save(4, tiny(4), {"of": 4})
    writer.wait()
    assert step_in(newest(tmp_path)[0]) == 4


# ---------------------------------------------------------------------------------------------- many ranks


class Sharded(nn.Module):
    """Blocks with fewer rows than ranks, one element alone, a tied weight and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)) for _ in range(2)])
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, data: Tensor) -> Tensor:
        self.seen += 1
        data = self.first(data)
        for block in self.blocks:
            data = data + block(data)
        return self.last(data) * self.scale


def sharded(world: int) -> tuple[Sharded, torch.optim.AdamW]:
    """Over `world` ranks, or plain (0)."""
    model = Sharded()
    if world:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def learn(model: nn.Module, optimizer: torch.optim.AdamW, steps: range, rank: int, world: int) -> None:
    for step in steps:
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        model(data[rank :: max(world, 1)]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW, rank: int) -> None:
    averages = {name: p.detach() for name, p in model.named_parameters()}
    parts = {"model": dict(model.state_dict()), "optimizer": optimizer_tensors(model, optimizer), "ema": averages}
    Checkpoints(folder, writes=rank == 0, background=step == 3).save(step, parts, {"x": 0.1})


def first_life(rank: int, world: int, folder: Path) -> None:
    """Train 3 steps and save."""
    model, optimizer = sharded(world)
    learn(model, optimizer, range(3), rank, world)
    snapshot(folder / f"{world}", 3, model, optimizer, rank)


def second_life(rank: int, world: int, folder: Path) -> None:
    """Load every world's checkpoint, save it again, train 2 steps more and save."""
    for origin in WORLDS:
        model, optimizer = sharded(world)
        learn(model, optimizer, range(50, 51), rank, world)
        path = folder / f"{origin}" / "step-00000003"
        load_model(path, model)
        load_optimizer(path, model, optimizer)
        snapshot(folder / f"{origin}-{world}", 3, model, optimizer, rank)
        learn(model, optimizer, range(3, 5), rank, world)
        snapshot(folder / f"{origin}-{world}-on", 5, model, optimizer, rank)


def on_ranks(life: Callable[..., None], world: int, folder: Path) -> None:
    """Run `life(rank, world, folder)` on so many gloo ranks; 0: one process without any."""

    def live(rank: int) -> None:
        torch.set_num_threads(1)
        if world:
            store = f"file://{folder / life.__name__}-{world}"
            distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        life(rank, world, folder)
        if world:
            distributed.destroy_process_group()

    ranks = [fork.Process(target=live, args=(rank,)) for rank in range(max(1, world))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * len(ranks)


WORLDS = (0, 1, 2, 4)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for life in (first_life, second_life):
        for world in WORLDS:
            on_ranks(life, world, folder)
    return folder


def content(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("world", WORLDS)
def test_checkpoint_is_of_the_whole_model_whatever_the_ranks(lives: Path, world: int) -> None:
    model, optimizer = sharded(0)
    learn(model, optimizer, range(3), 0, 1)
    path, _ = newest(lives / f"{world}")
    assert path is not None
    for part, expected in (
        ("model", dict(model.state_dict())),
        ("optimizer", optimizer_tensors(model, optimizer)),
        ("ema", dict(model.named_parameters())),
    ):
        found = load_tensors(path, part)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor.detach().reshape(found[name].shape))
    assert "last.weight" not in load_file(path / "model.safetensors")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("origin", WORLDS)
def test_save_load_save_gives_the_same_bytes_on_any_number_of_ranks(lives: Path, origin: int, world: int) -> None:
    again = content(lives / f"{origin}-{world}" / "step-00000003")
    assert again == content(lives / f"{origin}" / "step-00000003")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("origin", WORLDS)
def test_training_goes_on_alike_on_any_number_of_ranks(lives: Path, origin: int, world: int) -> None:
    model, optimizer = sharded(0)
    learn(model, optimizer, range(5), 0, 1)
    path = lives / f"{origin}-{world}-on" / "step-00000005"
    assert verify(path) is None
    for part, expected in (("model", dict(model.state_dict())), ("optimizer", optimizer_tensors(model, optimizer))):
        found = load_tensors(path, part)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor.reshape(found[name].shape), rtol=1e-4, atol=1e-6)


def full_disk(rank: int, world: int, folder: Path) -> None:
    """Rank 0's disk is full at the first, a middle and the last file; rank 1 must not hang; the next save works."""
    model, optimizer = sharded(world)
    learn(model, optimizer, range(1), rank, world)
    snapshot(folder / "full", 1, model, optimizer, rank)
    for step, name in ((2, ".step-00000002"), (4, "model.safetensors"), (6, "manifest.json")):
        failed = False
        if rank == 0:
            checkpoints.write_checkpoint = failing_at(name)
        try:
            snapshot(folder / "full", step, model, optimizer, rank)
        except RunFailed as error:
            failed = "checkpoint step-00000001 is whole" in str(error)
        told = torch.tensor(float(failed))
        distributed.all_reduce(told)
        assert told == 1
        assert failed == (rank == 0)
    if rank == 0:
        checkpoints.write_checkpoint = WRITE
    snapshot(folder / "full", 7, model, optimizer, rank)


WRITE = checkpoints.write_checkpoint


def failing_at(name: str) -> Callable[..., None]:
    """`write_checkpoint` on a disk that has no room for a name."""

    def write(path: Path, parts: Any, text: str) -> None:
        open_, mkdir = Path.open, Path.mkdir

        def refuse(of: Path) -> None:
            if of.name.startswith((name, f".{name}")):
                raise OSError(28, "No space left on device")

        Path.open = lambda self, *a, **k: (refuse(self), open_(self, *a, **k))[1]  # type: ignore[method-assign]
        Path.mkdir = lambda self, *a, **k: (refuse(self), mkdir(self, *a, **k))[1]  # type: ignore[method-assign]
        try:
            WRITE(path, parts, text)
        finally:
            Path.open, Path.mkdir = open_, mkdir  # type: ignore[method-assign]

    return write


def test_full_disk_of_one_rank_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    on_ranks(full_disk, 2, tmp_path)
    assert names(tmp_path / "full") == ["step-00000001", "step-00000007"]
    assert newest(tmp_path / "full") == (tmp_path / "full" / "step-00000007", [])


# ---------------------------------------------------------------------------------------------- sudden death


def save_on_and_on(folder: Path, first: int, background: bool) -> None:
    writer = Checkpoints(folder, background=background)
    for step in count(first):
        writer.save(step, tiny(step), {"of": step})


@pytest.mark.parametrize("background", [False, True])
def test_death_at_random_moments_leaves_a_sound_checkpoint(tmp_path: Path, background: bool) -> None:
    moments, last = random.Random(0), 1
    save(tmp_path, last)
    for _ in range(6):
        process = fork.Process(target=save_on_and_on, args=(tmp_path, last + 1, background))
        process.start()
        while not (tmp_path / f"step-{last + 2:08d}").exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found, skipped = newest(tmp_path)
        step = step_in(found)
        assert step > last
        assert len(skipped) <= 1
        last = step
