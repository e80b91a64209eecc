"""MDSA-UNet against the size of the image: what attention costs with 7 windows a side and with one for 32 pixels.

python benchmarks/mdsa.py [--sizes 224,448,896] [--measured 224,448] [--device cpu | cuda] [--precision fp32 | bf16]

  GMAC        multiply-adds of a forward pass (matrix products and convolutions), counted on tensors without contents
  attention   of these, q k^T and softmax v of the chosen windows, and the choice
  logits      what the largest attention map would take if it were kept (fp32, one image): it never is
  kept        bytes that autograd keeps for the backward pass, each storage once, parameters left out, counted
  peak        the highest level of memory (a GPU's allocator; on a processor the process's resident pages) less what it
              was when the model was there, over one warm-up and three training steps of one image
  forward     median seconds without gradient;  step: with backward and AdamW. Each row in a process of its own.

Two goals per doubling of the side: with 7 windows attention costs 15 to 16.5 times as much, with "auto" at most 5 times
up to a side of 896. Beyond that the choice among (side / 32)^2 windows, itself of their square, begins to show.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from miram.finetune.segment.mdsa_unet import MDSAUNet
from miram.pretrain.plan.count import OWN

Windows = int | Literal["auto"]
MB, STEPS, MOST_SIDE = 2**20, 3, 896
VARIANTS: tuple[Windows, ...] = (7, "auto")
GOALS = {7: (15.0, 16.5), "auto": (3.5, 5.0)}
STAGES = ((4, 4, 1), (8, 10, 4), (16, 16, 16))  # stride, heads, windows that are attended to


def count(size: int, windows: Windows) -> tuple[float, float, float]:
    """GMAC, of these attention's, and MB kept."""
    model, mode = MDSAUNet(3, 1, windows=windows), FakeTensorMode()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    weights: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
    own = {t.untyped_storage()._cdata for t in weights.values()}
    stored: dict[int, torch.UntypedStorage] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in own:
            stored[storage._cdata] = storage
        return saved

    counter = FlopCounterMode(display=False, custom_mapping=OWN)
    with mode, counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        functional_call(model, weights, (torch.empty(1, 3, size, size),))
    found = {str(operator): flops / 2e9 for operator, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(number for name, number in found.items() if "attention" in name or "bmm" in name)
    return sum(found.values()), attention, sum(storage.nbytes() for storage in stored.values()) / MB


def logits(size: int, windows: Windows) -> float:
    """MB of the largest attention map."""
    side = size // 32 if windows == "auto" else windows
    maps = ((size // stride // side, heads, min(k, side**2)) for stride, heads, k in STAGES)
    return max(4 * heads * side**2 * k * tokens**4 / MB for tokens, heads, k in maps)


def level(device: str) -> float:
    """The highest level of memory so far, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(run: Callable[[], None], device: str) -> float:
    """Median over steps after one to warm up."""
    times = []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def measure(args: argparse.Namespace, size: int, windows: Windows) -> dict[str, float]:
    """Peak MB and seconds, in this process."""
    torch.manual_seed(0)
    model = MDSAUNet(3, 1, windows=windows).to(args.device)
    images = torch.randn(1, 3, size, size, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def forward() -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            out: Tensor = model(images)
        return out

    def look() -> None:
        with torch.no_grad():
            forward()

    def step() -> None:
        optimizer.zero_grad()
        forward().float().square().mean().backward()
        optimizer.step()

    before = level(args.device)
    took = seconds(step, args.device)
    peak = level(args.device) - before
    model.eval()
    return {"peak": peak, "step": took, "forward": seconds(look, args.device)}


def child(args: argparse.Namespace, size: int, windows: Windows) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", json.dumps([size, windows])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{size}, {windows} windows: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(args: argparse.Namespace, costs: dict[tuple[int, Windows], float]) -> Iterator[str]:
    """Its lines; attention's GMAC go into `costs`."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    busy = "" if args.device == "cuda" else f", load {os.getloadavg()[0]:.1f} at the start"
    yield f"MDSAUNet(3, 1), one image, {args.precision}, {device}{busy}, torch {torch.__version__}"
    yield f"{'side':>6}{'windows':>9}{'GMAC':>9}{'attention':>11}{'logits MB':>11}{'kept MB':>9}{'peak MB':>9}" + (
        f"{'forward s':>11}{'step s':>9}"
    )
    for size in args.sizes:
        for windows in VARIANTS:
            total, attention, kept = count(size, windows)
            costs[size, windows] = attention
            row = f"{size:>6}{windows:>9}{total:>9.2f}{attention:>11.2f}{logits(size, windows):>11.0f}{kept:>9.0f}"
            if size in args.measured:
                found = child(args, size, windows)
                row += f"{found['peak']:>9.0f}{found['forward']:>11.3f}{found['step']:>9.3f}"
            yield row


def verdicts(costs: dict[tuple[int, Windows], float], sizes: list[int]) -> Iterator[tuple[bool, str]]:
    """Whether attention grows as foreseen, for every doubling among the sizes."""
    for size in sizes:
        if 2 * size not in sizes or 2 * size > MOST_SIDE:
            continue
        for windows in VARIANTS:
            growth, (least, most) = costs[2 * size, windows] / costs[size, windows], GOALS[windows]
            text = f"{windows} windows, {size} to {2 * size}: attention x {growth:.1f}, goal {least:g} to {most:g}"
            yield least <= growth <= most, text


def numbers_of(text: str) -> list[int]:
    """Of 224,448 both."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Print the table and whether the goals are met; exit 1 where one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=numbers_of, default=[224, 448, 896], help="multiples of 224, counted")
    parser.add_argument("--measured", type=numbers_of, default=[224, 448], help="of these, run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2, help="of a processor")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # JSON of one row: what a child measures
    args: Any = parser.parse_args()
    if any(size < 224 or size % 224 for size in args.sizes):
        parser.error("--sizes: multiples of 224, which 7 windows and windows of 32 pixels both divide")
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(measure(args, *json.loads(args.only))))
        return
    costs: dict[tuple[int, Windows], float] = {}
    for line in table(args, costs):
        print(line, flush=True)
    found = list(verdicts(costs, args.sizes))
    for passed, text in found:
        print(f"{'PASS' if passed else 'FAIL'}  {text}")
    sys.exit(not all(passed for passed, _ in found))


if __name__ == "__main__":
    main()
