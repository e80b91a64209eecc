"""Names that tell nobody who the patient is, yet are the same every time.

A key is an HMAC of the data set's name and the archive's own id, under a secret that stays in the user's configuration
folder: a film gets the same key whenever the data set of that name is made, and nobody who knows the id can compute it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

from ..engine.errors import UserError


def default_key_file() -> Path:
    """The persistent secret: $XDG_CONFIG_HOME/miram/key or ~/.config/miram/key."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "miram" / "key"


def read_secret(path: Path | None = None) -> bytes:
    """The secret in `path`, or the user's own, made on first use.

    Raises:
        UserError: a file was named that is not there or holds fewer than 16 bytes.
    """
    file = path or default_key_file()
    if path is None and not file.exists():
        make_key_file(file)
        print(f"miram: made your secret {file}: keep a copy, as other secrets give other ids", file=sys.stderr)
    if not file.is_file():
        raise UserError(f"the key file {file} is not there; make one with at least 16 random bytes, or leave out --key")
    secret = file.read_bytes().strip()
    if len(secret) < 16:
        raise UserError(f"the key file {file} holds fewer than 16 bytes; put more randomness into it")
    return secret


def make_key_file(file: Path) -> None:
    """Write a fresh secret that only the user can read; of two processes that try at once, the first one's stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
        new.write(secrets.token_hex(32) + "\n")
    with suppress(FileExistsError):
        os.link(fresh, file)
    fresh.unlink()


def hashed(secret: bytes, *parts: str) -> str:
    """16 hex digits of HMAC-SHA256 over the parts."""
    return hmac.new(secret, "\x1f".join(parts).encode(errors="backslashreplace"), hashlib.sha256).hexdigest()[:16]
