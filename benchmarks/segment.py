"""Segmentation models on a device: a training step, and a whole film read by tiles.

python benchmarks/segment.py --device cuda --precision bf16 [--out benchmarks/results/segment_h100.txt]
python benchmarks/segment.py --device cpu --small      the same with small models and films: does the script work?

A step is forward, loss, backward and AdamW of a batch of tiles, the median of several. A film is noise of the given
size on the host, half of it air, read in tiles that overlap by half; what it takes of the device's memory must not grow
with the film, as tiles are put together on the host. The device must say what the processor says of one tile.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from miram.data.crops import Resolution
from miram.data.shards import Sample
from miram.data.views import Normalisation
from miram.finetune.peft import apply
from miram.finetune.segment.inference import Reading, probabilities
from miram.finetune.segment.models import NEEDS_ENCODER, build
from miram.finetune.segment.objective import Segment

GROWTH, NEAR = 1.1, 0.02  # of memory from half a film to a whole one; between probabilities of device and processor
MODELS = ("linear", "light", "unetr", "mdsa_unet", "unet")


def made(name: str, side: int, small: bool) -> nn.Module:
    """A model of two classes on a ViT-S, or, small, on a ViT-Ti of two blocks."""
    tuned = None
    if name in NEEDS_ENCODER:
        options: dict[str, Any] = {"depth": 2} if small else {}
        vit = "vit_tiny_patch16_224" if small else "vit_small_patch16_224"
        encoder: Any = timm.create_model(vit, in_chans=1, num_classes=0, img_size=side, **options)
        tuned = apply(encoder, "full")
    torch.manual_seed(0)
    return build(name, {}, tuned, 1, 2)


def film(height: int, width: int) -> Sample:
    """Noise on the left half, air on the right."""
    pixels = np.random.default_rng(0).integers(1, 4096, (height, width)).astype(np.uint16)
    pixels[:, width // 2 :] = 0
    return Sample("film", pixels, 4095, {})


def peak(device: torch.device) -> float:
    """Megabytes of the device since `forget`; nothing on a processor."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")


def forget(device: torch.device) -> None:
    """Count memory from here."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def step_of(model: nn.Module, side: int, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One training step."""
    objective = Segment(model).to(device).train()
    adam = torch.optim.AdamW(objective.parameters(), 1e-4, fused=device.type == "cuda")
    tiles = {
        "image": torch.randn(batch, 1, side, side, device=device),
        "mask": (torch.rand(batch, side, side, device=device) < 0.01).long(),
    }

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = objective(tiles).sum() / batch
        loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def measured(name: str, arguments: argparse.Namespace) -> Iterator[str]:
    """Lines about one model; the last says whether the goals are met."""
    device, small = torch.device(arguments.device), arguments.small
    side, batch, rounds = (64, 2, 2) if small else (512, 8, 10)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    model = made(name, side, small)
    step = step_of(model, side, batch, device, dtype)
    forget(device)
    seconds = [timed(step, device) for _ in range(rounds + 2)][2:]
    yield f"{name:10} step of {batch} x {side}: {1e3 * statistics.median(seconds):.0f} ms, {peak(device):.0f} MB"
    model.eval().requires_grad_(False)
    sizes, how = ((128, 96), (256, 192)) if small else ((2048, 1536), (4096, 3072)), Normalisation(0.3, 0.2)
    reading, used = Reading((side, side), Resolution(), how, 0.5, (), batch), []
    for height, width in sizes:
        forget(device)
        spent = timed(lambda: probabilities(model, film(height, width), reading, device), device)  # noqa: B023
        used.append(peak(device))
        yield f"{name:10} film of {height} x {width}: {spent:.2f} s, {used[-1]:.0f} MB"
    here = probabilities(model, film(side, side), reading, device)
    apart = float(np.abs(here - probabilities(model.cpu(), film(side, side), reading, torch.device("cpu"))).max())
    grown = used[1] / used[0] if device.type == "cuda" else 1.0
    met = grown <= GROWTH and apart <= NEAR
    yield f"{name:10} memory x{grown:.2f} with the film, {apart:.1e} from the processor: {'PASS' if met else 'FAIL'}"


def main() -> None:
    """Print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    lines = [f"{where}, torch {torch.__version__}, {arguments.precision}"]
    print(lines[0])
    for name in MODELS:
        for line in measured(name, arguments):
            print(line, flush=True)
            lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    raise SystemExit(any(line.endswith("FAIL") for line in lines))


if __name__ == "__main__":
    main()
