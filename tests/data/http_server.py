"""A web server for tests: byte ranges, counts of what was asked and sent, faults on demand, an object store's face.

An object store of the S3 kind with path-style addresses is the same thing with HEAD, ETag and Last-Modified:
`AWS_ENDPOINT_URL=server.url`, `s3://bucket/key` is the file bucket/key in the folder.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PIECE = 2**16
MISSING = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code><Message>no</Message></Error>"
BEYOND = b"<?xml version='1.0'?><Error><Code>InvalidRange</Code><Message>no</Message></Error>"


@dataclass
class Traffic:
    """What the server saw. Ranges are (first, end) as asked; bytes are of bodies of files alone."""

    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    most_in_flight: int = 0
    in_flight: int = 0


@dataclass
class Server:
    """A folder over HTTP/1.1.

    Attributes:
        faults: by path, what befalls its next requests, in order: "500", "403", "drop" (half the body, then the
            connection is closed), "short" (a good head for fewer bytes), "shift" (a range beside the one asked for).
        ranges: off, every answer is 200 with the whole file.
        delay: seconds before each answer.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    delay: float = 0.0
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    redirects: dict[str, str] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Count from zero."""
        self.traffic = Traffic()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets
    site: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        site, path = self.site, unquote(urlsplit(self.path).path)
        with site.lock:
            site.traffic.requests[path] += 1
            site.traffic.in_flight += 1
            site.traffic.most_in_flight = max(site.traffic.most_in_flight, site.traffic.in_flight)
            fault = site.faults[path].pop(0) if site.faults[path] else ""
        try:
            time.sleep(site.delay)
            with suppress(ConnectionError):
                self.send(path, fault, body=body)
        finally:
            with site.lock:
                site.traffic.in_flight -= 1

    def send(self, path: str, fault: str, *, body: bool) -> None:
        file = self.site.folder / path.lstrip("/")
        if path in self.site.redirects:
            return self.reply(302, b"", Location=self.site.redirects[path])
        if fault.isdigit():
            return self.reply(int(fault), b"<p>trouble</p>")
        if not file.is_file():
            return self.reply(404, MISSING)
        size = file.stat().st_size
        start, end = self.asked(size)
        status = 206 if "Range" in self.headers and self.site.ranges and size else 200
        if start >= size > 0:
            return self.reply(416, BEYOND, **{"Content-Range": f"bytes */{size}"})
        if fault == "shift":
            start, end = start + 1, end + 1
        if fault == "short":
            end -= (end - start) // 2
        told = f"bytes {start}-{end - 1}/{'*' if fault == 'short' else size}"
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read(end - start)
        return self.reply(
            status, content, cut=fault == "drop", body=body, **({"Content-Range": told} if status == 206 else {})
        )

    def asked(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match or not self.site.ranges:
            return 0, size
        return int(match[1]), min(int(match[2] or size - 1) + 1, size)

    def reply(self, status: int, content: bytes, *, cut: bool = False, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        head = {"ETag": '"0"', "Last-Modified": formatdate(0, usegmt=True), "Accept-Ranges": "bytes", **headers}
        for name, value in head.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if cut:
            content, self.close_connection = content[: len(content) // 2], True
        if body:
            self.body(status, content)

    def body(self, status: int, content: bytes) -> None:
        """Send the body and count it as it goes: a client that hangs up does not get all of it."""
        path, traffic = unquote(urlsplit(self.path).path), self.site.traffic
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if status < 300 and match:
            with self.site.lock:
                traffic.ranges[path].append((int(match[1]), int(match[2]) + 1))
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self.wfile.write(piece)
            with self.site.lock:
                traffic.sent[path] += len(piece) if status < 300 else 0


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the tests."""


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """The folder on a free port of this machine, until the block ends."""
    site = Server(folder)
    http = _Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        http.shutdown()
        http.server_close()
