"""A disk that fails, at any byte and any operation: nothing sound is lost, nothing is left behind, and it is said."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miram.engine.checkpoint import Checkpoints, newest
from miram.engine.errors import RunFailed
from miram.engine.restore import load_tensors, read_state

fork = multiprocessing.get_context("fork")
Parts = dict[str, dict[str, Tensor]]


def parts(step: int, size: int = 20) -> Parts:
    noise = torch.Generator().manual_seed(step)
    return {part: {part: torch.randn(size, generator=noise)} for part in ("model", "optimizer", "rng")}


def save(folder: Path, step: int, size: int = 20, background: bool = False) -> None:
    writer = Checkpoints(folder, keep_last=1, background=background)
    writer.save(step, parts(step, size), {"of": step})
    writer.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_step(folder: Path, step: int, size: int = 20) -> bool:
    """Whether a step is the newest and, tensor by tensor, what was saved."""
    path, skipped = newest(folder)
    assert path is not None
    assert skipped == []
    same = all(torch.equal(load_tensors(path, p)[p], ts[p]) for p, ts in parts(step, size).items())
    return same and read_state(path) == {"step": step, "of": step}


def fails(folder: Path, step: int, reason: str, size: int = 20, background: bool = False) -> None:
    """The save says which step, why and what is whole; the folder is as it was."""
    before = contents(folder)
    with pytest.raises(RunFailed) as failure:
        save(folder, step, size, background)
    said = str(failure.value)
    assert f"checkpoint of step {step} could not be written" in said
    assert reason in said
    assert "checkpoint step-00000001 is whole" in said
    assert "run the same command again" in said
    assert "\n" not in said
    assert contents(folder) == before
    assert names(folder) == ["step-00000001"]


# ---------------------------------------------------------------------------------------------- stand-ins


class Full(io.FileIO):
    """A file on a disk with so many bytes left."""

    left = 0

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")[: Full.left]
        if not content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Full.left -= len(content)
        return super().write(content)


@contextmanager
def room(left: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def open_file(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return io.BufferedWriter(Full(path, "wb")) if mode == "wb" else real(path, mode, *arguments, **options)

    real, Full.left = io.open, left
    with monkeypatch.context() as patched:
        patched.setattr(io, "open", open_file)
        yield


@pytest.mark.parametrize("background", [False, True])
def test_disk_that_is_full_after_any_byte_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    save(tmp_path, 1)
    size = sum(map(len, contents(tmp_path).values()))
    for left in [*range(0, size, 11), size - 1]:
        with room(left, monkeypatch):
            fails(tmp_path, 2, "No space left on device", background=background)
    with room(size, monkeypatch):  # the very last byte fits
        save(tmp_path, 2, background=background)
    assert is_step(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002"]


def failing(operation: Callable[..., Any], at: int, lasting: bool) -> Callable[..., Any]:
    """The operation, but its n-th call fails, or all from that one on."""
    calls = count(1)

    def broken(*arguments: Any, **options: Any) -> Any:
        call = next(calls)
        if call == at or (lasting and call > at):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return operation(*arguments, **options)

    return broken


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(("operation", "calls"), [("mkdir", 1), ("fsync", 10), ("replace", 3)])
def test_any_operation_that_fails_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, calls: int, lasting: bool
) -> None:
    failures = []
    for at in range(1, 16):
        folder = tmp_path / str(at)
        save(folder, 1)
        left = 2
        with monkeypatch.context() as patched:
            patched.setattr(os, operation, failing(getattr(os, operation), at, lasting))
            try:
                save(folder, 2)  # (to be told that a folder cannot be made does no harm if it is there)
            except RunFailed as failure:
                failures.append(str(failure))
                left = 1
        assert is_step(folder, left)
        assert names(folder) == [f"step-{left:08d}"]
    assert len(failures) >= calls
    for said in failures:
        assert "step 2 could not be written" in said
        assert "(Input/output error); checkpoint step-00000001 is whole; mend that" in said


def test_first_checkpoint_that_fails_says_that_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with room(100, monkeypatch), pytest.raises(RunFailed, match=r"step 1 could .* no whole checkpoint was found; free"):
        save(tmp_path / "new", 1)
    assert names(tmp_path / "new") == []


def test_what_cannot_be_pruned_fails_no_save_and_goes_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patched:

        def busy(*_: Any, **__: Any) -> None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

        patched.setattr(os, "rmdir", busy)
        save(tmp_path, 2)
    assert is_step(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000003"]


def with_limit(folder: Path, limit: int) -> None:
    """The kernel itself refuses files that grow beyond the limit."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    fails(folder, 2, "File too large", size=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    save(folder, 2, size=1000)


@pytest.mark.parametrize("limit", [0, 1, 50, 200, 3000, 4000])
def test_limit_of_the_kernel_keeps_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1, size=1000)
    process = fork.Process(target=with_limit, args=(tmp_path, limit))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert is_step(tmp_path, 2, size=1000)


# ---------------------------------------------------------------------------------------------- a real one


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_keeps_the_old_checkpoint_and_goes_on_once_there_is_room(small_disk: Path, background: bool) -> None:
    folder, size = small_disk / "checkpoints", 5000  # 3 x 20 kB
    save(folder, 1, size)
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    needed = 4 * (3 * 5 + 2)  # KiB: pages of three files of tensors and two of JSON
    for left in range(0, needed + 4, 4):
        ballast.write_bytes(b"\0" * (free - left * 1024))
        assert shutil.disk_usage(small_disk).free == left * 1024
        if left < needed:
            fails(folder, 2, "No space left on device", size, background)
            assert shutil.disk_usage(small_disk).free == left * 1024  # what was begun takes no room
    save(folder, 2, size, background)
    assert is_step(folder, 2, size)
    assert names(folder) == ["step-00000002"]
