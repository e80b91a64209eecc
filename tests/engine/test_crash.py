"""Crash consistency, not luck: every state a save can leave behind, by a killed process or a power cut, is rebuilt.

The file operations of a save are noted, and replayed on a model of a disk that knows what is flushed. After each one
(and in the middle of each write) a folder is made as the killed process would leave it, and others as a power cut
could: whatever is not flushed is lost, or, entry by entry and file by file, there or not as chance will have it.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miram.engine import checkpoint, files, tensors
from miram.engine.checkpoint import Checkpoints, newest
from miram.engine.restore import load_tensors, read_state

PARTS = ("model", "optimizer", "rng")
Operation = tuple[Any, ...]


def parts(step: int) -> dict[str, dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(step)
    return {part: {f"{part}.{i}": torch.randn(i + 2, generator=noise) for i in range(2)} for part in PARTS}


def save(folder: Path, step: int, **options: Any) -> None:
    writer = Checkpoints(folder, **options)
    writer.save(step, parts(step), {"of": step})
    writer.wait()


def step_in(path: Path) -> int:
    """The step of a checkpoint, all of whose tensors are bit for bit those that were saved."""
    step = read_state(path)["of"]
    for part, saved in parts(step).items():
        found = load_tensors(path, part)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    return step


# ---------------------------------------------------------------------------------------------- taking notes


class Notes:
    """The operations of a save, by path; files and folders that are open go by a number of their own."""

    def __init__(self, root: Path):
        self.root, self.operations = root, list[Operation]()
        self.tried, self.audited = Counter[str](), Counter[str]()  # what failed (no such file, …) included
        self._open: dict[int, tuple[int, Path]] = {}  # descriptor -> (number, path)
        self._lock = threading.RLock()

    def path(self, path: Any, folder: int | None = None) -> Path:
        return self._open[folder][1] / os.fsdecode(path) if folder is not None else Path(os.fsdecode(path))

    def add(self, name: str, *arguments: Any) -> None:
        with self._lock:
            kept = (a.relative_to(self.root).as_posix() if isinstance(a, Path) else a for a in arguments)
            self.operations.append((name, *kept))

    def opened(self, name: str, descriptor: int, path: Path) -> int:
        with self._lock:
            number = sum(operation[0] in {"create", "look"} for operation in self.operations)
            self._open[descriptor] = (number, path)
            self.add(name, path)
        return number

    def number(self, descriptor: int) -> int:
        return self._open[descriptor][0]


NOTES: list[Notes] = []  # the one that takes notes now, if any
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
AUDITED = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir"}


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """The interpreter's own record of what touches files: nothing in Python gets past it."""
    if NOTES and event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        NOTES[0].audited["create"] += 1
    elif NOTES and event in AUDITED:
        NOTES[0].audited[AUDITED[event]] += 1
    elif NOTES and event.startswith(("os.link", "os.symlink", "os.truncate", "os.chmod", "subprocess", "os.system")):
        NOTES[0].audited[event] += 1


sys.addaudithook(audit)


class NotedFile(io.FileIO):
    """A file whose writes are noted as they reach the system."""

    def __init__(self, path: Any, mode: str):
        NOTES[0].tried["create"] += 1
        super().__init__(path, mode)
        self._number = NOTES[0].opened("create", self.fileno(), Path(path))

    def write(self, content: Any) -> int:
        written = super().write(content)
        NOTES[0].add("write", self._number, bytes(memoryview(content).cast("B")[:written]))
        return written

    def truncate(self, *_: Any) -> int:
        raise AssertionError("not in the model")


@contextmanager
def noting(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    """Inside, what is done below `root` is noted."""
    notes, plain = Notes(root), {name: getattr(os, name) for name in ("open", "fsync", "mkdir", "rmdir", "unlink")}

    def open_file(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(path, mode, *arguments, **options)
        assert mode == "wb"
        return io.BufferedWriter(NotedFile(path, "wb"))

    def os_open(path: Any, flags: int, *arguments: Any, dir_fd: int | None = None) -> int:
        assert not flags & WRITING
        descriptor = plain["open"](path, flags, *arguments, dir_fd=dir_fd)
        notes.opened("look", descriptor, notes.path(path, dir_fd))
        return descriptor

    def fsync(descriptor: int) -> None:
        notes.add("fsync", notes.number(descriptor))
        plain["fsync"](descriptor)

    def by_path(name: str) -> Callable[..., None]:
        def operate(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
            notes.tried[name] += 1
            plain[name](path, *arguments, dir_fd=dir_fd)
            notes.add(name, notes.path(path, dir_fd))

        return operate

    def rename(source: Any, target: Any) -> None:
        notes.tried["rename"] += 1
        real_rename(source, target)
        notes.add("rename", notes.path(source), notes.path(target))

    real_open, real_rename = io.open, os.replace
    with monkeypatch.context() as patched:
        patched.setattr(io, "open", open_file)
        patched.setattr("builtins.open", open_file)
        patched.setattr(os, "open", os_open)
        patched.setattr(os, "fsync", fsync)
        patched.setattr(os, "mkdir", by_path("mkdir"))
        patched.setattr(os, "rmdir", by_path("rmdir"))
        for name in ("unlink", "remove"):
            patched.setattr(os, name, by_path("unlink"))
        for name in ("rename", "replace"):
            patched.setattr(os, name, rename)
        NOTES.append(notes)
        try:
            yield notes
        finally:
            NOTES.clear()


# ---------------------------------------------------------------------------------------------- a disk


@dataclass(eq=False)
class File:
    content: bytes = b""
    flushed: bytes = b""

    def flush(self) -> None:
        self.flushed = self.content


@dataclass(eq=False)
class Folder:
    """Entries as processes see them, and every version of each that the disk may hold after a power cut."""

    entries: dict[str, Node] = field(default_factory=dict)
    versions: dict[str, list[Node | None]] = field(default_factory=dict)  # the flushed one first

    def put(self, name: str, node: Node | None) -> None:
        self.versions.setdefault(name, [None]).append(node)
        self.entries.pop(name, None)
        if node is not None:
            self.entries[name] = node

    def flush(self) -> None:
        self.versions = {name: [node] for name, node in self.entries.items()}


Node = File | Folder


class Disk:
    """A tree that was flushed to the last byte, and what operations make of it."""

    def __init__(self, root: Path):
        self.root = self._read(root)
        self._opened: list[Node] = []

    def _read(self, path: Path) -> Any:
        if path.is_file():
            return File(path.read_bytes(), path.read_bytes())
        folder = Folder({child.name: self._read(child) for child in path.iterdir()})
        folder.flush()
        return folder

    def _place(self, path: str) -> tuple[Folder, str]:
        *above, name = path.split("/")
        folder = self.root
        for step in above:
            folder = folder.entries[step]
        return folder, name

    def _at(self, path: str) -> Node:
        folder, name = self._place(path)
        return self.root if path == "." else folder.entries[name]

    def do(self, operation: Operation) -> None:
        getattr(self, operation[0])(*operation[1:])

    def mkdir(self, path: str) -> None:
        folder, name = self._place(path)
        folder.put(name, Folder())

    def create(self, path: str) -> None:
        folder, name = self._place(path)
        assert name not in folder.entries  # nothing is ever overwritten in place
        folder.put(name, File())
        self._opened.append(folder.entries[name])

    def look(self, path: str) -> None:
        self._opened.append(self._at(path))

    def write(self, number: int, content: bytes) -> None:
        file = self._opened[number]
        assert isinstance(file, File)
        file.content += content

    def fsync(self, number: int) -> None:
        self._opened[number].flush()

    def rename(self, source: str, target: str) -> None:
        (old, before), (new, after) = self._place(source), self._place(target)
        assert after not in new.entries
        node = old.entries[before]
        old.put(before, None)
        new.put(after, node)

    def unlink(self, path: str) -> None:
        folder, name = self._place(path)
        assert isinstance(folder.entries[name], File)
        folder.put(name, None)

    def rmdir(self, path: str) -> None:
        folder, name = self._place(path)
        assert folder.entries[name].entries == {}
        folder.put(name, None)


Tree = dict[str, Any]  # name -> bytes or Tree


def seen(folder: Folder) -> Tree:
    """What other processes see: what a killed one leaves behind."""
    return {name: node.content if isinstance(node, File) else seen(node) for name, node in folder.entries.items()}


def after_power_cut(folder: Folder, chance: random.Random | None) -> Tree:
    """Only what is flushed (without chance), or any mixture of what is and what is not."""
    tree: Tree = {}
    for name, versions in folder.versions.items():
        node = chance.choice(versions) if chance else versions[0]
        if isinstance(node, File):
            tree[name] = torn(node, chance) if chance else node.flushed
        elif node is not None:
            tree[name] = after_power_cut(node, chance)
    return tree


def torn(file: File, chance: random.Random) -> bytes:
    """What is flushed is there; of the rest all, a beginning, nothing, or only its length."""
    kept = chance.randint(len(file.flushed), len(file.content))
    zeros = b"\0" * (len(file.content) - len(file.flushed))
    return chance.choice([file.content, file.content[:kept], file.flushed, file.flushed + zeros])


def make(tree: Tree, place: Path) -> None:
    place.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            make(node, place / name)
        else:
            (place / name).write_bytes(node)


def read(place: Path) -> Tree:
    return {path.name: read(path) if path.is_dir() else path.read_bytes() for path in place.iterdir()}


def frozen(tree: Tree) -> Any:
    return frozenset((name, frozen(node) if isinstance(node, dict) else node) for name, node in tree.items())


# ---------------------------------------------------------------------------------------------- the scenarios


def first(_: Path) -> None:
    """The run's first checkpoint: no folder yet."""


def one_before(folder: Path) -> None:
    save(folder, 1)


def many_before(folder: Path) -> None:
    """Three to prune, and what a killed process left."""
    for step in (1, 2, 3):
        save(folder, step, keep_last=9)
    shutil.copytree(folder / "step-00000002", folder / ".step-00000004")


def unfinished(folder: Path) -> None:
    """The same step is there, without its manifest."""
    one_before(folder)
    save(folder, 5)
    (folder / "step-00000005" / "manifest.json").unlink()


def damaged(folder: Path) -> None:
    """The same step is there with one byte flipped, and a later one, too."""
    one_before(folder)
    for step in (5, 6):
        save(folder, step)
        file = folder / f"step-{step:08d}" / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")


SCENARIOS = {
    "first": (first, {}),
    "one before": (one_before, {}),
    "pruned to one": (many_before, {"keep_last": 1}),
    "keepers": (many_before, {"keep_last": 1, "keep_every": 2}),
    "over an unfinished one": (unfinished, {"keep_last": 1}),
    "over a damaged one": (damaged, {"keep_last": 1}),
    "in the background": (many_before, {"keep_last": 1, "background": True}),
}
NEW = 5


@dataclass
class Saved:
    """A save over what was there before: its operations, and the disk before and after."""

    before: Disk
    notes: Notes
    after: Path
    old: int | None
    options: dict[str, Any]

    def states(self, chances: int) -> Iterator[tuple[int, str, Tree]]:
        """(operations done, kind, tree): every state once."""
        known = set()
        for done, disk in enumerate(self.prefixes()):
            trees = [("seen", seen(disk.root)), ("lost", after_power_cut(disk.root, None))]
            for seed in range(chances):
                trees.append(("mixed", after_power_cut(disk.root, random.Random(f"{done} {seed}"))))
            for kind, tree in trees:
                if (key := (kind, frozen(tree))) not in known:
                    known.add(key)
                    yield done, kind, tree

    def prefixes(self) -> Iterator[Disk]:
        yield self.before
        for name, *arguments in self.notes.operations:
            if name == "write":  # a process can die, or a disk be full, in the middle of it
                number, content = arguments
                middle = len(content) // 2
                for half in (content[:middle], content[middle:]):
                    self.before.do((name, number, half))
                    yield self.before
            else:
                self.before.do((name, *arguments))
                yield self.before


@pytest.fixture(params=SCENARIOS)
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    prepare, options = SCENARIOS[request.param]
    run = tmp_path / "run"
    run.mkdir()
    prepare(run / "checkpoints")
    found, _ = newest(run / "checkpoints")
    old = step_in(found) if found else None
    disk = Disk(run)
    with noting(run, monkeypatch) as notes:
        save(run / "checkpoints", NEW, **options)
    return Saved(disk, notes, run, old, options)


def test_no_file_operation_of_a_save_goes_unnoticed(saved: Saved) -> None:
    assert saved.notes.tried == saved.notes.audited
    for disk in saved.prefixes():
        last = disk
    assert seen(last.root) == read(saved.after)
    assert (
        after_power_cut(last.root, None)["checkpoints"][f"step-{NEW:08d}"]
        == read(saved.after)["checkpoints"][f"step-{NEW:08d}"]
    )


def test_every_state_a_save_can_leave_behind_holds_a_good_checkpoint(saved: Saved, tmp_path: Path) -> None:
    scratch, found_in = tmp_path / "scratch", {"seen": list[int | None](), "lost": list[int | None]()}
    for done, kind, tree in saved.states(chances=4):
        make(tree, scratch)
        path, _ = newest(scratch / "checkpoints")
        step = step_in(path) if path else None
        assert step in {saved.old, NEW}, (done, kind)
        if kind != "mixed":
            found_in[kind].append(step)
            # Whoever comes next can go on: the next save works and clears up.
            if path is None or done % 3 == 0:
                save(scratch / "checkpoints", 7, keep_last=1)
                assert newest(scratch / "checkpoints")[0] == scratch / "checkpoints" / "step-00000007"
                assert not list((scratch / "checkpoints").glob(".*"))
        shutil.rmtree(scratch)
    assert len(found_in["seen"]) > 15
    for steps in found_in.values():  # once the new one is there, it stays
        assert steps[0] == saved.old
        assert steps[-1] == NEW
        assert steps == sorted(steps, key=lambda step: step == NEW)


def test_once_a_save_has_returned_a_power_cut_cannot_undo_it(saved: Saved, tmp_path: Path) -> None:
    for disk in saved.prefixes():
        last = disk
    for seed in range(20):
        make(after_power_cut(last.root, random.Random(seed)), tmp_path / str(seed))
        path, skipped = newest(tmp_path / str(seed) / "checkpoints")
        assert path is not None
        assert step_in(path) == NEW
        assert all("step-00000006" in sentence for sentence in skipped)


# ---------------------------------------------------------------------------------------------- the method itself


def no_flush(_: Any) -> None:
    """A save that forgets to flush folders."""


def unflushed(path: Path, forms: Any, values: Any) -> str:
    """Tensors that are written and never flushed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", no_flush)
        return TENSORS(path, forms, values)


TENSORS = tensors.write_tensors


def pruned_first(self: Checkpoints, path: Path) -> None:
    """Make room by removing every older checkpoint before the new one is written."""
    CLEAR(self, path)
    for old in self.folder.glob("step-*"):
        shutil.rmtree(old)


CLEAR = Checkpoints._clear


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (checkpoint, "write_tensors", unflushed),
        (checkpoint, "sync_folder", no_flush),
        (files, "sync_folder", no_flush),
        (Checkpoints, "_clear", pruned_first),
    ],
)
def test_a_save_that_forgets_something_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    one_before(run / "checkpoints")
    disk = Disk(run)
    monkeypatch.setattr(owner, name, fault)
    with noting(run, monkeypatch) as notes:
        save(run / "checkpoints", NEW, keep_last=1)
    monkeypatch.undo()
    bad = 0
    for _, _, tree in Saved(disk, notes, run, 1, {}).states(chances=10):
        make(tree, tmp_path / "scratch")
        bad += newest(tmp_path / "scratch" / "checkpoints")[0] is None
        shutil.rmtree(tmp_path / "scratch")
    assert bad
