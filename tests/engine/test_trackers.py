"""What reaches the trackers: tensorboard's own reader for tensorboard, modules that take notes for the other three.

The notes are of the calls that Accelerate's tracker classes make on wandb 0.31, mlflow 3.17 and trackio 0.43.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from miram.engine.errors import UserError
from miram.engine.launch import make_accelerator
from miram.engine.trackers import require_installed, shareable, start_trackers

LINES = [{"step": n, "loss": 1 / n, "loss/1": 2.0 * n, "lr": 1e-4, "said": "no number"} for n in range(1, 7)]
CONFIG = {
    "seed": 3,
    "out": "runs/lastname",
    "data": {"shards": ["secret-shards"], "task": "secret-task"},
    "init": "secret.pth",
    "monitor": {"shards": "secret-monitor"},
    "model": {
        "encoder": "hf-hub:secret/vit",
        "mask_ratio": 0.75,
        "scales": [{"scale": 1}, {"scale": 2, "depth": None}],
    },
    "train": {"steps": 6, "betas": (0.9, 0.95), "compile": False},
}
SHARED = {
    "seed": 3,
    "model.mask_ratio": 0.75,
    "model.scales.0.scale": 1,
    "model.scales.1.scale": 2,
    "model.scales.1.depth": None,
    "train.steps": 6,
    "train.betas": "(0.9, 0.95)",
    "train.compile": False,
}

# What all three stand-ins share: a list of (what, arguments) that a test reads, and a switch that breaks a call.
NOTES = """
notes, broken = [], None
def note(what, *args, **kwargs):
    notes.append((what, args, kwargs))
    if what == broken:
        raise ConnectionError("no route to the server\\nat all")
"""
RUN = """
class Run:
    def log(self, values, step): note("log", values, step)
    def finish(self): note("finish")
class Config:
    def update(self, values, **_): note("config", values)
config = Config()
def init(**kwargs):
    note("init", **kwargs)
    return Run()
"""
MLFLOW = """
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 500, 100
def search_experiments(**_): return []
def create_experiment(**kwargs): note("experiment", **kwargs)
def start_run(**kwargs): note("init", **kwargs)
def log_params(values): note("config", values)
def log_metrics(values, step): note("log", values, step)
def end_run(): note("finish")
"""
REMOTE = ("wandb", "mlflow", "trackio")


@pytest.fixture(autouse=True)
def accelerator() -> None:
    """The trackers of Accelerate ask it for the rank."""
    make_accelerator()


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Stand-ins in place of the three packages; gives the module by name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in REMOTE:
        (folder / f"{name}.py").write_text(NOTES + (MLFLOW if name == "mlflow" else RUN))
        monkeypatch.delitem(sys.modules, name, raising=False)
    for variable in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS", "MLFLOW_NESTED_RUN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(folder)
    yield __import__
    for name in REMOTE:
        sys.modules.pop(name, None)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each curve, as tensorboard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def log(folder: Path, names: tuple[str, ...], first: int, last: int, resumed_step: int = 0) -> None:
    trackers = start_trackers(names, folder, "miram", CONFIG, main=True, resumed_step=resumed_step)
    for line in LINES[first - 1 : last]:
        trackers.log(line)  # type: ignore[arg-type]
    trackers.close()


def test_tensorboard_shows_the_numbers_of_every_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log(tmp_path, ("tensorboard",), 1, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["tracking"]
    (file,) = (tmp_path / "tracking").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    found = scalars(tmp_path / "tracking")
    assert found.keys() == {"loss", "loss/1", "lr"}
    for tag, curve in found.items():
        assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in curve] == pytest.approx([line[tag] for line in LINES], rel=1e-6)


@pytest.mark.parametrize("checkpoint", [0, 2, 4])
def test_tensorboard_shows_a_step_once_where_a_run_went_on_from_a_checkpoint(tmp_path: Path, checkpoint: int) -> None:
    pytest.importorskip("tensorboard")
    log(tmp_path, ("tensorboard",), 1, 4)
    log(tmp_path, ("tensorboard",), checkpoint + 1, 6, resumed_step=checkpoint)
    assert [step for step, _ in scalars(tmp_path / "tracking")["loss"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", REMOTE)
def test_others_are_told_settings_numbers_and_steps(notes: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    log(tmp_path / "lastname", (name,), 1, 3)
    told = notes(name).notes
    assert [what for what, *_ in told if what != "experiment"] == ["init", "config", "log", "log", "log", "finish"]
    assert next(args[0] for what, args, _ in told if what == "config") == SHARED
    one = "loss.1" if name == "mlflow" else "loss/1"
    expected = [({"loss": line["loss"], one: line["loss/1"], "lr": line["lr"]}, line["step"]) for line in LINES[:3]]
    assert [args for what, args, _ in told if what == "log"] == expected


@pytest.mark.parametrize("name", REMOTE)
def test_nothing_about_data_or_places_is_told(notes: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "secret-hospital" / "lastname"
    log(folder, (name,), 1, 6)
    told = [(what, args, {k: v for k, v in kwargs.items() if k != "dir"}) for what, args, kwargs in notes(name).notes]
    assert "lastname" in repr(told)
    assert "secret" not in repr(told)


def test_wandb_is_told_to_add_nothing_of_the_machine(notes: Callable[[str], Any], tmp_path: Path) -> None:
    log(tmp_path, ("wandb",), 1, 1)
    options = notes("wandb").notes[0][2]
    assert Path(options["dir"]) == tmp_path / "tracking"  # a place on this machine, where wandb keeps its files
    settings = options["settings"]
    assert settings["console"] == "off"
    assert settings["host"] == ""
    assert settings["x_save_requirements"] is False
    off = ("disable_code", "disable_git", "x_disable_meta", "x_disable_machine_info", "x_disable_stats")
    assert all(settings[name] is True for name in off)


def test_trackio_stays_private_and_measures_no_machine(notes: Callable[[str], Any], tmp_path: Path) -> None:
    log(tmp_path, ("trackio",), 1, 1)
    options = notes("trackio").notes[0][2]
    assert (options["private"], options["auto_log_gpu"], options["auto_log_cpu"]) == (True, False, False)


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_goes_on_under_its_name_and_another_gets_its_own(
    notes: Callable[[str], Any], tmp_path: Path, name: str, key: str
) -> None:
    for parent in ("one", "one", "two"):
        log(tmp_path / parent / "demo", (name,), 1, 1)
    starts = [kwargs for what, _, kwargs in notes(name).notes if what == "init"]
    first, again, other = (start[key] for start in starts)
    assert first == again
    assert first != other
    assert all(start["resume"] == "allow" for start in starts)


@pytest.mark.parametrize(("broken", "reached"), [("init", 0), ("config", 0), ("log", 1), ("finish", 6)])
def test_one_that_fails_says_so_once_and_the_training_goes_on(
    notes: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str, reached: int
) -> None:
    notes("wandb").broken = broken
    log(tmp_path, ("wandb", "mlflow"), 1, 6)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("miram: wandb failed and is told nothing more")
    assert "ConnectionError: no route to the server" in said
    assert sum(what == "log" for what, *_ in notes("wandb").notes) == reached
    ends = sum(what == "finish" for what, *_ in notes("wandb").notes)
    assert ends == (broken != "init")  # a later training of this process finds nothing open
    assert sum(what == "log" for what, *_ in notes("mlflow").notes) == 6


@pytest.mark.parametrize("folder", [True, False])
def test_a_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    name = "tracker_that_is_not_there"
    monkeypatch.syspath_prepend(tmp_path)
    if folder:  # wandb leaves a folder of its name where it is run
        (tmp_path / name).mkdir()
    for main in (True, False):  # all ranks refuse alike, or the others would wait
        with pytest.raises(UserError) as refused:
            start_trackers((name,), tmp_path / "run", "miram", CONFIG, main=main)
        assert str(refused.value) == f"train.trackers: {name} is not installed; pip install {name}"
    assert not (tmp_path / "run").exists()
    require_installed(("json",))


def test_other_ranks_write_and_tell_nothing(notes: Callable[[str], Any], tmp_path: Path) -> None:
    trackers = start_trackers(REMOTE, tmp_path / "run", "miram", CONFIG, main=False)
    trackers.log(LINES[0])  # type: ignore[arg-type]
    trackers.close()
    assert not (tmp_path / "run").exists()
    assert not any(notes(name).notes for name in REMOTE)


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    start_trackers((), tmp_path / "run", "miram", CONFIG, main=True).log({"step": 1, "loss": 0.5})
    assert not (tmp_path / "run").exists()


def test_of_a_real_configuration_no_place_is_shareable() -> None:
    from miram.pretrain.config import PretrainConfig

    config = PretrainConfig(out="/secret/out", init="/secret/init.pth", data={"shards": "/secret"}, train={"steps": 5})
    shared = shareable(config.model_dump())
    assert shared["train.steps"] == 5
    assert shared["model.encoder"] == "vit_small_patch16_224"
    assert "secret" not in json.dumps(shared)
    assert {key.split(".")[0] for key in shared}.isdisjoint({"out", "init", "data", "monitor"})
