"""Figures of a run sent to where people compare runs: tensorboard, wandb, mlflow and trackio, by name.

RUN/tracking/events.out.tfevents.*   tensorboard's
RUN/tracking/wandb/                  wandb's; what it wrote offline waits here for `wandb sync`
RUN/tracking/identity.json           the name under which wandb and trackio take a run up again

mlflow and trackio write where their own environment variables say (MLFLOW_TRACKING_URI, TRACKIO_DIR), by default
on this machine. Accelerate's tracker classes do the talking: they are made here and not by `Accelerator(log_with=...)`,
because the Accelerator is older than the run folder, and because several options below matter.

**What leaves the machine**, always with wandb, with mlflow or trackio when they are pointed at a server: the numbers
of each line of metrics.jsonl (step, losses, learning rate, gradient norm, speed, memory, monitors' figures, how many
files were damaged), the settings that `shareable` lets through, and the run folder's last name. Never images, ids,
names of files, nor where the data are. wandb is told not to add host name, command line, code, git remote, list of
packages, console output or machine load, as it does by itself; mlflow adds the account's name.

A run that is taken up again logs the lines after its checkpoint again. tensorboard forgets the older ones. wandb goes
on with the same run and ignores steps it has seen, whose figures are the same. trackio goes on with the same run and
keeps both lines. mlflow starts another run of the same name at each start;
it is told loss.1 for loss/1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from .errors import UserError, one_line
from .files import read_json, write_json

IDENTITY = "miram.tracking/1"
SHARED = ("seed", "objective", "crop", "pair", "model", "moco", "train")  # sections without a place or a name in them
QUIET_WANDB = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": "",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
Setting = str | int | float | bool | None


class Trackers:
    """The trackers of a run. One that fails says so once and is left alone until the next start."""

    def __init__(self) -> None:
        self._trackers: dict[str, GeneralTracker] = {}
        self._lost: set[str] = set()

    def start(self, name: str, make: Callable[[], GeneralTracker], config: Mapping[str, Setting]) -> None:
        """Begin with one more tracker, and tell it the configuration."""

        def begin() -> None:
            tracker = make()
            tracker.start()
            self._trackers[name] = tracker  # from here on there is something to end
            if name != "tensorboard":  # it would make a run of its own of them; config.yaml lies beside its files
                tracker.store_init_configuration(dict(config))

        self._try(name, begin)

    def log(self, line: Mapping[str, float]) -> None:
        """Send the numbers of a line of metrics, at its step."""
        step = int(line["step"])
        values = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        for name, tracker in self._trackers.items():
            # mlflow's store of files cannot hold both loss and loss/1: one would be a file, the other in a folder.
            told = {k.replace("/", "."): v for k, v in values.items()} if name == "mlflow" else values
            self._try(name, lambda tracker=tracker, told=told: tracker.log(told, step=step))  # type: ignore[misc]

    def close(self) -> None:
        """Send what is under way, and end; those that failed, too, since a process may train more than once."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            if name in self._lost:
                with suppress(Exception):
                    tracker.finish()
            else:
                self._try(name, tracker.finish)

    def _try(self, name: str, do: Callable[[], None]) -> None:
        """Whatever a tracker comes to grief on, the training is worth more."""
        if name in self._lost:
            return
        try:
            do()
        except Exception as error:
            self._lost.add(name)
            why = one_line(f"{type(error).__name__}: {error}")
            said = f"miram: {name} failed and is told nothing more; metrics.jsonl has every line ({why})"
            print(said, file=sys.stderr, flush=True)


def start_trackers(
    names: Iterable[str], folder: Path, project: str, config: Mapping[str, Any], main: bool, resumed_step: int = 0
) -> Trackers:
    """Trackers by name, on the main process; on the others an empty set of them.

    Args:
        names: among tensorboard, wandb, mlflow and trackio.
        folder: the run's; its last name becomes the run's name.
        project: what runs are gathered under.
        config: resolved configuration; only `shareable` settings are told.
        main: whether this is the main process.
        resumed_step: the step of the checkpoint that the training goes on from.

    Raises:
        UserError: the package of one is missing; nothing has been written.
    """
    names = tuple(dict.fromkeys(names))
    require_installed(names)
    trackers = Trackers()
    if main and names:
        tracking = folder / "tracking"
        run = folder.resolve().name
        for name in names:
            trackers.start(name, lambda name=name: _make(name, tracking, project, run, resumed_step), shareable(config))  # type: ignore[misc]
    return trackers


def require_installed(names: Iterable[str]) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        UserError: it is.
    """
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as ./wandb, is no package
            raise UserError(f"train.trackers: {name} is not installed; pip install {name}")


def shareable(config: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings a tracker may know, by their full key: how is trained, never where anything lies."""
    flat = _flat({name: config[name] for name in SHARED if name in config})
    return {k: v for k, v in flat.items() if not (isinstance(v, str) and ("/" in v or "\\" in v))}


def _flat(tree: Any, prefix: str = "") -> dict[str, Setting]:
    """Settings by full key; a list of sections is numbered, any other list becomes text."""
    if isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, Mapping):
        return {k: v for name, part in tree.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
    value = tree if isinstance(tree, Setting) else str(tree)
    return {prefix.removesuffix("."): value}


def _make(name: str, tracking: Path, project: str, run: str, resumed_step: int) -> GeneralTracker:
    tracking.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        return TensorBoardTracker("", str(tracking), purge_step=resumed_step + 1)
    if name == "mlflow":
        return MLflowTracker(project, run_name=run, tags={"mlflow.source.name": "miram"})  # not the path of the program
    identity = _identity(tracking / "identity.json")
    if name == "wandb":
        options: dict[str, Any] = {"id": identity, "resume": "allow", "dir": str(tracking)}
        return WandBTracker(project, name=run, settings=QUIET_WANDB, **options)
    assert name == "trackio", name
    # What goes to a Hugging Face Space would be public unless asked otherwise.
    options = {"resume": "allow", "private": True, "auto_log_gpu": False, "auto_log_cpu": False}
    return TrackioTracker(project, name=f"{run}-{identity}", **options)


def _identity(path: Path) -> str:
    """The same at every start of a run, another one for every run."""
    if not path.exists():
        write_json(path, IDENTITY, {"id": uuid4().hex[:8]})
    return str(read_json(path, IDENTITY)["id"])
