"""`miram plan CONFIG`: what a pretraining costs, before an hour is spent on it.

No data is opened and nothing is computed but a few attentions, which are timed. `count` runs the configured step on
tensors without numbers; the rows of the other attentions come from the same step with that one decoder changed and the
model cut down to single blocks (two where blocks take turns), of which a deeper decoder is made up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...engine.config import load
from ...engine.errors import UserError, one_line
from ...engine.files import write_json
from ...engine.recipe import split_batch
from ..attention import ATTENTIONS, Attention, build_attention
from ..build import build_objective, with_backend
from ..config import PretrainConfig, ScaleSection
from ..encoder import card_for
from .count import Cost, count
from .tables import show
from .timing import machine, time_attention

PLAN = "miram.plan/1"
CARDS = (8, 24, 80, 141)  # GB
HEADROOM = 0.9  # of a card may be filled: context, workspaces and fragmentation are not counted


@dataclass(frozen=True)
class Part:
    """A part of the model; figures an image."""

    name: str
    parameters: int
    sequences: int
    tokens: int
    forward_flops: int
    backward_flops: int
    kept_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a step at the configured micro-batch."""

    weights: int
    gradients: int
    moments: int
    averages: int
    batch: int
    kept: int
    copies: int
    peak: int


@dataclass(frozen=True)
class Variant:
    """A decoder with one of the attentions; figures an image but `peak_bytes`, of the whole step."""

    attention: str
    configured: bool
    refused: str = ""
    parameters: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    kept_bytes: int = 0
    peak_bytes: int = 0
    seconds: float | None = None
    extrapolated: bool = False
    fastest: bool = False


@dataclass(frozen=True)
class Plan:
    """All of it."""

    objective: str
    precision: str
    micro_batch: int
    batch: int
    parts: list[Part]
    memory: Memory
    cards: dict[int, int]
    """GB -> largest micro-batch that fits, 0 if none"""
    variants: dict[str, list[Variant]]
    """by decoder"""
    timed_on: str | None


def plan(config: str, arguments: Sequence[str] = (), *, timed: bool = True, json: Path | None = None) -> Plan:
    """`miram plan CONFIG --a.b=value …`.

    Args:
        timed: time the attentions on this machine; otherwise the fewest operations count as fastest.
        json: file that gets the same figures.

    Raises:
        UserError: the configuration is not usable.
    """
    found = plan_of(load(PretrainConfig, config, arguments), timed=timed)
    show(found)
    if json is not None:
        write_json(json, PLAN, asdict(found))
    return found


def plan_of(settings: PretrainConfig, *, world: int = 1, timed: bool = False, compared: bool = True) -> Plan:
    """The plan of a rank among `world`.

    Args:
        timed: time the attentions on this machine.
        compared: count all of them.
    """
    settings = countable(settings)
    say(f"counting a step of {settings.objective}")
    cost = cost_of(settings)
    micro_batch, accumulation = split_batch(settings.train, world)
    batch = micro_batch * accumulation
    compared = compared and settings.objective == "miram"
    return Plan(
        objective=settings.objective,
        precision=settings.train.precision,
        micro_batch=micro_batch,
        batch=batch,
        parts=list(parts_of(cost)),
        memory=memory_of(cost, micro_batch, batch),
        cards={gb: cost.largest_micro_batch(HEADROOM * gb * 1e9, batch) for gb in CARDS},
        variants=compare(settings, cost, timed) if compared else {},
        timed_on=machine() if timed and compared else None,
    )


def cost_of(settings: PretrainConfig) -> Cost:
    """Counted with one channel: the data, which may have others, stay closed."""
    card = card_for(settings.model.encoder, settings.model.size, {"in_chans": 1} | settings.model.encoder_options)
    return count(lambda: build_objective(settings, card)[0], settings.train.precision, settings.train.ema is not None)


def countable(settings: PretrainConfig) -> PretrainConfig:
    """As the configuration, from random weights, which cost the same, and with torch's kernel in place of xformers'.

    xformers has none for fake tensors; it keeps what torch's own fused attention keeps.
    """

    def fused(section: ScaleSection) -> ScaleSection:
        if section.options.get("backend") != "xformers":
            return section
        return section.model_copy(update={"options": {**section.options, "backend": "sdpa"}})

    model = settings.model
    backend = "sdpa" if model.attention_backend == "xformers" else model.attention_backend
    scales = tuple(fused(section) for section in model.scales)
    return with_model(settings, attention_backend=backend, scales=scales).model_copy(update={"init": None})


def say(what: str) -> None:
    """Tell whoever waits; apart from the figures."""
    print(f"miram: {what} …", file=sys.stderr, flush=True)


def with_model(settings: PretrainConfig, **changes: Any) -> PretrainConfig:
    """The configuration with other values in `model`."""
    return settings.model_copy(update={"model": settings.model.model_copy(update=changes)})


def parts_of(cost: Cost) -> Iterator[Part]:
    """Rows of the model."""
    for name in dict.fromkeys([*cost.parameters, *cost.held]):
        sequences, tokens, _ = cost.sequences.get(name, (0, 0, 0))
        counted = (cost.parameters[name], sequences, tokens, cost.forward[name], cost.backward[name], cost.held[name])
        yield Part(name, *counted)


def memory_of(cost: Cost, micro_batch: int, batch: int) -> Memory:
    """What lies on the device, and the most of it at once."""
    return Memory(
        weights=cost.weights,
        gradients=cost.trainable,
        moments=2 * cost.trainable,
        averages=cost.averages,
        batch=micro_batch * cost.inputs,
        kept=micro_batch * cost.held.total(),
        copies=cost.fixed,
        peak=cost.peak(micro_batch, batch),
    )


# ---------------------------------------------------------------------------------------------- other attentions


def compare(settings: PretrainConfig, cost: Cost, timed: bool) -> dict[str, list[Variant]]:
    """Every attention in every decoder that has one."""
    return {
        f"decoders.{section.scale}": mark_fastest(variants_of(settings, cost, index, timed))
        for index, section in enumerate(settings.model.scales)
        if section.tokens == "upsampled"
    }


def variants_of(settings: PretrainConfig, cost: Cost, index: int, timed: bool) -> list[Variant]:
    """One decoder with each attention: the configured one as it is, others with their default options."""
    section = settings.model.scales[index]
    base = cost_of(cut_down(settings, index, section))
    found = []
    for name in ATTENTIONS:
        say(f"counting{' and timing' * timed} decoders.{section.scale} with {name}")
        own = name == section.attention
        changed = section if own else section.model_copy(update={"attention": name, "options": {}})
        try:
            other = base if own else cost_of(cut_down(settings, index, changed))
        except (UserError, ValueError) as error:
            found.append(Variant(name, configured=False, refused=one_line(str(error))))
            continue
        peak = cost_peak(settings, cost) + deep_peak(settings, changed, other) - deep_peak(settings, section, base)
        variant = counted(changed, other, own, peak)
        found.append(time_variant(settings, changed, other, variant) if timed else variant)
    return found


def cut_down(settings: PretrainConfig, index: int, section: ScaleSection) -> PretrainConfig:
    """As few blocks as the decoder in question is made up of, and single ones elsewhere, which no figure depends on."""
    different = ATTENTIONS[section.attention].options_of_block
    blocks = min(section.depth, 1 if different(0) == different(1) else 2)
    single = {"depth": 1, "attention": "softmax", "options": {}}
    scales = [
        other.model_copy(update={"depth": blocks} if i == index else single)
        for i, other in enumerate(with_scale(settings, index, section).model.scales)
    ]
    options = {**settings.model.encoder_options, "depth": 1}
    return with_model(settings, attention_backend="auto", scales=tuple(scales), encoder_options=options)


def with_scale(settings: PretrainConfig, index: int, section: ScaleSection) -> PretrainConfig:
    """The configuration with another decoder, which has the model's backend if it names none."""
    scales = list(settings.model.scales)
    scales[index] = with_backend(section, settings.model.attention_backend)
    return with_model(settings, scales=tuple(scales))


def counted(section: ScaleSection, cost: Cost, configured: bool, peak: int) -> Variant:
    """Figures of the whole decoder, by its blocks."""
    part = f"decoders.{section.scale}"
    more = cost.beyond(part, section.depth)
    return Variant(
        attention=section.attention,
        configured=configured,
        parameters=cost.parameters[part] + more["parameters"],
        forward_flops=cost.forward[part] + more["forward"],
        backward_flops=cost.backward[part] + more["backward"],
        kept_bytes=cost.held[part] + more["held"],
        peak_bytes=peak,
    )


def cost_peak(settings: PretrainConfig, cost: Cost) -> int:
    """Most bytes at once, at the configured micro-batch."""
    micro_batch, accumulation = split_batch(settings.train, world=1)
    return cost.peak(micro_batch, micro_batch * accumulation)


def deep_peak(settings: PretrainConfig, section: ScaleSection, cost: Cost) -> int:
    """That of a cut-down model, and what the decoder's other blocks hold for as long: weights, moments, and gradients
    where micro-batches accumulate them; copies; what is kept for backward."""
    more = cost.beyond(f"decoders.{section.scale}", section.depth)
    micro_batch, accumulation = split_batch(settings.train, world=1)
    state = (4 if accumulation > 1 else 3) * 4 * more["parameters"]
    return cost_peak(settings, cost) + state + more["fixed"] + micro_batch * more["held"]


def time_variant(settings: PretrainConfig, section: ScaleSection, cost: Cost, variant: Variant) -> Variant:
    """With the seconds of one of its attentions."""
    decoder = cost.objective.get_submodule(f"decoders.{section.scale}")
    like = next(module for module in decoder.modules() if isinstance(module, Attention))
    options = with_backend(section, settings.model.attention_backend).options

    def build(grid: tuple[int, int]) -> Attention:
        return build_attention(section.attention, like.dim, like.num_heads, grid, like.prefix_tokens, **options)

    sequences = cost.sequences[f"decoders.{section.scale}"][0]
    timing = time_attention(build, section.attention, sequences, like.grid, settings.train.precision)
    return replace(variant, seconds=timing.seconds, extrapolated=timing.extrapolated)


def mark_fastest(variants: list[Variant]) -> list[Variant]:
    """Least time where it was taken, else fewest operations."""
    able = [variant for variant in variants if not variant.refused]
    best = min(able, key=lambda v: v.seconds if v.seconds is not None else v.forward_flops + v.backward_flops)
    return [replace(variant, fastest=variant is best) for variant in variants]
