"""Bytes of shards, wherever they lie: in folders, on a web server, in an object store. (Names: places.py.)

A remote shard is never fetched whole. What lies together in it (a sample's members, neighbours in a batch) is one
request; what was fetched stays in a bounded cache. (remote.py)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from ...engine.errors import UserError
from .places import (
    CutShort,
    Missing,
    Outage,
    Place,
    Unreachable,
    around,
    check_scheme,
    cut_short,
    display,
    is_remote,
    join,
    local_path,
    merge,
    missing,
    span,
)
from .remote import RemoteStore

__all__ = [
    "CutShort",
    "LocalStore",
    "Missing",
    "Outage",
    "Place",
    "RemoteStore",
    "Store",
    "Unreachable",
    "around",
    "check_scheme",
    "display",
    "is_remote",
    "join",
    "merge",
    "open_store",
    "read_text",
    "span",
]

OPEN_SHARDS = 32
TEXT_LIMIT = 2**30  # bytes of a manifest or an index


class Store(Protocol):
    """Where shards are read from. Errors are `Missing`, `CutShort` and `Unreachable`, all of them UserErrors."""

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly these bytes."""
        ...

    def size(self, shard: str) -> int:
        """Bytes of the shard."""
        ...

    def prefetch(self, places: Sequence[Place]) -> None:
        """Fetch what is about to be read, as few requests, at the same time."""
        ...

    def close(self) -> None:
        """Let files, connections and memory go; the store may be used again."""
        ...


def open_store(root: str, cache_mb: int) -> Store:
    """The store for a data set; it reads what is here and what is remote, as an index may name both.

    Raises:
        UserError: the root is no place of data.
    """
    check_scheme(root)
    return AnyStore(cache_mb)


def read_text(root: str, name: str) -> bytes:
    """A small file of a data set, whole: its manifest, its index.

    Raises:
        UserError: it is not there (`Missing`), is no small file, or cannot be read.
    """
    place, store = join(root, name), open_store(root, 0)
    try:
        size = store.size(place)
        if size > TEXT_LIMIT:
            raise UserError(f"{display(place)} has {size} bytes, too many for a file of its kind; is it another one?")
        return store.read(place, 0, size)
    finally:
        store.close()


class AnyStore:
    """Shards in folders and behind URLs. `cache_mb` bounds what is kept of the latter."""

    def __init__(self, cache_mb: int):
        self._local, self._remote = LocalStore(), RemoteStore(cache_mb)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """As `LocalStore.read` and `RemoteStore.read`."""
        return self._of(shard).read(shard, offset, size)

    def size(self, shard: str) -> int:
        """As `LocalStore.size` and `RemoteStore.size`."""
        return self._of(shard).size(shard)

    def prefetch(self, places: Sequence[Place]) -> None:
        """As `RemoteStore.prefetch`, for the remote ones."""
        self._remote.prefetch([place for place in places if is_remote(place[0])])

    def close(self) -> None:
        """Close both."""
        self._local.close()
        self._remote.close()

    def _of(self, shard: str) -> Store:
        return self._remote if is_remote(shard) else self._local


class LocalStore:
    """Shards in folders, of which a few are kept open, so that thousands do not exhaust the file descriptors."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly these bytes.

        Raises:
            UserError: the shard is missing (`Missing`), ends before (`CutShort`), or cannot be read.
        """
        file = self._open(shard)
        try:
            fits = offset >= 0 and 0 <= size <= os.fstat(file).st_size - offset  # before memory is asked for
            content = os.pread(file, size, offset) if fits else b""
        except OSError as error:
            raise UserError(f"the shard {shard} cannot be read ({error.strerror}); mend or replace it") from error
        if not fits or len(content) != size:
            raise cut_short(shard)
        return content

    def size(self, shard: str) -> int:
        """Bytes of the shard.

        Raises:
            UserError: it is missing (`Missing`) or cannot be opened.
        """
        return os.fstat(self._open(shard)).st_size

    def prefetch(self, places: Sequence[Place]) -> None:
        """Nothing: the page cache of the system reads ahead."""

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, shard: str) -> int:
        if shard not in self._files:
            try:
                self._files[shard] = os.open(local_path(shard), os.O_RDONLY)
            except FileNotFoundError as error:
                raise missing(shard) from error
            except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"the shard {shard} cannot be opened ({reason}); mend or replace it") from error
            if len(self._files) > OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]
