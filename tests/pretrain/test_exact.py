"""A pretraining that is killed and started again ends in the bytes of one that never was; on other ranks, but for
rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forked import (
    FREELY,
    assert_same_end,
    files,
    finish,
    kill,
    killed_at,
    last_checkpoint,
    metrics,
    order,
    start,
    writing,
)
from safetensors.torch import load_file

from miram.engine import loss_scale, restore

# All that carries something from step to step, or draws at random. 24 samples in batches of 8: an epoch is 3 steps.
FULL = [
    "--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3, proj_drop_rate: 0.2}",
    "--model.scales.0.attention=performer",
    "--model.scales.0.options={num_features: 16, redraw_every: 3}",
    "--model.tissue_loss=0.7",
    "--train.ema=0.9",
    "--train.clip_grad=0.7",
    "--train.steps=10",
    "--train.checkpoint_every=2",
    "--train.log_every=3",
    "--monitor.images=12",
    "--monitor.pictures=2",
]
CUTS: dict[str, tuple[int, dict[str, Any], int]] = {  # step a micro-batch is taken for, how, and where it goes on
    "mid-accumulation": (3, {"micro": 1}, 2),
    "mid-epoch": (5, {"micro": 0}, 4),
    "at an epoch's end": (6, {"micro": 0}, 6),
    "mid-save": (8, {}, 6),
}


@pytest.fixture(scope="session")
def full(tiny: list[str]) -> list[str]:
    return [*tiny, *FULL]


def cut(folder: Path, place: str, arguments: list[str], world: int) -> None:
    """Start, and strike one rank at a place: the last one, or the one that writes."""
    step, where, _ = CUTS[place]
    if where:
        ended = start(folder, arguments, world=world, taking=killed_at(step, rank=world - 1, **where))
        assert ended[-1] is None
    else:
        ended = start(folder, arguments, world=world, spoil=writing("optimizer", step, kill))
        assert ended[0] is None
        torn = folder / f"run/checkpoints/.step-{step:08d}/optimizer.safetensors"
        assert torn.stat().st_size > 0
    assert all(getattr(end, "code", 1) != 0 for end in ended)
    assert '"running"' in (folder / "run/state.json").read_text() or world > 1


def resumed(folder: Path, place: str, arguments: list[str], world: int, **how: Any) -> None:
    """To the end, from where a cut at a place must have left it."""
    said = finish(folder, arguments, world=world, **how).out
    assert f"going on from step {CUTS[place][2]} of 10" in said
    assert "elsewhere" not in said


def split(arguments: list[str], world: int, workers: int) -> list[str]:
    """Two micro-batches a rank and step."""
    return [*arguments, f"--train.micro_batch={4 // world}", f"--data.workers={workers}"]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_run_killed_at_four_places_in_turn_ends_in_the_same_bytes(
    world: int, workers: int, full: list[str], tmp_path: Path
) -> None:
    arguments = split(full, world, workers)
    finish(tmp_path / "calm", arguments, world=world)
    for place in CUTS:
        cut(tmp_path / "killed", place, arguments, world)
    resumed(tmp_path / "killed", "mid-save", arguments, world)
    assert_same_end(tmp_path / "killed", tmp_path / "calm")


@pytest.fixture(scope="module")
def calm(full: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Undisturbed runs by number of ranks."""
    folder = tmp_path_factory.mktemp("exact")
    for world in (1, 2):
        finish(folder / str(world), split(full, world, 0), world=world)
    return {world: folder / str(world) for world in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("place", CUTS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_ends_in_the_same_bytes(
    world: int, workers: int, place: str, calm: dict[int, Path], full: list[str], tmp_path: Path
) -> None:
    """Those of a run without workers, too."""
    arguments = split(full, world, workers)
    cut(tmp_path, place, arguments, world)
    resumed(tmp_path, place, arguments, world)
    assert_same_end(tmp_path, calm[world], but=FREELY)


# ---------------------------------------------------------------------------------------------- other objectives, fp16


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2)])
@pytest.mark.slow
def test_a_killed_fp16_run_goes_on_at_the_same_loss_scale(
    world: int, workers: int, full: list[str], tmp_path: Path
) -> None:
    """The scale doubles after two good steps and is halved by each overflow: it never rests."""

    def restless(rank: int) -> None:
        loss_scale.GROW_AFTER = 2

    def restless_and_killed(rank: int) -> None:
        restless(rank)
        writing("ema", 6, kill)(rank)

    arguments = [*split(full, world, workers), "--train.precision=fp16", "--train.log_every=1", "--train.clip_grad=1e4"]
    arguments += ["--model.scales.0.weight=1000"]
    finish(tmp_path / "calm", arguments, world=world, spoil=restless)
    ended = start(tmp_path / "killed", arguments, world=world, spoil=restless_and_killed)
    assert ended[0] is None
    assert (tmp_path / "killed/run/checkpoints/.step-00000006/ema.safetensors").exists()
    said = finish(tmp_path / "killed", arguments, world=world, spoil=restless).out
    assert "going on from step 4 of 10" in said
    assert_same_end(tmp_path / "killed", tmp_path / "calm")
    lines = metrics(tmp_path / "calm")
    assert len({line["loss_scale"] for line in lines[4:]}) > 1
    assert {"overflowed_steps" in line for line in lines[4:]} == {True, False}


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 2)])
@pytest.mark.slow
def test_a_killed_moco_v3_run_ends_in_the_same_bytes(world: int, workers: int, tiny: list[str], tmp_path: Path) -> None:
    """Batch norm's statistics and the slow copy are part of where it stands."""
    arguments = [*tiny, *(option for option in FULL if "scales" not in option and "tissue" not in option)]
    arguments += ["--objective=moco_v3", "--moco.hidden=32", "--moco.dim=8", f"--data.workers={workers}"]
    finish(tmp_path / "calm", arguments, world=world)
    start(tmp_path / "killed", arguments, world=world, taking=killed_at(5, 0, world - 1))
    said = finish(tmp_path / "killed", arguments, world=world).out
    assert "going on from step 4 of 10" in said
    assert_same_end(tmp_path / "killed", tmp_path / "calm")
    names = load_file(last_checkpoint(tmp_path / "calm") / "model.safetensors")
    assert any("running_var" in name for name in names)
    assert any("momentum_encoder" in name for name in names)


# ---------------------------------------------------------------------------------------------- ranks and micro-batches

LOSSES = 7e-5  # relative, the norm of the gradient among them; measured at most 7e-6
WEIGHTS = 2e-5  # of the norm of a matrix after ten steps; measured at most 2e-6


def assert_close(found: Path, expected: Path) -> None:
    """The same samples in the same global batches, losses and weights equal to rounding.

    Vectors are not compared: the keys' bias has no gradient but rounding, which Adam blows up to full steps.
    """
    assert order(found) == order(expected)
    for line, other in zip(metrics(found), metrics(expected), strict=True):
        assert line == pytest.approx(other, rel=LOSSES)
    for part in ("model", "ema"):
        one, two = (restore.load_tensors(last_checkpoint(folder), part) for folder in (found, expected))
        assert one.keys() == two.keys()
        matrices = [name for name in one if one[name].ndim > 1]
        assert max(((one[k] - two[k]).norm() / two[k].norm()).item() for k in matrices) < WEIGHTS


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)],
)
def test_on_another_number_of_ranks_a_run_goes_on_with_the_same_batches(
    before: int, after: int, calm: dict[int, Path], full: list[str], tmp_path: Path
) -> None:
    cut(tmp_path, "mid-epoch", split(full, before, 0), before)
    said = finish(tmp_path, [*full, "--data.workers=0"], world=after).out
    assert "going on from step 4 of 10" in said
    assert f"(ranks {before} -> {after}" in said
    assert "equal to rounding, not to the bit" in said
    assert_close(tmp_path, calm[before])


TISSUE = ["--model.tissue_loss=1", "--model.scales.0.loss_on=masked", "--model.scales.1.loss_on=masked"]
TILES = [
    *TISSUE,
    "--model.image_size=64",
    "--model.scales.1.decode_fraction=0.5",
    "--model.scales.1.options={num_landmarks: 4}",
]
WAYS = [(1, 4), (1, 2), (1, 1), (2, 4), (2, 1)]


@pytest.mark.parametrize(
    ("loss", "world", "micro_batch"),
    [
        pytest.param(loss, *way, marks=() if (loss, way) == ("tiles", (2, 1)) else pytest.mark.slow)
        for loss in ("tissue", "tiles")
        for way in WAYS
    ],
)
def test_every_way_of_cutting_a_batch_gives_the_same_losses(
    loss: str, world: int, micro_batch: int, full: list[str], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Losses of hidden patches weighted by tissue, of which every sample has another share."""
    arguments = [*full, *(TISSUE if loss == "tissue" else TILES), "--train.log_every=1"]
    whole = tmp_path_factory.getbasetemp() / f"whole-{loss}"
    if not whole.exists():
        finish(whole, arguments)
    finish(tmp_path, [*arguments, f"--train.micro_batch={micro_batch}"], world=world)
    assert_close(tmp_path, whole)


def test_a_batch_that_does_not_divide_among_ranks_is_refused_and_leaves_nothing(
    full: list[str], tmp_path: Path
) -> None:
    for world, option in ((2, "--train.batch_size=9"), (2, "--train.micro_batch=8"), (1, "--train.micro_batch=3")):
        ended = start(tmp_path, [*full, option], world=world)
        assert [end.code for end in ended] == [2] * world
        assert option[2:] in ended[0].err or "train.batch_size=8" in ended[0].err
        assert f"no multiple of {world} ranks" in ended[0].err
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- another configuration


@pytest.fixture(scope="module")
def unfinished(full: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("unfinished")
    start(folder, [*full, "--train.micro_batch=4"], taking=killed_at(5, 0, 0))
    return folder


RESULT = {
    "train.blr": "0.02",
    "train.ema": "0.8",
    "train.precision": "bf16",
    "train.steps": "11",
    "train.batch_size": "4",
    "train.clip_grad": "null",
    "train.deterministic": "true",
    "model.mask_ratio": "0.6",
    "model.scales.1.weight": "2",
    "model.encoder_options.drop_path_rate": "0.1",
    "crop.flip": "false",
    "seed": "1",
}


def test_a_run_is_not_taken_up_with_settings_that_change_its_result(full: list[str], unfinished: Path) -> None:
    before = files(unfinished)
    for key, value in RESULT.items():
        (ended,) = start(unfinished, [*full, "--train.micro_batch=4", f"--{key}={value}"])
        assert ended.code == 2, key
        assert f"{key} was" in ended.err
        assert len(ended.err.strip().splitlines()) == 1
    several = [f"--{key}={value}" for key, value in list(RESULT.items())[:3]]
    (ended,) = start(unfinished, [*full, "--train.micro_batch=4", *several])
    assert all(f"{key} was" in ended.err for key in list(RESULT)[:3])
    assert files(unfinished) == before


HARMLESS = [
    "--data.workers=2",
    "--data.cache_mb=1",
    "--model.checkpointing=true",
    "--model.scales.1.checkpointing=true",
    "--monitor.every=3",
    "--monitor.images=8",
    "--train.checkpoint_async=true",
    "--train.checkpoint_every=3",
    "--train.checkpoint_minutes=0.001",
    "--train.keep_checkpoints=5",
    "--train.keep_every=4",
    "--train.log_every=1",
    "--train.stall_seconds=20",
    "--train.trackers=[tensorboard]",
]


def test_a_run_is_taken_up_with_settings_that_change_nothing(
    full: list[str], calm: dict[int, Path], tmp_path: Path
) -> None:
    """And ends in the same bytes."""
    cut(tmp_path, "mid-epoch", split(full, 1, 0), 1)
    resumed(tmp_path, "mid-epoch", [*split(full, 1, 0), *HARMLESS], 1)
    found, expected = files(tmp_path), files(calm[1])
    same = [name for name in expected if name.startswith("checkpoints/step-00000010/") or name == "encoder.safetensors"]
    assert len(same) == 7
    assert [name for name in same if found[name] != expected[name]] == []
    assert order(tmp_path) == order(calm[1])
    steps = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert {"step-00000004", "step-00000006", "step-00000009", "step-00000010"} <= set(steps)
    assert [line["step"] for line in metrics(tmp_path)] == [3, *range(5, 11)]
    assert [line["step"] for line in metrics(tmp_path) if "rankme" in line] == [6, 9, 10]
    assert metrics(tmp_path)[-1]["loss"] == metrics(calm[1])[-1]["loss"]
