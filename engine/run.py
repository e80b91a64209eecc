"""The run folder, the same for every stage.

RUN/config.yaml              resolved configuration; compared when the run is taken up again
RUN/state.json               running, finished, preempted or failed, and why
RUN/metrics.jsonl            one object a logged step, flushed line by line
RUN/checkpoints/step-…/      see checkpoint.py
RUN/encoder.safetensors      pretraining's product, with encoder.json beside it
RUN/result.json              an evaluation's figures
RUN/figures/*.png            pictures, with captions.json; in steps/ those of earlier steps
RUN/report.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from .config import Section, dump_yaml, parse_yaml
from .errors import Preempted, UserError, one_line
from .files import locked, read_json, write_atomic, write_json

STATE = "miram.state/1"
RESULT = "miram.result/1"
CAPTIONS = "miram.captions/1"
INPUTS = "miram.inputs/1"
Status = Literal["running", "finished", "preempted", "failed"]

# Settings that may change between a run and its continuation: none of them can change a figure beyond rounding.
FREE = {
    "out",
    "data.workers",
    "data.cache_mb",
    "model.checkpointing",
    "model.scales.*.checkpointing",
    "monitor.*",
    "train.micro_batch",
    "train.parallel",
    "train.log_every",
    "train.trackers",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.checkpoint_async",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.stall_seconds",
    "train.profile_steps",
}


@dataclass(frozen=True)
class Run:
    """A run folder that is known to belong to this configuration."""

    folder: Path
    stage: str

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether an earlier start of the same command reached its end."""
        path = self.folder / "state.json"
        return path.exists() and read_json(path, STATE)["status"] == "finished"

    def mark(self, status: Status, reason: str = "") -> None:
        """Write what became of the run; launchers hide exit codes, this file does not."""
        write_json(self.folder / "state.json", STATE, {"stage": self.stage, "status": status, "reason": reason})

    @contextmanager
    def recorded(self, writes: bool = True) -> Iterator[None]:
        """Keep state.json true: running inside, then finished, preempted or failed. Only the rank that writes does.

        Raises:
            UserError: another process is at work in the folder.
        """
        if not writes:
            yield
            return
        said = f"another process is at work in {self.folder}; wait for it or choose another --out"
        with locked(self.folder / ".lock", said):
            yield from self._record()

    def _record(self) -> Iterator[None]:
        self.mark("running")
        try:
            yield
        except Preempted as stop:
            self.mark("preempted", str(stop))
            raise
        except KeyboardInterrupt:
            self.mark("failed", "interrupted; the checkpoints are kept")
            raise
        except BaseException as error:
            self.mark("failed", one_line(f"{type(error).__name__}: {error}"))
            raise
        self.mark("finished")

    def result(self, content: Mapping[str, Any]) -> None:
        """Write an evaluation's figures."""
        write_json(self.folder / "result.json", RESULT, {"stage": self.stage, **content})

    def caption(self, captions: Mapping[str, str]) -> Path:
        """Write the figures' captions and return the folder they go to."""
        figures = self.folder / "figures"
        write_json(figures / "captions.json", CAPTIONS, dict(captions))
        return figures


def open_run(
    config: Section, folder: str, stage: str, inputs: Mapping[str, str] | None = None, *, writes: bool = True
) -> Run:
    """Create the run folder, or take up the one that is there if configuration and inputs are the same.

    Args:
        config: the resolved configuration.
        folder: where the run goes.
        stage: what kind of run it is.
        inputs: digests of what it reads, by name.
        writes: false: only say whether it would be refused.

    Raises:
        UserError: the folder holds something else, or a run whose configuration or inputs differ.
    """
    run = Run(Path(folder), stage)
    saved = run.folder / "config.yaml"
    if saved.is_file():
        _same_config(config, saved)
        _same_inputs(inputs or {}, run.folder / "inputs.json")
    elif run.folder.is_dir() and any(not _ours(path) for path in run.folder.iterdir()):
        raise UserError(f"{folder} is not empty and is no run; choose another --out or empty it")
    elif run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    elif writes:
        _begin(saved, config, inputs or {})
    return run


def _ours(path: Path) -> bool:
    """What a start that was killed at once may have left."""
    return path.name.startswith(".") or path.name == "inputs.json"


def _begin(saved: Path, config: Section, inputs: Mapping[str, str]) -> None:
    try:
        write_json(saved.with_name("inputs.json"), INPUTS, inputs)
        write_atomic(saved, dump_yaml(config))  # last: it is what makes the folder a run
    except OSError as error:
        raise UserError(f"{saved.parent} cannot be written ({error.strerror}); choose another --out") from error


def _same_config(config: Section, saved: Path) -> None:
    before, now = (_flat(parse_yaml(saved.read_text(), str(saved))), _flat(parse_yaml(dump_yaml(config), "config")))
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not _free(k))
    if differing:
        changes = ", ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{saved.parent} was started with another configuration ({changes}{more}); choose another --out, or go on "
            f"with its own, {saved}"
        )


def _free(key: str) -> bool:
    return any(fnmatchcase(key, free) for free in FREE)


def _same_inputs(inputs: Mapping[str, str], saved: Path) -> None:
    before = read_json(saved, INPUTS)
    changed = [name for name, digest in inputs.items() if before.get(name) != digest]
    if changed:
        raise UserError(
            f"the {' and the '.join(changed)} changed since {saved.parent} was started; choose another --out"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, part in tree.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return {k: v for i, part in enumerate(tree) for k, v in _flat(part, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): tree}


class MetricsFile:
    """`metrics.jsonl`: appended line by line, cut back to the checkpoint when a run is taken up again."""

    def __init__(self, path: Path, resumed_step: int, writes: bool = True):
        self.path, self.resumed_step, self.writes = path, resumed_step, writes

    def __enter__(self) -> MetricsFile:
        if self.writes:
            before = read_metrics(self.path) if self.path.exists() else []
            kept = [json.dumps(line) + "\n" for line in before if line["step"] <= self.resumed_step]
            write_atomic(self.path, "".join(kept))
            self._file = self.path.open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self._file.close()

    def sync(self) -> None:
        """All lines so far survive a power cut, as the checkpoint that is about to be written will."""
        if self.writes:
            os.fsync(self._file.fileno())

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line; it is on its way to disk when this returns."""
        if self.writes:
            self._file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut short by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
