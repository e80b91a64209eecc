"""Checkpoints that are whole or not there, and free of pickle and of the number of ranks.

checkpoints/step-00000120/
    model.safetensors        parameters and buffers by name, wrapper prefixes stripped; shared ones once
    optimizer.safetensors    exp_avg.<name>, exp_avg_sq.<name>, step.<name>; scalars as shape (1,)
    rng.safetensors          generator states, one row a rank
    ema.safetensors          averaged parameters by name, if there are any
    state.json               step, whatever the loop carries from step to step, and aliases: {part: {name: stored name}}
    manifest.json            sha256 of each file above, written last: without it the checkpoint does not count

A save goes: .step-00000120/ with all files, flushed -> renamed to step-00000120 -> manifest -> older ones pruned. Every
name is flushed before the next move builds on it, so a process or a machine that dies leaves this checkpoint or the
one before.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .errors import RunFailed, UserError
from .files import json_text, make_folder, read_json, sha256, sync_folder, write_atomic, write_json
from .restore import LOOP_STATE, bare
from .tensors import Form, Gathering, write_tensors

MANIFEST = "miram.checkpoint/1"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


# ---------------------------------------------------------------------------------------------- writing


class Checkpoints:
    """Writes the checkpoints of a run, and keeps some of them.

    Args:
        folder: where they go.
        keep_last: the newest so many are kept.
        keep_every: steps that are multiples of it are kept for good.
        writes: whether this rank writes; the others only take part in putting tensors together.
        background: copy the tensors to host memory and let a thread write them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        writes: bool = True,
        background: bool = False,
    ):
        assert keep_last > 0
        self.folder, self.keep_last, self.keep_every, self.writes = folder, keep_last, keep_every, writes
        self._writer = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None
        self._sound: dict[str, Stamps] = {}

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step; all ranks must call it, with the same names.

        Args:
            step: optimizer steps taken.
            parts: tensors by name for each file, on any device, whole or in shards (DTensor).
            state: what goes into state.json.

        Raises:
            RunFailed: on the rank that writes: the disk failed, now or in the background write before. The last
                checkpoint is whole.
        """
        gatherings = {part: Gathering({bare(name): t for name, t in parts[part].items()}) for part in sorted(parts)}
        failure = None
        if self.writes:
            try:
                self.wait()
                self._start(step, gatherings, state)
            except RunFailed as error:
                failure = error
        for gathering in gatherings.values():
            gathering.drain()
        if failure:
            raise failure

    def wait(self) -> None:
        """Until the background write is on disk.

        Raises:
            RunFailed: it is not; the checkpoint before it is whole.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _start(self, step: int, gatherings: Mapping[str, Gathering], state: Mapping[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}"
        if verify(path) is None:  # a step has one state, and this is it: not to be put at risk
            return self._prune(path)
        aliases = {part: gathering.aliases for part, gathering in gatherings.items() if gathering.aliases}
        text = json_text(LOOP_STATE, {"step": step, **state, "aliases": aliases})
        parts = {part: Part(gathering.forms, gathering) for part, gathering in gatherings.items()}
        if self._writer is None:
            self._write(path, parts, text)
        else:
            copies = {
                part: Part(forms, [to_host(value) for value in values]) for part, (forms, values) in parts.items()
            }
            self._pending = self._writer.submit(self._write, path, copies, text)

    def _write(self, path: Path, parts: Mapping[str, Part], text: str) -> None:
        try:
            self._clear(path)
            write_checkpoint(path, parts, text)
            self._sound[path.name] = stamps(path)
        except OSError as error:
            with suppress(OSError):
                self._clear(path, ignore_errors=True)
            raise RunFailed(self._failed(path, error)) from error
        self._prune(path)

    def _clear(self, path: Path, ignore_errors: bool = False) -> None:
        """Make room: nothing that was begun and not finished is left, and nothing damaged of this step."""
        for leftover in [*self.folder.glob(".step-*"), path]:
            if leftover.exists():
                shutil.rmtree(leftover, ignore_errors)

    def _failed(self, path: Path, error: OSError) -> str:
        last = None
        with suppress(OSError):
            last, _ = newest(self.folder)
        remains = f"checkpoint {last.name} is whole" if last else "no whole checkpoint was found"
        advice = "free space" if error.errno in FULL else "mend that"
        reason = error.strerror or error
        what = f"the checkpoint of step {step_of(path)} could not be written to {self.folder} ({reason})"
        return f"{what}; {remains}; {advice} and run the same command again"

    def _prune(self, path: Path) -> None:
        """Remove what is older than the last few sound ones.

        Later steps are left alone: a resume skipped them as damaged.
        """
        sound = 0
        with suppress(OSError):  # the checkpoint is whole: what cannot be removed now is tried again next time
            for old in reversed([old for old in checkpoints(self.folder) if step_of(old) <= step_of(path)]):
                if sound < self.keep_last:
                    sound += self._is_sound(old)
                elif not (self.keep_every and step_of(old) % self.keep_every == 0):
                    shutil.rmtree(old, ignore_errors=True)
                    self._sound.pop(old.name, None)

    def _is_sound(self, path: Path) -> bool:
        """Verify a checkpoint, unless its files are those that were written or verified before."""
        try:
            found = stamps(path)
        except OSError:
            return False
        if self._sound.get(path.name) != found:
            if verify(path) is not None:
                return False
            self._sound[path.name] = found
        return True


Stamps = dict[str, tuple[int, int, int]]


def stamps(path: Path) -> Stamps:
    """Inode, size and time of change of each file in a folder: they tell whether one was touched."""
    return {p.name: (s.st_ino, s.st_size, s.st_mtime_ns) for p in path.iterdir() for s in [p.stat()]}


class Part(NamedTuple):
    """What goes into one file: forms by name in the file's order, and the tensors in that order."""

    forms: Mapping[str, Form]
    values: Iterable[Tensor]


def to_host(tensor: Tensor) -> Tensor:
    """A copy that training cannot change."""
    return tensor.to("cpu", copy=True)


def write_checkpoint(path: Path, parts: Mapping[str, Part], text: str) -> None:
    """Write a checkpoint beside its place, rename it there, and seal it with the manifest.

    Raises:
        OSError: the disk failed.
    """
    temporary = path.with_name(f".{path.name}")
    make_folder(path.parent)
    temporary.mkdir()
    digests = {}
    for part, (forms, values) in parts.items():
        digests[f"{part}.safetensors"] = write_tensors(temporary / f"{part}.safetensors", forms, values)
    write_atomic(temporary / "state.json", text)
    digests["state.json"] = sha256(temporary / "state.json")
    sync_folder(temporary)
    temporary.replace(path)
    sync_folder(path.parent)
    write_json(path / "manifest.json", MANIFEST, {"sha256": digests})


# ---------------------------------------------------------------------------------------------- finding


def checkpoints(folder: Path) -> list[Path]:
    """All that look like checkpoints, sound or not, oldest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step a checkpoint was written at."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None if there is none) and a sentence for each one skipped."""
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        fault = verify(path)
        if fault is None:
            return path, skipped
        skipped.append(f"skipped checkpoint {path.name}: {fault}")
    return None, skipped


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint that verifies, 0 if none was ever finished; says which ones are skipped.

    Raises:
        UserError: some were finished, and all are damaged: a run that began anew would in time remove them.
    """
    path, skipped = newest(folder)
    found = checkpoints(folder)
    if path is None and (len(found) > 1 or any((p / "manifest.json").exists() for p in found)):
        raise UserError(
            f"no checkpoint in {folder} is sound ({'; '.join(skipped)}); bring one back, or begin anew in another "
            "--out, or here once that folder is removed"
        )
    for sentence in skipped:
        print(f"miram: {sentence}{'' if path else '; nothing else was saved, so the run begins anew'}")
    return step_of(path) if path else 0


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        return _fault(path)
    except (UserError, OSError) as error:
        return str(error)


def _fault(path: Path) -> str | None:
    manifest = path / "manifest.json"
    if not manifest.exists():
        return "it was not finished (no manifest)"
    digests = read_json(manifest, MANIFEST).get("sha256")
    if not isinstance(digests, dict) or manifest.read_text() != json_text(MANIFEST, {"sha256": digests}):
        return "its manifest is damaged"
    for name, digest in digests.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} does not match its sha256"
    return None
