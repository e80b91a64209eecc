"""How long one attention takes on this machine, forward and backward."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from statistics import median
from time import perf_counter

import torch

from ...engine.launch import device
from ..attention import Attention, Grid

SMALL = 1024  # tokens that any attention is timed at first
PATIENCE = 2.0  # seconds that a single pass may take
ORDER = {"softmax": 2}  # time grows with this power of the tokens; with the first where nothing is said


@dataclass(frozen=True)
class Timing:
    """Seconds of one attention for one image, and whether it was timed at a smaller grid."""

    seconds: float
    extrapolated: bool


def time_attention(build: Callable[[Grid], Attention], name: str, sequences: int, grid: Grid, precision: str) -> Timing:
    """Forward and backward of an attention on this machine's accelerator or processor.

    A grid that would take longer than PATIENCE is not run: the largest one that does not is, and scaled up.

    Args:
        build: makes the attention for a grid.
        name: of the attention, a key of ATTENTIONS.
        sequences: of an image, more than one where its grid is decoded in tiles.
        grid: of tokens.
        precision: `bf16` or `fp32`.
    """
    order, found = ORDER.get(name, 1), Timing(0.0, True)
    for side in grids_up_to(grid):
        growth = (prod(grid) / prod(side)) ** order
        so_far = found.seconds / growth  # what it would take here, by the grid before
        if so_far > PATIENCE:
            break
        try:
            attention = build(side)
        except ValueError:  # the options do not suit this smaller grid
            continue
        found = Timing(time_pass(attention, sequences, precision) * growth, extrapolated=side != grid)
    return found


def grids_up_to(grid: Grid) -> list[Grid]:
    """The grid and its halves, quarters, … down to SMALL tokens, smallest first."""
    grids = [grid]
    while prod(grids[0]) > SMALL and min(grids[0]) > 1:
        grids.insert(0, (grids[0][0] // 2, grids[0][1] // 2))
    return grids


def time_pass(attention: Attention, sequences: int, precision: str) -> float:
    """Median seconds of a forward and backward pass."""
    where = device()
    attention = attention.to(where)
    x = torch.randn(sequences, attention.prefix_tokens + prod(attention.grid), attention.dim, device=where)
    x.requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> None:
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            y = attention(x)
        y.backward(gradient.to(y.dtype))

    return median_seconds(step)


def median_seconds(step: Callable[[], None], least: float = 0.2) -> float:
    """Of as many calls as fill `least` seconds, three unless they are long, after one that warms up."""

    def synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    taken: list[float] = []
    while sum(taken) < least or (len(taken) < 3 and sum(taken) < 5 * least):
        synchronise()
        began = perf_counter()
        step()
        synchronise()
        taken.append(perf_counter() - began)
    return median(taken)


def machine() -> str:
    """What was timed on."""
    where = device()
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    name = platform.processor() or platform.machine()
    return f"{where.type} ({name}, {torch.get_num_threads()} threads)"
