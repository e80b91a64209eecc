"""Files that are either whole or not there: atomic writes, hashes, JSON with a schema name."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .errors import UserError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write beside the target, flush to disk, rename over it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that it survives a power cut; one that is there is only made sure of."""
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, schema: str, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its schema's name in front."""
    write_atomic(path, json_text(schema, content))


def json_text(schema: str, content: Mapping[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps({"schema": schema, **content}, indent=1) + "\n"


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
        UserError: the file is missing, is not JSON, or holds another schema.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise UserError(f"{path} is not a {schema} file; was it made by another program or version?")
    return content


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_held: set[TextIO] = set()


def _let_go() -> None:
    """In a forked child: a worker that outlives its parent must not hold its lock."""
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, said: str) -> Iterator[None]:
    """Keep other processes out; the system lets go of the lock however this one ends.

    Raises:
        UserError: another process holds it; `said` is the sentence.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(said) from error
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)
