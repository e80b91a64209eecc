"""Attention variants against fused exact attention: time, FLOPs and memory of a sub-layer, forward and backward.

python benchmarks/attention.py [--device cuda] [--tokens 1024,4096,9216,16384] [--only nystrom,agent]
PYTHONPATH=.typed python benchmarks/attention.py     where miram is not installed: mkdir .typed; ln -s .. .typed/miram

Everything in ATTENTIONS runs with its default options on square grids. The contenders take turns in every round, and a
ratio is the median over the rounds of the ratio within a round, so that whatever else the machine does hits all alike.
On a GPU time is that between two CUDA events around as many calls as take 20 ms, which queue up; on one thread it is
the process's own (others cannot stretch it), on several it is the clock's. `no mixing` is the projections alone, the
floor of every variant. What makes a decoder's block of an attention (norms, MLP, sums) races as `rest of block`;
`block` adds it, `share` is attention's.

FLOPs (matrix products and convolutions, forward) and saved bytes (storages that autograd keeps, weights left out but
not their bf16 copies) are counted on tensors without contents, through the CPU's kernels; peak memory is measured, on a
GPU only. The error, for information, is that of the mixed values against exact softmax, convolutions silenced, where Q,
K and V are a coarse random grid enlarged twice and logits have deviation 1.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from miram.engine.errors import UserError
from miram.engine.files import write_json
from miram.pretrain.attention import ATTENTIONS, build_attention
from miram.pretrain.attention.base import Attention, Grid
from miram.pretrain.plan.count import OWN

BASE, FLOOR, REST = "softmax", "no mixing", "rest of block"
EAGER, XFORMERS = "softmax/eager", "softmax/xformers"  # raced on a GPU, where they can run
LINEAR = [name for name in ATTENTIONS if name != BASE]
GOAL_TOKENS, GOALS, JUDGED, MOST_EXPONENT = 16384, {"cpu": 12.0, "cuda": 4.0}, ("bf16", 9), 1.05
EVENT_SECONDS = 0.02  # between two CUDA events, at least
SQUARES = {str(side * side): side for side in range(2, 513, 2)}
DECODER_GRIDS = (14, 28, 56, 112)  # 224 to 1,792 pixels in patches of 16
HEADER = ["", "median ms", "best ms", "x softmax", "GFLOP", "saved MB", "peak MB", "error"]
HEADER += ["|", "block ms", "x softmax", "share"]
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What the contenders of a race have in common."""

    device: str = "cpu"
    precision: str = "fp32"
    width: int = 512
    heads: int = 16
    batch: int = 1

    def autocast(self, device: str) -> AbstractContextManager[object]:
        """Under which the forward pass runs."""
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass
class Figures:
    """What was found of a contender at one N: FLOPs, bytes, seconds by round, relative error."""

    flops: int
    saved: int
    peak: int | None
    times: list[float] = field(default_factory=list)
    error: float | None = None


Race = dict[str, Figures]  # by contender


class NoMixing(Attention):
    """The projections, and nothing between them."""

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Values, as they are."""
        return V


class RestOfBlock(nn.Module):
    """A decoder's block (pre-norm, MLP four times as wide) without its attention."""

    def __init__(self, D: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.norm1(x)
        return x + self.mlp(self.norm2(x))


def build(name: str, setting: Setting, grid: Grid, prefix_tokens: int = 0) -> nn.Module:
    """A contender by name: `variant` or `softmax/backend`, the floor, or the rest of a block."""
    torch.manual_seed(0)
    if name == REST:
        return RestOfBlock(setting.width)
    if name == FLOOR:
        return NoMixing(setting.width, setting.heads, grid, prefix_tokens)
    variant, _, backend = name.partition("/")
    options = {"backend": backend} if backend else {}
    return build_attention(variant, setting.width, setting.heads, grid, prefix_tokens, **options)


def count(module: nn.Module, shape: tuple[int, ...], setting: Setting) -> tuple[int, int]:
    """FLOPs of a forward pass, and bytes of the distinct storages beside the weights that autograd keeps after it."""
    mode = FakeTensorMode()
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    weights: dict[str, Tensor] = {name: mode.from_tensor(t.cpu()) for name, t in tensors.items()}
    own = {t.untyped_storage()._cdata for t in weights.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return saved

    counter = FlopCounterMode(display=False, custom_mapping=OWN)
    with mode, setting.autocast("cpu"), counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        functional_call(module, weights, (torch.empty(shape, requires_grad=True),))
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


@cache
def reference(setting: Setting, side: int) -> tuple[Tensor, ...]:
    """Q, K, V (1, H, N, d) of a coarse random grid enlarged twice, and exact attention."""
    coarse = torch.randn(3, setting.width, side // 2, side // 2, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(coarse, size=(side, side), mode="bilinear").reshape(3, 1, setting.heads, -1, side * side)
    Q, K, V = (fine / fine.std()).transpose(-1, -2).contiguous().to(setting.device)  # else not the fused kernel
    return Q, K, V, F.scaled_dot_product_attention(Q, K, V)


@torch.no_grad()
def error_of(module: Attention | None, setting: Setting, side: int) -> float:
    """|mix(Q, K, V) - exact| / |exact| without convolution; None: of the mean of V."""
    Q, K, V, exact = reference(setting, side)
    for name, weight in module.named_parameters() if module else ():
        if name.startswith("conv"):
            weight.zero_()
    return float(((module.mix(Q, K, V) if module else V.mean(-2, keepdim=True)) - exact).norm() / exact.norm())


def seconds(run: Step, device: str, calls: int = 1) -> float:
    """Time of a call; on a GPU the mean of several, which queue up."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begin = clock()
        run()
        return clock() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


def training_step(module: nn.Module, setting: Setting, tokens: int) -> Step:
    """Forward and backward on fixed random tokens."""
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(2, setting.batch, tokens, setting.width, generator=generator).to(setting.device)
    x.requires_grad_()

    def run() -> None:
        with setting.autocast(setting.device):
            out = module(x)
        out.backward(gradient.to(out.dtype))
        module.zero_grad(set_to_none=True)
        x.grad = None

    return run


def peak_bytes(run: Step) -> int:
    """Most memory of the GPU that a call holds at once, beside what was there before."""
    run()  # warm up
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def race(names: list[str], setting: Setting, side: int, repeats: int) -> Race:
    """Every figure of every contender that can run at N = side * side."""
    found: Race = {}
    modules: dict[str, nn.Module] = {}
    steps: dict[str, Step] = {}
    for name in names:
        try:
            module = build(name, setting, (side, side)).to(setting.device)
            step = training_step(module, setting, side * side)
            peak = peak_bytes(step) if setting.device == "cuda" else None
            x = (setting.batch, side * side, setting.width)
            counted = (0, 0) if name == XFORMERS else count(module, x, setting)  # it has no CPU kernels to count on
            modules[name], steps[name], found[name] = module, step, Figures(*counted, peak)
        except (RuntimeError, ImportError, ValueError, UserError) as error:  # no memory, no library, no kernel
            if name not in (EAGER, XFORMERS):
                raise
            print(f"{name} is left out at N = {side * side:,}: {str(error).partition(chr(10))[0]}")
    once = {name: EVENT_SECONDS if setting.device == "cpu" else seconds(step, "cuda") for name, step in steps.items()}
    for _ in range(repeats):
        for name, step in steps.items():
            found[name].times.append(seconds(step, setting.device, math.ceil(EVENT_SECONDS / once[name])))
    for name, module in modules.items():
        if name in LINEAR and isinstance(module, Attention):
            found[name].error = error_of(module, setting, side)
    return found


def speedup(base: list[float], other: list[float]) -> float:
    """How many times as fast as the base, by the median over rounds."""
    return median(a / b for a, b in zip(base, other, strict=True))


def table(*rows: list[str]) -> str:
    """Rows with the first cell to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"{row[0]:{widths[0]}s}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows)


def cells(found: Race, name: str) -> list[str]:
    """Every figure of one contender."""
    one, base, rest = found[name], found[BASE].times, found[REST].times
    block, base_block = ([a + b for a, b in zip(times, rest, strict=True)] for times in (one.times, base))
    ratio, block_ratio = f"{speedup(base, one.times):.2f}", f"{speedup(base_block, block):.2f}"
    share = f"{median(a / b for a, b in zip(one.times, block, strict=True)):.0%}"
    row = [name, *(f"{seconds * 1e3:,.2f}" for seconds in (median(one.times), min(one.times)))]
    row += ["" if name == REST else ratio, f"{one.flops / 1e9:.2f}" if one.flops else "-"]
    row += [f"{size / 1e6:,.1f}" if size else "-" for size in (one.saved, one.peak)]
    row += ["" if one.error is None else f"{one.error:.2f}", "|"]
    return row + (["", "", ""] if name == REST else [f"{median(block) * 1e3:,.2f}", block_ratio, share])


def exponents(races: dict[int, Race], name: str) -> tuple[float, float]:
    """Slopes of log FLOPs and log saved bytes over log N."""
    costs = np.log([(found[name].flops, found[name].saved) for found in races.values()])
    flops, saved = np.polyfit(np.log(list(races)), costs, 1)[0].tolist()
    return flops, saved


def growth_table(races: dict[int, Race], linear: list[str]) -> str:
    """How costs grow, and where each variant starts to pay."""
    rows = [["", "FLOP exponent", "saved exponent", "faster than softmax from N ="]]
    for name in (BASE, *linear):
        wins = [N for N, found in races.items() if speedup(found[BASE].times, found[name].times) > 1]
        rows.append([name, *(f"{slope:.3f}" for slope in exponents(races, name)), f"{min(wins):,}" if wins else "-"])
    return table(*rows)


def verdicts(races: dict[int, Race], linear: list[str], setting: Setting) -> Iterator[tuple[bool, str]]:
    """Whether the goals that these races can speak of are met; those on a GPU are for Hopper cards in bf16."""
    for name in linear if len(races) > 1 else ():
        most = max(exponents(races, name))
        yield most <= MOST_EXPONENT, f"{name}: exponents of at most {most:.3f}, goal {MOST_EXPONENT}"
    gpu = setting.device == "cuda"
    if GOAL_TOKENS not in races or (gpu and (setting.precision, torch.cuda.get_device_capability()[0]) != JUDGED):
        return
    found, goal = races[GOAL_TOKENS], GOALS[setting.device]
    for name in linear:
        one, base = found[name], found[BASE]
        ratio = speedup(base.times, one.times)
        yield ratio >= goal, f"{name}: {ratio:.1f} times as fast as SDPA at N = {GOAL_TOKENS:,}, goal {goal:g}"
        if one.peak is not None and base.peak is not None:
            yield one.peak <= base.peak, f"{name}: {one.peak / 1e6:.0f} MB at the peak, SDPA {base.peak / 1e6:.0f}"


def saved_table(names: list[str]) -> str:
    """MB that autograd keeps in a decoder's usual shape; counted, so that N has no limit."""
    setting, rows = Setting(), [["N", *(f"{1 + side * side:,}" for side in DECODER_GRIDS)]]
    for name in names:
        modules = {(1, 1 + side * side, setting.width): build(name, setting, (side, side), 1) for side in DECODER_GRIDS}
        rows.append([name, *(f"{count(module, x, setting)[1] / 1e6:,.1f}" for x, module in modules.items())])
    return table(*rows)


def options_of(name: str) -> str:
    """A variant's default options."""
    options = inspect.signature(ATTENTIONS[name]).parameters.values()
    return ", ".join(f"{p.name}={p.default}" for p in options if p.kind is p.KEYWORD_ONLY)


def machine(device: str) -> str:
    """Processor, torch, threads, and how busy others keep it."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, built with CUDA {torch.version.cuda}"
    facts = dict(re.findall(r"^([^\t]+)\t*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    cpu = f"{facts.get('model name', 'CPU')}, {os.cpu_count()} cores, {facts.get('cpu MHz', '?')} MHz"
    build = f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{cpu}; {build}, {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f} at the start"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--tokens", default="1024,4096,9216,16384", help="squares of even numbers")
    for option, default in (("width", 512), ("heads", 16), ("batch", 1), ("repeats", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", default=",".join(LINEAR), help="variants that race against softmax")
    parser.add_argument("--out", type=Path, help="write every figure here, as JSON")
    found = parser.parse_args()
    found.precision = found.precision or ("bf16" if found.device == "cuda" else "fp32")
    for option, known in (("tokens", SQUARES), ("only", LINEAR)):
        for given in getattr(found, option).split(","):
            if given not in known:
                parser.error(f"--{option}: {given!r} is none of {', '.join([*known][:5])}{' …' * (len(known) > 5)}")
    return found


def main() -> None:
    """Print the figures and whether the goals are met."""
    options = arguments()
    setting = Setting(options.device, options.precision, options.width, options.heads, options.batch)
    linear = options.only.split(",")
    backends = [EAGER, XFORMERS] if setting.device == "cuda" else []
    where = machine(setting.device)
    print(where, f"{setting}; {options.repeats} rounds", *(f"{name}: {options_of(name)}" for name in linear), sep="\n")
    names = [BASE, *backends, *linear, FLOOR, REST]
    race(names, setting, 16, 2)  # warm up
    races: dict[int, Race] = {}
    for side in (SQUARES[N] for N in options.tokens.split(",")):
        races[side * side] = race(names, setting, side, options.repeats)
        mean_error = error_of(None, setting, side)
        print(f"\nN = {side * side:,} ({side} x {side}); error of the mean of all values: {mean_error:.2f}")
        print(table(HEADER, *(cells(races[side * side], name) for name in races[side * side])), flush=True)
    if len(races) > 1:
        print(f"\n{growth_table(races, linear)}\n")
    for passed, text in verdicts(races, linear, setting):
        print(f"{'PASS' if passed else 'FAIL'}  {text}")
    print("\nMB saved for backward: one image, fp32, width 512, 16 heads, one prefix token; counted, nothing was run")
    print(saved_table([BASE, EAGER, *linear, REST]))
    if options.out:
        results = {str(N): {name: asdict(one) for name, one in found.items()} for N, found in races.items()}
        write_json(options.out, "miram.attention_race/1", {"machine": where, **asdict(setting), "results": results})


if __name__ == "__main__":
    main()
