"""Keys: the same for the same film and secret, and nothing else."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from miram.data.keys import default_key_file, hashed, read_secret
from miram.engine.errors import UserError


def test_a_hash_is_an_hmac_of_its_parts() -> None:
    assert hashed(b"secret", "a", "b") == hmac.new(b"secret", b"a\x1fb", hashlib.sha256).hexdigest()[:16]


def test_secret_and_every_part_matter() -> None:
    hashes = {hashed(s, *p) for s in (b"one", b"two") for p in (("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""))}
    assert len(hashes) == 8


def test_the_users_own_key_is_made_once_and_readable_by_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    secret = read_secret()
    file = tmp_path / "config" / "miram" / "key"
    assert file == default_key_file()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(secret) >= 32
    assert read_secret() == secret == read_secret(file)


def test_two_users_get_different_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = set()
    for user in ("one", "two"):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / user))
        secrets.add(read_secret())
    assert len(secrets) == 2


def test_without_xdg_the_key_lies_in_dot_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_key_file() == tmp_path / ".config" / "miram" / "key"


def test_white_space_around_a_key_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789abcdef")
    (tmp_path / "b").write_bytes(b"0123456789abcdef\r\n")
    assert read_secret(tmp_path / "a") == read_secret(tmp_path / "b")


@pytest.mark.parametrize("content", [None, b"", b"0123456789abcde", b"short" + b" " * 20])
def test_a_key_that_is_missing_or_short_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=str(file)):
        read_secret(file)
    assert file.exists() == (content is not None)
