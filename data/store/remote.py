"""Ranges of remote shards: many requests at once, a bounded cache, patience with servers that falter.

An HTTP server is watched while it answers, before the body is read:

    206, Content-Range: bytes a-b/n     the range; n is the shard's size
    200                                 it ignores ranges and would send the whole shard for each sample: refused
    404, 410; 416; 401, 403             missing; cut short; forbidden: final
    408, 429, 5xx, lost connections     tried again a few times
"""

from __future__ import annotations

import bisect
import os
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from ...engine.errors import UserError
from .places import REMOTE, Place, Refused, Unreachable, cut_short, display, merge, missing

IN_FLIGHT = 16
ATTEMPTS = 6  # within about half a minute
FIRST_WAIT = 0.25  # seconds; tripled after each attempt
TIMEOUTS = {"sock_connect": 15.0, "sock_read": 30.0, "total": 300.0}  # seconds

Span = tuple[str, int]  # shard, offset
_ABANDONED: list[dict[str, Any]] = []  # filesystems of a parent process: closing them here would disturb it


class SpanCache:
    """Bytes by shard and offset, up to a limit; what was used last stays longest."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._spans: OrderedDict[Span, bytes] = OrderedDict()
        self._starts: dict[str, list[int]] = {}

    def find(self, place: Place) -> Span | None:
        """The span that holds a place's bytes, now the last used."""
        shard, offset, size = place
        starts = self._starts.get(shard, [])
        i = bisect.bisect_right(starts, offset) - 1
        if i < 0 or starts[i] + len(self._spans[shard, starts[i]]) < offset + size:
            return None
        self._spans.move_to_end((shard, starts[i]))
        return shard, starts[i]

    def cut(self, span: Span, place: Place) -> bytes:
        """A place's bytes out of the span that holds them."""
        first = place[1] - span[1]
        return self._spans[span][first : first + place[2]]

    def add(self, span: Span, content: bytes) -> None:
        """Take a span in."""
        self._drop(span)
        bisect.insort(self._starts.setdefault(span[0], []), span[1])
        self._spans[span] = content
        self.bytes += len(content)

    def shrink(self, keep: set[Span]) -> None:
        """Drop what was not used for longest, but for `keep`, until the limit holds."""
        for span in list(self._spans):
            if self.bytes <= self.limit:
                break
            if span not in keep:
                self._drop(span)

    def _drop(self, span: Span) -> None:
        if span in self._spans:
            self.bytes -= len(self._spans.pop(span))
            self._starts[span[0]].remove(span[1])


class RemoteStore:
    """Shards behind URLs, read by ranges.

    Args:
        cache_mb: megabytes kept of what was fetched. What the last `prefetch` brought stays until the next one even
            if it is more, so that nothing is fetched twice.
    """

    def __init__(self, cache_mb: int):
        self.cache_mb = cache_mb
        self._cache, self._batch = SpanCache(cache_mb * 2**20), set[Span]()
        self._systems: dict[str, Any] = {}
        self._process = os.getpid()
        self._total: int | None = None

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[int]]:
        """Another process connects for itself."""
        return RemoteStore, (self.cache_mb,)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly these bytes, from the cache if it has them.

        Raises:
            UserError: the shard is missing (`Missing`), ends before (`CutShort`), the server fails (`Unreachable`),
                forbids it, or sends whole files whatever is asked for.
        """
        place = (shard, offset, size)
        if not size:
            return b""
        span = self._cache.find(place)
        if span is None:
            span = (shard, offset)
            for fault in self._fetch([place], self._batch):
                raise fault
        return self._cache.cut(span, place)

    def prefetch(self, places: Sequence[Place]) -> None:
        """Fetch what is not in the cache: neighbours as one request, requests at the same time.

        What cannot be fetched is left to `read`, which raises.

        Raises:
            Unreachable: a server does not answer at all, or no longer.
        """
        found = {place: self._cache.find(place) for place in places if place[2]}
        held = {span for span in found.values() if span}
        wanted = merge(place for place, span in found.items() if not span)
        self._batch = held | {(shard, offset) for shard, offset, _ in wanted}
        for fault in self._fetch(wanted, self._batch):
            if isinstance(fault, Unreachable):
                raise fault

    def size(self, shard: str) -> int:
        """Bytes of the shard.

        Raises:
            UserError: as `read`, or the server does not tell.
        """
        if urlsplit(shard).scheme in ("http", "https"):
            self._total = None  # fsspec asks by HEAD, which signed URLs forbid, and takes any failure for absence
            (found,) = insist(self._ask, [(shard, 0, 1)]).values()
        else:
            (found,) = insist(lambda todo: [self._info(place[0]) for place in todo], [(shard, 0, 0)]).values()
            self._total = found if isinstance(found, int) else None
        if isinstance(found, UserError):
            raise found
        if self._total is None:
            raise Unreachable(f"the server of {display(shard)} does not tell its size; use one that does")
        return self._total

    def close(self) -> None:
        """Drop connections and cache."""
        self._leave_parent()
        self._systems, self._cache, self._batch = {}, SpanCache(self._cache.limit), set()

    def _fetch(self, places: list[Place], keep: set[Span]) -> list[UserError]:
        """Bring places into the cache, each as a span; `keep` stays there too. Returns what went wrong."""
        replies = insist(self._ask, places)
        for (shard, offset, _), reply in replies.items():
            if isinstance(reply, bytes):
                self._cache.add((shard, offset), reply)
        self._cache.shrink(keep | {(shard, offset) for shard, offset, _ in places})
        return [reply for reply in replies.values() if isinstance(reply, UserError)]

    def _ask(self, places: list[Place]) -> list[Any]:
        """One request for each place: its bytes, or the exception it ended in."""
        replies: dict[Place, Any] = {}
        for scheme in {urlsplit(shard).scheme for shard, _, _ in places}:
            mine = [place for place in places if urlsplit(place[0]).scheme == scheme]
            shards, starts, ends = zip(*((s, offset, offset + size) for s, offset, size in mine), strict=True)
            options = {"batch_size": IN_FLIGHT, "on_error": "return"}
            got = self._system(scheme).cat_ranges(list(shards), list(starts), list(ends), **options)
            replies |= dict(zip(mine, got, strict=True))
        return [replies[place] for place in places]

    def _info(self, shard: str) -> Any:
        try:
            return self._system(urlsplit(shard).scheme).info(shard)["size"]
        except Exception as error:  # whatever the filesystem's library raises: `insist` tells them apart
            return error

    def _system(self, scheme: str) -> Any:
        self._leave_parent()
        if scheme not in self._systems:
            self._systems[scheme] = open_system(scheme, self._watch)
        return self._systems[scheme]

    def _leave_parent(self) -> None:
        """A forked worker must not use its parent's event loop and connections."""
        if self._process != os.getpid():
            _ABANDONED.append(self._systems)
            self._systems, self._process = {}, os.getpid()

    async def _watch(self, request: Any, handler: Any) -> Any:
        """aiohttp middleware: judges an answer by its head, notes the shard's size."""
        response = await handler(request)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and not 300 <= response.status < 400:
            try:
                self._total = judge(str(request.url), int(asked[1]), int(asked[2]) + 1, response)
            except BaseException:
                response.close()
                raise
        return response


def insist(ask: Callable[[list[Place]], list[Any]], places: list[Place]) -> dict[Place, Any]:
    """What `ask` answers for each place, asked again where that may help; a UserError where it does not."""
    answers: dict[Place, Any] = {}
    for attempt in range(ATTEMPTS):
        todo = [place for place in places if isinstance(answers.get(place, Unreachable()), Unreachable)]
        if not todo:
            break
        if attempt:
            time.sleep(FIRST_WAIT * 3 ** (attempt - 1) * random.SystemRandom().uniform(0.7, 1.3))  # not all at once
        answers |= {place: verdict(place, reply) for place, reply in zip(todo, ask(todo), strict=True)}
    return answers


def verdict(place: Place, reply: Any) -> Any:
    """A reply that is good; else what to say of it: `Unreachable` if another attempt may help."""
    shard, _, size = place
    name = display(shard)
    if isinstance(reply, bytes) and len(reply) > size:
        return Refused(f"the server of {name} ignores ranges, so each sample would cost a whole shard; use another")
    if isinstance(reply, bytes) and len(reply) < size:
        if not shard.lower().startswith("http"):  # object stores send less at the end of an object alone
            return cut_short(shard)
        return Unreachable(f"{name} sent {len(reply)} of {size} bytes, {ATTEMPTS} times; is it being written?")
    if not isinstance(reply, Exception) or isinstance(reply, UserError):
        return reply
    if isinstance(reply, FileNotFoundError):
        return missing(shard)
    if isinstance(reply, PermissionError) or type(reply).__name__ == "NoCredentialsError":
        return Refused(f"the server forbids reading {name}; give it credentials, or check the URL")
    if "InvalidRange" in f"{reply} {reply.__cause__}":  # S3's word for 416
        return cut_short(shard)
    status = getattr(reply, "status", None)
    what = f"HTTP {status}" if status else type(reply).__name__  # its text may hold a signed URL
    return Unreachable(f"{name} cannot be read ({what}, {ATTEMPTS} times); check the network and start again")


def open_system(scheme: str, watch: Callable[[Any, Any], Any]) -> Any:
    """A fresh fsspec filesystem.

    Raises:
        UserError: the package for the scheme is not installed.
    """
    try:
        import fsspec  # type: ignore[import-untyped]

        if scheme not in ("http", "https"):
            return fsspec.filesystem(scheme, skip_instance_cache=True)
        import aiohttp
    except ImportError as error:
        raise UserError(f"reading {scheme}:// needs another package: pip install '{REMOTE[scheme]}'") from error
    client = {
        "timeout": aiohttp.ClientTimeout(**TIMEOUTS),
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,
        "trust_env": True,  # proxies of clusters, ~/.netrc
        "middlewares": (watch,),
    }
    return fsspec.filesystem(scheme, skip_instance_cache=True, client_kwargs=client)


def judge(url: str, start: int, end: int, response: Any) -> int | None:
    """The size of the shard by the head of an HTTP answer to a request for bytes start … end-1.

    Raises:
        UserError: the answer is final and not the one asked for.
        aiohttp.ClientResponseError: another attempt may help.
    """
    name, status = display(url), response.status
    if status in (404, 410):
        raise missing(url)
    if status == 416:
        raise cut_short(url)
    if status in (401, 403):
        raise Refused(f"the server forbids reading {name} (HTTP {status}); give it credentials, or check the URL")
    if 400 <= status < 500 and status not in (408, 429):
        raise Refused(f"the server refuses to send {name} (HTTP {status}); check the URL")
    response.raise_for_status()
    length = response.content_length
    if status == 200 and start == 0 and length is not None and length <= end:
        if length < end:
            raise cut_short(url)
        return length
    part = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if status != 206 or not part or int(part[1]) != start or int(part[2]) >= end:
        raise Refused(f"the server of {name} ignores ranges, so each sample would cost a whole shard; use another")
    total = None if part[3] == "*" else int(part[3])
    if total is not None and total < end:
        raise cut_short(url)
    return total
