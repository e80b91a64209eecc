"""Where shards lie, and what to call it.

    name                          read by
    /data/set, ./set, file:///…   os.pread
    http://…, https://…           ranged requests (fsspec, aiohttp)
    s3://…, gs://…                ranged requests (fsspec with s3fs, gcsfs); credentials from the environment

Nothing else is a place: no `pipe:`, no chained `a::b`, nothing that the shell or the environment would expand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from ...engine.errors import UserError

Place = tuple[str, int, int]  # shard (path or URL), offset, size

REMOTE = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "miram[s3]", "gs": "miram[gs]"}  # scheme: package
MERGE_GAP = 4096  # a tar puts 512 … 2048 bytes of headers and padding between two members
MERGE_LIMIT = 16 * 2**20  # longer runs travel faster as several requests at once

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Missing(UserError):
    """There is no such shard."""


class CutShort(UserError):
    """The shard ends before the bytes that were asked for."""


class Outage(UserError):
    """Nothing is known of the shard, as its server does not give it."""


class Unreachable(Outage):
    """The server did not answer, or not with what was asked for, however often it was asked."""


class Refused(Outage):
    """The server answers that it will not."""


def missing(shard: str) -> Missing:
    """What to say of a shard that is not there."""
    remedy = "check the address" if is_remote(shard) else "run `miram data verify` on its data set"
    return Missing(f"{display(shard)} is not there; {remedy}")


def cut_short(shard: str) -> CutShort:
    """What to say of a shard that ends too early."""
    return CutShort(f"the shard {display(shard)} is cut short; run `miram data verify` on its data set")


def check_scheme(url: str) -> None:
    """Let plain paths and the URLs of the table above pass.

    Raises:
        UserError: it is a URL of another kind, or one that a program may take for more than a name.
    """
    if not _SCHEME.match(url):
        return
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url.partition('/')[0]}//… is no URL ({error}); check its host") from error
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return
    if parts.scheme not in REMOTE:
        known = ", ".join(f"{scheme}://" for scheme in ("file", *REMOTE))
        raise UserError(
            f"{display(url)!r} is no place of data: use {known} or a path (./{url.split(':')[0]}:… if it is)"
        )
    if not parts.hostname or "::" in url or "$" in url or re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise UserError(f"{display(url)!r} is no plain URL; give scheme://host/path without blanks, `$`, `\\` and `::`")


def is_remote(root: str) -> bool:
    """Whether a name is a URL of something that is not on this machine."""
    match = _SCHEME.match(root)
    return match is not None and match[0][:-1].lower() in REMOTE


def join(root: str, name: str) -> str:
    """The path or URL of `name` in `root`; a name that is absolute, or a URL, stands for itself.

    Raises:
        UserError: one of them is no place of data, or the name leads out of the root.
    """
    check_scheme(root)
    check_scheme(name)
    if is_remote(name):
        return name
    absolute = local_path(name).startswith("/")
    if ".." in name.split("/") or (absolute and is_remote(root)):
        raise UserError(f"{display(root)} names the shard {name!r}, which lies outside of it; mend its index.csv")
    if not is_remote(root):
        return str(Path(local_path(root)) / local_path(name))
    parts = urlsplit(root)
    path = quote(name) if parts.scheme in ("http", "https") else name
    return parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()


def display(url: str) -> str:
    """The name as messages may show it: a URL's user, password and query (signatures) are left out."""
    if not _SCHEME.match(url) or "//" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def local_path(name: str) -> str:
    """A name as the system wants it: file:///a/b is /a/b."""
    return unquote(urlsplit(name).path) if name[:5].lower() == "file:" else name


def span(places: Iterable[Place], gap: int = MERGE_GAP) -> Place:
    """The one place that covers places of one shard, such as the members of a sample.

    Raises:
        UserError: they are of several shards, or more than `gap` bytes lie between two neighbours.
    """
    (place, *rest) = merge(places, gap, limit=None)
    if rest:
        raise UserError(f"{display(place[0])} does not hold the members of a sample together; index it again")
    return place


def around(place: Place, others: Iterable[Place], gap: int = MERGE_GAP) -> Place:
    """The run of near neighbours that a place lies in: its sample, where nothing large lies between the members."""
    shard, offset, size = place
    runs = merge([place, *others], gap, limit=None)
    return next(run for run in runs if run[0] == shard and run[1] <= offset and offset + size <= run[1] + run[2])


def merge(places: Iterable[Place], gap: int = MERGE_GAP, limit: int | None = MERGE_LIMIT) -> list[Place]:
    """Places with near neighbours joined, in order of shard and offset; no join makes one longer than `limit`."""
    merged: list[Place] = []
    for shard, offset, size in sorted(places):
        if merged:
            last, start, length = merged[-1]
            end = max(start + length, offset + size)
            near = shard == last and offset <= start + length + gap
            if near and (limit is None or end - start <= max(limit, length)):
                merged[-1] = (last, start, end - start)
                continue
        merged.append((shard, offset, size))
    return merged
