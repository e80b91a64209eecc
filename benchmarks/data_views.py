"""Training views (448 -> 896 pixels) a second and core, from packed and from PNG shards, against named peers.

python benchmarks/data_views.py [--images 40] [--rounds 5]

All contenders see the same 16-bit mammograms at native size (NYU's samples where MIRAM_REAL_DATA names their folder,
else phantoms of 3000 rows; a few, repeated with noise), in one process with one thread, from files that the system
holds in memory, in turns. A view is a pair: a random crop of 0.2-1 of the image at 896 x 896, and its half. Time is the
process's own, so that others on the machine disturb it less; they still share caches and units: look at the range.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torchvision.datasets import DatasetFolder  # type: ignore[import-untyped]
from torchvision.transforms import InterpolationMode, RandomResizedCrop  # type: ignore[import-untyped]
from torchvision.transforms import functional as transforms

from miram.data.config import CropSection
from miram.data.image import decode_image, encode_png
from miram.data.layout import Encoded, finished, seal, write_tar
from miram.data.packed import encode_npy
from miram.data.phantom import PhantomSettings
from miram.data.record import Pixels
from miram.data.resample import area_down, keep_freed_memory, resize
from miram.data.shards import Sample, ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.data.views import MultiScaleViews, Normalisation, draw_box

SIDE = 448
VIEWS = MultiScaleViews((SIDE, SIDE), (1, 2), 784, CropSection(), Normalisation(0.2, 0.2), seed=0)
GOALS = {"packed": 300.0, "png / bare": 0.9}

Contender = Callable[[int], Iterator[object]]  # round -> one item an image


def originals(folder: Path) -> tuple[str, list[Pixels]]:
    """A few mammograms at native size, and what they are."""
    real = Path(os.environ.get("MIRAM_REAL_DATA", "")) / "nyu_gmic_samples" / "images"
    if real.is_dir():
        return "NYU", [decode_image(path.read_bytes(), path.name) for path in sorted(real.glob("*.png"))]
    make_phantoms(folder / "phantoms", 1, PhantomSettings(size=3000), workers=1)
    phantoms = ShardDataset(folder / "phantoms")
    return "phantoms", [np.asarray(phantoms[i].pixels) for i in range(len(phantoms))]


def prepare(folder: Path, count: int) -> str:
    """Write `count` images as folder/packed, folder/png (shards) and folder/files (a class folder of PNG files)."""
    name, images = originals(folder)
    rng = np.random.default_rng(0)
    (folder / "files" / "all").mkdir(parents=True)
    samples: dict[str, list[Encoded]] = {"png": [], "packed": []}
    for i in range(count):
        image = images[i % len(images)]
        noisy = np.where(image > 0, image ^ rng.integers(0, 4, image.shape, dtype=image.dtype), image)
        png, row = encode_png(noisy), {"max_value": 65535 if name == "NYU" else 4095}
        (folder / "files" / "all" / f"{i:04d}.png").write_bytes(png)
        meta = json.dumps(row).encode()
        samples["png"].append(Encoded(f"{i:04d}", row, {"png": png, "json": meta}))
        samples["packed"].append(Encoded(f"{i:04d}", row, {"npy": encode_npy(noisy), "json": meta}))
    for kind, encoded in samples.items():
        (folder / kind).mkdir()
        shard = folder / kind / "shard-000000.tar"
        facts = {"dataset": kind, "licence": "none", "records": kind}
        seal(folder / kind, [finished(shard, *write_tar(shard, encoded))], facts)
    sizes = sorted({image.shape for image in images})
    return f"{count} {name} of {', '.join('x'.join(map(str, size)) for size in sizes)}, {images[0].dtype}"


# ---------------------------------------------------------------------------------------------- contenders


def miram(folder: Path) -> Contender:
    """Our data set and view, as a worker runs them."""
    shards = ShardDataset(folder)
    return lambda epoch: (VIEWS(shards[i], epoch) for i in range(len(shards)))


def bare_decode(folder: Path) -> Contender:
    """The PNGs decoded by Pillow and nothing else."""
    shards = ShardDataset(folder)
    contents = [shards.member(i, "png") for i in range(len(shards))]
    return lambda epoch: (np.asarray(Image.open(io.BytesIO(content))) for content in contents)


def wds(shard: Path, member: str, decode: Callable[[bytes], Pixels]) -> Contender:
    """webdataset's pipeline with our decoder and our crop in its map (its own decoders destroy 16 bits)."""

    def view(sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        max_value = json.loads(sample["json"])["max_value"]
        return VIEWS(Sample(sample["__key__"], decode(sample[member]), max_value, {}), epoch)

    def run(epoch: int) -> Iterator[object]:
        return iter(webdataset.WebDataset(str(shard), shardshuffle=False).map(lambda sample: view(sample, epoch)))

    return run


def image_folder(folder: Path) -> Contender:
    """torchvision: DatasetFolder with Pillow's loader, RandomResizedCrop to 896, antialiased, resized to 448."""
    crop = RandomResizedCrop(2 * SIDE, scale=(0.2, 1), ratio=(0.75, 4 / 3), interpolation=InterpolationMode.BILINEAR)

    def pair(image: Image.Image) -> tuple[torch.Tensor, ...]:
        fine = crop(image)
        both = (fine, transforms.resize(fine, [SIDE, SIDE], InterpolationMode.BILINEAR))
        return tuple(((torch.from_numpy(np.asarray(x, np.float32)) / 65535 - 0.2) / 0.2)[None] for x in both)

    files = DatasetFolder(str(folder), Image.open, extensions=("png",), transform=pair)
    return lambda epoch: (files[i] for i in range(len(files)))


# ---------------------------------------------------------------------------------------------- figures


def race(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Items a second of processor time of each, by round. All run in every round; one more warms up."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for epoch in range(-1, rounds):
        for name, run in contenders.items():
            start = time.process_time()
            count = sum(1 for _ in run(epoch + 1))
            if epoch >= 0:
                rates[name].append(count / (time.process_time() - start))
    return rates


def steps(sample: Sample, number: int) -> dict[str, Callable[[], object]]:
    """What a packed view is made of, each to be run by itself."""
    top, left, height, width = draw_box(np.random.default_rng(number), sample.pixels, VIEWS.size, VIEWS.crop)
    rows, columns = slice(int(top), int(top + height)), slice(int(left), int(left + width))
    part = np.ascontiguousarray(sample.pixels[rows, columns])
    inside = (0.2, 0.2, part.shape[0] - 1.0, part.shape[1] - 1.0)
    fine = resize(part, inside, (2 * SIDE, 2 * SIDE))
    return {
        "draw a crop with tissue": lambda: draw_box(np.random.default_rng(0), sample.pixels, VIEWS.size, VIEWS.crop),
        "read its rows": lambda: sample.pixels[rows, columns],
        "resize to 896": lambda: resize(part, inside, (2 * SIDE, 2 * SIDE)),
        "normalise": lambda: VIEWS.normalise(fine),
        "average down to 448": lambda: area_down(fine, (SIDE, SIDE)),
        "the whole of a view": lambda: VIEWS(sample, number),
    }


def breakdown(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds a view of each step of the packed path: the median over 16 images of the best of `rounds` tries."""
    spent: dict[str, list[float]] = {}
    shards = ShardDataset(folder)
    for number in range(min(16, len(shards))):
        for name, run in steps(shards[number], number).items():
            spent.setdefault(name, []).append(min(milliseconds(run) for _ in range(rounds)))
    return {name: statistics.median(times) for name, times in spent.items()}


def milliseconds(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1000


def machine() -> str:
    """The processor as the system names it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(': ')[2] if names else platform.processor()}, {os.cpu_count()} cores, one used"


def main() -> None:
    """Print the figures and whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as every worker does; it helps the peers, too
    with tempfile.TemporaryDirectory() as temporary, threadpool_limits(1):
        folder = Path(temporary)
        print(f"{machine()}\n{prepare(folder, options.images)}; {options.rounds} rounds")
        contenders = {
            "packed": miram(folder / "packed"),
            "png": miram(folder / "png"),
            "bare": bare_decode(folder / "png"),
            "webdataset, png": wds(folder / "png" / "shard-000000.tar", "png", lambda x: decode_image(x, "")),
            "webdataset, npy": wds(folder / "packed" / "shard-000000.tar", "npy", lambda x: np.load(io.BytesIO(x))),
            "torchvision, png": image_folder(folder / "files"),
        }
        rates = race(contenders, options.rounds)
        rates["png / bare"] = [a / b for a, b in zip(rates["png"], rates["bare"], strict=True)]
        for name, found in rates.items():
            unit = "" if name in GOALS and "/" in name else " images/s" if name == "bare" else " views/s"
            print(f"{name:20s} median {statistics.median(found):7.2f}{unit}  ({min(found):.2f} - {max(found):.2f})")
        for step, spent in breakdown(folder / "packed", options.rounds).items():
            print(f"  {step:26s} {spent:6.2f} ms")
        for name, goal in GOALS.items():
            reached = statistics.median(rates[name])
            print(f"{'PASS' if reached >= goal else 'FAIL'}  {name}: {reached:.2f}, goal {goal:g}")


if __name__ == "__main__":
    main()
