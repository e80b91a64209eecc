"""Files are whole or not there, and a JSON file says what it is."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miram.engine.errors import UserError
from miram.engine.files import locked, read_json, sha256, write_atomic, write_json


@pytest.mark.parametrize(("content", "stored"), [("düster\n", "düster\n".encode()), (b"\0\xff\r\n", b"\0\xff\r\n")])
def test_write_makes_folders_and_stores_the_very_bytes(tmp_path: Path, content: bytes | str, stored: bytes) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, content)
    assert path.read_bytes() == stored
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("owner", ["pathlib.Path.replace", "os.fsync"])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(owner, power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reader_that_has_the_file_open_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with path.open() as reader:
        write_atomic(path, "new")
        assert (reader.read(), path.read_text()) == ("old", "new")


def test_content_is_on_disk_before_it_is_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(file: int) -> None:
        events.append(f"fsync {os.fstat(file).st_size}")
        fsync(file)

    def noted_replace(source: Path, target: Path) -> Path:
        events.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomic(tmp_path / "file", "12345")
    assert events[:2] == ["fsync 5", "rename"]
    assert len(events) == 3


def test_json_reads_back_with_its_schema(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "ü": {"b": True}}
    write_json(tmp_path / "x.json", "miram.x/1", content)
    assert read_json(tmp_path / "x.json", "miram.x/1") == {"schema": "miram.x/1", **content}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "is not there"),
        (b"", "cannot be read as JSON"),
        (b'{"schema": "miram.x/1"', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "is not a miram.x/1 file"),
        (b"{}", "is not a miram.x/1 file"),
        (b'{"schema": "miram.x/2"}', "is not a miram.x/1 file"),
    ],
)
def test_unusable_json_is_a_user_error_that_names_the_file(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_json(path, "miram.x/1")
    assert str(raised.value).startswith(f"{path} {fault}")


@given(content=st.binary(max_size=300))
def test_sha256_is_of_the_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "digested"
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


FORK = """
import os, sys, time
from pathlib import Path
from miram.engine.files import locked
there, here = os.pipe()
with locked(Path(sys.argv[1]), "taken"):
    if os.fork():
        os.read(there, 1)
        os.kill(os.getpid(), 9)
    os.write(here, b"I run")
    time.sleep(60)
"""


def test_a_child_that_outlives_its_killed_parent_holds_no_lock(tmp_path: Path) -> None:
    """As the workers of a killed training do, for seconds."""
    process = subprocess.Popen([sys.executable, "-c", FORK, tmp_path / "lock"], start_new_session=True)
    try:
        assert process.wait() == -signal.SIGKILL
        with locked(tmp_path / "lock", "taken"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_lock_keeps_others_out_and_is_let_go(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", "taken"),
        pytest.raises(UserError, match="taken"),
        locked(tmp_path / "lock", "taken"),
    ):
        pass
    with locked(tmp_path / "lock", "taken"):
        pass
