"""A real pretraining, ViT-B on phantoms at 448 -> 896 pixels: speed, memory, waiting, and a stop in the middle.

python benchmarks/pretrain_gpu.py [--batch 64] [--steps 60] [--out benchmarks/results/pretrain_h100.txt]
python benchmarks/pretrain_gpu.py --small --device cpu      the same with a tiny model: does the script work?

Every run is a process of its own, as a user starts it, on packed phantoms that are made first. Figures are medians over
the lines of metrics.jsonl in the second half of a run, so that warming up and compiling are left out. Model FLOPs are
three times those of the forward pass, counted by `miram plan` (products and convolutions); utilisation is their share
of what the card's data sheet gives for the precision, without sparsity. Synchronisations are events of the profiler's
trace between two lines of metrics, where nothing but the loop itself can ask for them. A stopped run is compared with
the undisturbed one of the same settings.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miram.data.phantom import PhantomSettings
from miram.data.sources.phantom import make_phantoms
from miram.engine.config import load
from miram.engine.profile import MARK
from miram.engine.run import read_metrics
from miram.pretrain.config import PretrainConfig
from miram.pretrain.plan import cost_of

Line = dict[str, float]
Event = dict[str, Any]  # of a trace in Chrome's format

PRESET = "pretrain/gpu_24gb"
VIT_B = ["--model.image_size=448", "--model.mask_unit=1", "--train.warmup_steps=10", "--train.micro_batch=null"]
TINY = [
    "--model.encoder=vit_tiny_patch16_224",
    "--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2}",
    "--model.image_size=32",
    "--model.mask_unit=1",
    "--model.scales=[{scale: 1, depth: 1, width: 32, heads: 2}, "
    "{scale: 2, attention: nystrom, depth: 1, width: 16, heads: 2, options: {num_landmarks: 4}}]",
    "--train.warmup_steps=2",
    "--train.micro_batch=null",
]
VARIANTS = {
    "bf16": ["--train.precision=bf16"],
    "bf16, compiled": ["--train.precision=bf16", "--train.compile=true"],
    "fp16": ["--train.precision=fp16"],
    "fp32": ["--train.precision=fp32"],
    "bf16, deterministic": ["--train.precision=bf16", "--train.deterministic=true"],
}
# TFLOP/s of data sheets, dense: (half precision on tensor cores, fp32), by a part of the card's name; the first counts.
PEAKS = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "4090": (165.2, 82.6),
    "3090": (71.0, 35.6),
    "V100": (125.0, 15.7),
}
# What makes the host wait for the device. On a processor only the first can be seen.
WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Bench:
    """What all runs have in common."""

    folder: Path
    common: list[str]
    steps: int
    device: str
    peak: float | None

    def arguments(self, name: str, *settings: str) -> list[str]:
        """CONFIG and the rest of a run's command line."""
        return [PRESET, *self.common, f"--train.steps={self.steps}", *settings, f"--out={self.run(name)}"]

    def run(self, name: str) -> Path:
        """A run's folder."""
        return self.folder / name.replace(", ", "-")

    def start(self, name: str, *settings: str) -> subprocess.Popen[str]:
        """A run as a process."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})
        command = [sys.executable, "-m", "miram.pretrain", *self.arguments(name, *settings)]
        with (self.folder / "log.txt").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, text=True)

    def finish(self, name: str, *settings: str) -> list[Line] | None:
        """The lines of a run to its end; None if it failed, which is said."""
        code = self.start(name, *settings).wait()
        if code == 0:
            return read_metrics(self.run(name) / "metrics.jsonl")
        lines = [line for line in (self.folder / "log.txt").read_text().splitlines() if line.strip()]
        say(f"FAIL  {name}: exit {code}: {lines[-1][:200]}")
        return None


said: list[str] = []


def say(line: str) -> None:
    """Print, and keep for the file."""
    said.append(line)
    print(line, flush=True)


def median(lines: Sequence[Line], key: str) -> float:
    """Over the second half of a run."""
    return statistics.median(line[key] for line in lines[len(lines) // 2 :])


def peak_tflops(bench: Bench, precision: str) -> float | None:
    """Of the card at a precision; None where it is not known."""
    if bench.peak or bench.device == "cpu":
        return None if precision == "fp32" else bench.peak
    name = torch.cuda.get_device_name()
    found = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    return found and found[precision == "fp32"]


def flops_of(bench: Bench) -> int:
    """Model FLOPs of a training step, an image: three times forward."""
    settings = load(PretrainConfig, PRESET, bench.arguments("counted")[1:])
    return 3 * cost_of(settings).forward.total()


# ---------------------------------------------------------------------------------------------- parts


def speed(bench: Bench) -> dict[str, list[Line]]:
    """Every variant to its end, a row each."""
    flops = flops_of(bench)
    say(f"\n{flops / 1e9:.3g} model GFLOP an image and step")
    say(f"{'':20s} {'images/s':>9s} {'utilised':>9s} {'waiting':>8s} {'peak GB':>8s} {'last loss':>10s}")
    runs: dict[str, list[Line]] = {}
    for name, settings in VARIANTS.items():
        lines = bench.finish(name, *settings)
        if lines:
            runs[name] = lines
            say(row(name, lines, flops, peak_tflops(bench, settings[0].partition("=")[2])))
    return runs


def row(name: str, lines: Sequence[Line], flops: int, peak: float | None) -> str:
    """A variant's figures."""
    rate = median(lines, "images_per_s")
    used = f"{rate * flops / peak / 1e12:.1%}" if peak else "-"
    waiting, memory = median(lines, "data_wait"), max(line["peak_memory_bytes"] for line in lines) / 1e9
    return f"{name:20s} {rate:9.1f} {used:>9s} {waiting:8.1%} {memory:8.2f} {lines[-1]['loss']:10.4f}"


def ratios(runs: dict[str, list[Line]]) -> None:
    """What one setting does to speed."""
    for name in ("bf16, compiled", "fp16", "fp32", "bf16, deterministic"):
        if name in runs and "bf16" in runs:
            say(f"{name}: {median(runs[name], 'images_per_s') / median(runs['bf16'], 'images_per_s'):.2f} x bf16")


def stopped(bench: Bench, calm: Sequence[Line]) -> bool:
    """A SIGTERM in the middle, then the same command again; whether it ends like the undisturbed run."""
    name, settings, middle = "stopped", VARIANTS["bf16"], len(calm) // 2
    process = bench.start(name, *settings)
    if not reach(bench.run(name) / "metrics.jsonl", middle, process):
        say("FAIL  the run to be stopped ended by itself")
        return False
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    code, took = process.wait(), time.monotonic() - told
    status = json.loads((bench.run(name) / "state.json").read_text())["status"]
    begin = time.monotonic()
    process = bench.start(name, *settings)
    reach(bench.run(name) / "metrics.jsonl", middle + 1, process)
    back, ended = time.monotonic() - begin, process.wait()
    lines = read_metrics(bench.run(name) / "metrics.jsonl")
    complete = [line["step"] for line in lines] == [line["step"] for line in calm]
    apart = max((abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(lines, calm, strict=False)), default=1.0)
    held = (code, status, ended, complete) == (75, "preempted", 0, True) and apart < 0.05
    say(
        f"{'PASS' if held else 'FAIL'}  SIGTERM in the middle: exit {code}, {status}, {took:.1f} s after the signal; "
        f"again: exit {ended}, next line after {back:.1f} s; losses within {apart:.1e} of the undisturbed run"
    )
    return held


def reach(path: Path, lines: int, process: subprocess.Popen[str]) -> bool:
    """Wait until a file has so many lines; whether it got there before the process ended."""
    while not path.exists() or path.read_text().count("\n") < lines:
        if process.poll() is not None:
            return path.exists() and path.read_text().count("\n") >= lines
        time.sleep(0.05)
    return True


def waits(bench: Bench) -> bool:
    """How often a step makes the host wait for the device, from the profiler's trace of ten steps."""
    quiet = ["--train.log_every=1000000", "--train.profile_steps=10:20"]
    if bench.finish("profiled", *VARIANTS["bf16"], *quiet) is None:
        return False
    (trace,) = (bench.run("profiled") / "profile").glob("*.json.gz")
    with gzip.open(trace, "rt") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    steps = [event for event in events if event["name"].startswith(MARK) and event.get("cat") == "user_annotation"]
    begin, end = min(step["ts"] for step in steps), max(step["ts"] + step["dur"] for step in steps)
    # On a processor the fused AdamW reads its own counters, one a tensor, and calls that the same.
    adamw = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "aten::_fused_adamw_"]
    times = [(event["name"], event.get("ts", -1.0)) for event in events if event["name"] in WAITS]
    found = Counter(name for name, at in times if begin <= at < end and not any(a <= at < b for a, b in adamw))
    said = ", ".join(f"{name} {found[name] / len(steps):g}" for name in WAITS)
    say(f"waits of the host a step, over {len(steps)} steps without a line of metrics: {said}")
    return True


# ---------------------------------------------------------------------------------------------- main


def machine(device: str) -> str:
    """What ran."""
    card = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return f"{card}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def prepare(folder: Path, patients: int, size: int) -> Path:
    """Packed phantoms, four a patient."""
    make_phantoms(folder / "phantoms", patients, PhantomSettings(size=size))
    subprocess.run(
        [sys.executable, "-m", "miram", "data", "pack", folder / "phantoms", folder / "packed"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "packed"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model on tiny phantoms")
    parser.add_argument("--batch", type=int, help="images a step (64; small: 8)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=min(12, max(1, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--patients", type=int, help="four phantoms each (64; small: 8)")
    parser.add_argument("--peak-tflops", type=float, help="of the card at half precision, where the table lacks it")
    parser.add_argument("--only", default=",".join(PARTS), help="speed, stop, waits")
    parser.add_argument("--out", type=Path, help="write what is printed here, too")
    return parser.parse_args()


def common(options: argparse.Namespace, shards: Path) -> list[str]:
    """Settings of all runs."""
    batch = options.batch or (8 if options.small else 64)
    every = ["--train.log_every=5", "--train.checkpoint_every=1000000", "--monitor.images=16"]
    data = [f"--data.shards={shards}", f"--data.workers={options.workers}", f"--train.batch_size={batch}"]
    return [*data, *every, *(TINY if options.small else VIT_B)]


def speed_part(bench: Bench) -> bool:
    """All variants ran."""
    runs = speed(bench)
    ratios(runs)
    return len(runs) == len(VARIANTS)


def stop_part(bench: Bench) -> bool:
    """Against the run of the same settings, which `speed` may have made."""
    path = bench.run("bf16") / "metrics.jsonl"
    calm = read_metrics(path) if path.exists() else bench.finish("bf16", *VARIANTS["bf16"])
    return calm is not None and stopped(bench, calm)


PARTS: dict[str, Callable[[Bench], bool]] = {"speed": speed_part, "stop": stop_part, "waits": waits}


def main() -> None:
    """Print the figures; leave with 1 if anything failed."""
    options = arguments()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shards = prepare(folder, options.patients or (8 if options.small else 64), 96 if options.small else 1600)
        bench = Bench(folder, common(options, shards), options.steps, options.device, options.peak_tflops)
        say(machine(options.device))
        say(" ".join(bench.arguments("RUN")).replace(str(folder), "…"))
        passed = [PARTS[part](bench) for part in options.only.split(",")]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(said) + "\n")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
