"""Seconds to the first batch when an epoch is taken up at 90 %, against skipping through it.

python benchmarks/resume.py [--patients 100] [--size 512]

miram computes which samples come next and reads those. The peer is webdataset's own pipeline over the same shards,
which must read (not decode) everything that came before. Both decode and crop alike, in one process. Pass: at 90 % it
takes at most 1.5 times what it takes at 0 %, and no longer than the peer.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from miram.data.config import CropSection
from miram.data.phantom import PhantomSettings
from miram.data.shards import Sample, ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.data.stream import EpochStream
from miram.data.views import MultiScaleViews, Normalisation

VIEWS = MultiScaleViews((224, 224), (1, 2), 196, CropSection(), Normalisation(0.2, 0.2), seed=0)
BATCH = 16


def taken_up(folder: Path, start: int) -> None:
    """The first batch of an epoch from batch `start` on."""
    next(EpochStream(ShardDataset(folder), VIEWS, BATCH, 0, workers=0).batches(start, 0, 1, BATCH))


def skipped_through(folder: Path, start: int) -> None:
    """The same place in webdataset's pipeline."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None)
    for sample in islice(samples, start * BATCH, (start + 1) * BATCH):
        VIEWS(decoded(sample), 0)


def decoded(sample: dict[str, Any]) -> Sample:
    """A sample of webdataset's as one of ours."""
    with Image.open(io.BytesIO(sample["png"])) as image:
        return Sample(sample["__key__"], np.asarray(image).astype(np.uint16), 4095, {})


def seconds(action: Callable[[Path, int], None], folder: Path, start: int) -> list[float]:
    """Nine times, after one that fills the caches."""
    action(folder, start)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        action(folder, start)
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    """Print both, and pass or fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=100)
    parser.add_argument("--size", type=int, default=512)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "set"
        make_phantoms(folder, asked.patients, PhantomSettings(size=asked.size))
        start = int(0.9 * asked.patients * 4 / BATCH)
        print(f"{platform.machine()}, {os.cpu_count()} cores; {asked.patients * 4} images of {asked.size} rows, n = 9")
        taken = {part: report(f"miram, {part}", taken_up, folder, at) for part, at in (("0 %", 0), ("90 %", start))}
        peer = report("webdataset, skipping to 90 %", skipped_through, folder, start)
    held = taken["90 %"] <= 1.5 * taken["0 %"] and taken["90 %"] <= peer
    print("PASS" if held else "FAIL")
    sys.exit(not held)


def report(name: str, action: Callable[[Path, int], None], folder: Path, start: int) -> float:
    """Print all, and return the fastest, which others on the machine disturbed least."""
    times = seconds(action, folder, start)
    print(f"{name}: {statistics.median(times):.3f} s [{min(times):.3f}, {max(times):.3f}] to the first batch")
    return min(times)


if __name__ == "__main__":
    main()
