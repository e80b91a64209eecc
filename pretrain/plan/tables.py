"""A plan for people: tables on a terminal, aligned lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from . import Part, Plan, Variant

Rows = Sequence[Sequence[str]]

PART = ("part", "parameters", "tokens", "GFLOP fwd", "bwd", "kept MB")
VARIANT = ("attention", "parameters", "GFLOP fwd", "bwd", "kept MB", "peak GB", "ms", "")
NOT_COUNTED = (
    "Not counted: the device's context and libraries, kernels' workspaces, fragmentation (a card counts as full at "
    "90 %), DDP's buckets (gradients once more), torch.compile."
)


def show(plan: Plan, console: Console | None = None) -> None:
    """Print it."""
    console = console or Console()
    images = f"micro-batch {plan.micro_batch} of a batch of {plan.batch}, {plan.precision}"
    table(console, f"{plan.objective}, per image", PART, [part_row(part) for part in [*plan.parts, total(plan)]])
    table(console, f"memory, {images}", ("what", "GB"), memory_rows(plan))
    table(console, "cards: computed, not run", ("card", "this micro-batch", "largest"), card_rows(plan))
    for decoder, variants in plan.variants.items():
        table(console, f"{decoder} with every attention, per image", VARIANT, [variant_row(v) for v in variants])
    for sentence in notes(plan):
        console.print(sentence, soft_wrap=True, highlight=False)


def table(console: Console, title: str, header: Sequence[str], rows: Rows) -> None:
    """First column to the left, figures to the right."""
    if not console.is_terminal:
        console.print("\n".join([f"{title}:", *aligned([header, *rows]), ""]), soft_wrap=True, highlight=False)
        return
    drawn = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        drawn.add_column(name, justify="right" if number and name else "left")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)


def aligned(rows: Rows) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pads = [str.ljust] + [str.rjust] * (len(widths) - 1)
    return ["  " + "  ".join(pad(x, w) for pad, x, w in zip(pads, row, widths, strict=True)).rstrip() for row in rows]


def part_row(part: Part) -> list[str]:
    """A part's figures in people's units."""
    tokens = f"{part.sequences} x {part.tokens:,}" if part.sequences > 1 else f"{part.tokens:,}" if part.tokens else "-"
    return [part.name, f"{part.parameters:,}", tokens, *figures(part)]


def figures(part: Part | Variant) -> list[str]:
    """Operations forward and backward, bytes kept."""
    return [f"{part.forward_flops / 1e9:,.2f}", f"{part.backward_flops / 1e9:,.2f}", f"{part.kept_bytes / 1e6:,.2f}"]


def total(plan: Plan) -> Part:
    """The sum of the parts."""
    kind = type(plan.parts[0])
    names = ("parameters", "forward_flops", "backward_flops", "kept_bytes")
    sums = {name: sum(getattr(part, name) for part in plan.parts) for name in names}
    return kind(name="all", sequences=0, tokens=0, **sums)


def memory_rows(plan: Plan) -> list[list[str]]:
    """What fills the device."""
    memory = plan.memory
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "AdamW's moments": memory.moments,
        "averages (train.ema)": memory.averages,
        "images of a micro-batch": memory.batch,
        "kept for backward": memory.kept,
        "weights in half precision": memory.copies,
        "peak (with what lives shortly)": memory.peak,
    }
    return [[name, f"{size / 1e9:,.2f}"] for name, size in rows.items()]


def card_rows(plan: Plan) -> list[list[str]]:
    """Which cards would do."""
    return [
        [f"{gb} GB", "fits" if plan.memory.peak <= 0.9 * gb * 1e9 else "too much", f"{most:,}" if most else "none"]
        for gb, most in plan.cards.items()
    ]


def variant_row(variant: Variant) -> list[str]:
    """An attention's figures in people's units, or why it cannot stand here."""
    name = f"{variant.attention} *" if variant.configured else variant.attention
    if variant.refused:
        return [name, *["-"] * 6, "refused"]
    ms = "-" if variant.seconds is None else f"{1e3 * variant.seconds:,.1f}{'~' if variant.extrapolated else ''}"
    peak = f"{variant.peak_bytes / 1e9:,.2f}"
    mark = ("least" if variant.seconds is None else "fastest") if variant.fastest else ""
    return [name, f"{variant.parameters:,}", *figures(variant), peak, ms, mark]


def notes(plan: Plan) -> list[str]:
    """How the figures are to be read."""
    said = [NOT_COUNTED]
    if plan.timed_on:
        said += [
            f"ms: one attention of one image, forward and backward in {plan.precision}, on this machine, "
            f"{plan.timed_on}; `fastest` is the least of it. Another machine may order them otherwise."
        ]
    elif plan.variants:
        said += ["least: the fewest operations, which need not be the fastest; nothing was timed."]
    if plan.variants:
        said += ["*: as configured. fwd, bwd: forward and backward."]
    said += [
        f"{decoder} with {variant.attention}: {variant.refused}."
        for decoder, variants in plan.variants.items()
        for variant in variants
        if variant.refused
    ]
    if any(variant.extrapolated for variants in plan.variants.values() for variant in variants):
        said += ["~: extrapolated from a smaller grid, softmax with the square of the tokens, others in proportion."]
    return said
