"""Compressed pixels, decoded in a process of their own.

The decoders of pydicom are C++ that ends its process on some damaged files, may wait for ever on others, and writes to
standard error. So each process that reads has one child that decodes, file by file, and is replaced when it dies. The
pixels' way back takes a quarter to a third of what decoding JPEG takes. Pipes carry the messages:

    to the child     [path, {"rows": …, …}]  as a line of JSON
    from the child   {"type": "uint16", "shape": [rows, columns]}  as a line of JSON, and the pixels
                     {"refused": reason}
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..image import UnreadableImage
from ..record import Pixels
from .pixels import Layout, decode_frame, guarded

PATIENCE = 120.0  # seconds; the largest plates take a few


class Decoder:
    """A child that decodes. It starts with the first file."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def decode(self, path: Path, layout: Layout) -> Pixels:
        """(rows, columns) pixels of a file, as the code stream has them.

        Raises:
            UnreadableImage: they cannot be decoded, or the decoder died or took too long over them.
        """
        with self._lock:
            for _ in range(2):  # a child may die late, of the file before
                child = self._running()
                watch = threading.Timer(PATIENCE, child.kill)
                watch.start()
                try:
                    return _ask(child, path, layout)
                except UnreadableImage:
                    raise
                except (OSError, EOFError, ValueError) as error:
                    self.close()
                    if watch.finished.is_set():
                        raise UnreadableImage(f"its pixels took longer than {PATIENCE:g} s to decode") from error
                except BaseException:  # the pipe may hold half an answer, that the next file must not get
                    self.close()
                    raise
                finally:
                    watch.cancel()
        raise UnreadableImage("its pixels are damaged: the decoder gave up")

    def close(self) -> None:
        """Let the child go."""
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
            self._child.communicate()
        self._child = None

    def _running(self) -> subprocess.Popen[bytes]:
        """The child of this process: one that was forked may not share its parent's."""
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-m", __name__]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
            self._owner = os.getpid()
        return self._child


decoder = Decoder()
atexit.register(decoder.close)


def _ask(child: subprocess.Popen[bytes], path: Path, layout: Layout) -> Pixels:
    assert child.stdin
    assert child.stdout
    child.stdin.write(json.dumps([str(path.absolute()), asdict(layout)]).encode() + b"\n")
    child.stdin.flush()
    answer = json.loads(child.stdout.readline() or "{}")
    if "refused" in answer:
        raise UnreadableImage(answer["refused"])
    if not answer:
        raise EOFError
    pixels: Pixels = np.empty(answer["shape"], answer["type"])
    if child.stdout.readinto(pixels.data.cast("B")) != pixels.nbytes:  # type: ignore[attr-defined]
        raise EOFError
    return pixels


def serve() -> None:
    """The child: answer until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # decoders may print
    for line in sys.stdin.buffer:
        path, layout = json.loads(line)
        try:
            with guarded("pixels"):
                pixels = np.ascontiguousarray(decode_frame(Path(path), Layout(**layout)))
            head, body = {"type": pixels.dtype.name, "shape": pixels.shape}, pixels.tobytes()
        except UnreadableImage as error:
            head, body = {"refused": str(error)}, b""
        answers.write(json.dumps(head).encode() + b"\n" + body)
        answers.flush()


if __name__ == "__main__":
    serve()
