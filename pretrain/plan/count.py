r"""What a training step costs, found by running it on tensors that have shapes but no numbers.

The step (forward and backward) runs under torch's fake tensors: every operation is dispatched as on the processor,
none is computed. A ledger underneath adds up the products and knows which storages
are alive, so that every option of the model is counted as it is, not as a formula has it: checkpointing pays with
operations in backward, autocast with copies of the weights, fused attention keeps no N x N map.

    live bytes |      _/\_          The step runs with 2 and with 3 images. Between two marks (a module begins, ends, or
               |    _/    \_        its gradient arrives) the highest level is linear in the images, which gives the
               |  _/        \___    peak for any number of them.
               |_/______________\__ marks
                 forward  backward
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from ...engine.step import AUTOCAST
from ..build import PretrainObjective

REST = "rest"  # what belongs to no module: targets, losses, filling in mask tokens
ENCODER = "encoder"
FEW, MORE = 2, 3  # images; with a single one, reshapes that copy would be views

aten = torch.ops.aten
Formula = Callable[..., int]
Line = npt.NDArray[np.int64]


def sdpa(query: Tensor, key: Tensor, *_: object, **__: object) -> int:
    """Two products for fused attention on the processor, which older torch does not count."""
    return 2 * 2 * query.numel() * key.shape[-2]


def sdpa_backward(grad: Tensor, query: Tensor, key: Tensor, *_: object, **__: object) -> int:
    """Five products: the map is computed again."""
    return 5 * 2 * query.numel() * key.shape[-2]


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *more: Any, **_: object) -> int:
    """As many products as forward for each gradient wanted; torch's own count is off by the channels if they are
    grouped, as in depth-wise convolutions."""
    transposed, wanted = more[4], more[7]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)
    return int(forward) * (int(wanted[0]) + int(wanted[1]))


OWN: dict[Any, Formula] = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward,
    aten.convolution_backward: convolution_backward,
}
for formula in OWN.values():
    vars(formula)["_get_raw"] = True  # as FlopCounterMode(custom_mapping=OWN) knows those that want tensors, not shapes
FORMULAS: dict[Any, Formula] = {**flop_registry, **OWN}


class Ledger(TorchDispatchMode):
    """Counts floating-point operations (two a multiply-add) and live bytes by the part of the model they belong to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self.live: Counter[str] = Counter()
        self.bytes = 0
        self.levels = [0]  # highest between marks
        self.born: dict[int, int] = {}  # storage -> between which marks
        self.stack: list[str] = []
        self.base = ENCODER
        self.sequences: dict[str, tuple[int, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # what fake tensors ask all the time
            return out
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops[self.part] += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        self.levels[-1] = max(self.levels[-1], self.bytes)
        return out

    @property
    def part(self) -> str:
        """Where in the model the present operation is."""
        return self.stack[-1] if self.stack else self.base

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there anyway: weights, the batch."""
        self.born |= {tensor.untyped_storage()._cdata: -1 for tensor in tensors}

    def note(self, tensor: Tensor) -> None:
        """A storage is alive from the operation that made it until torch lets go of it."""
        storage = tensor.untyped_storage()
        key, size, part = storage._cdata, storage.nbytes(), self.part
        if key not in self.born:
            self.born[key] = len(self.levels) - 1
            self.book(part, size)
            weakref.finalize(storage, self.drop, key, part, size).atexit = False

    def drop(self, key: int, part: str, size: int) -> None:
        """Torch let go of a storage."""
        del self.born[key]
        self.book(part, -size)

    def book(self, part: str, size: int) -> None:
        """So many bytes more."""
        self.live[part] += size
        self.bytes += size

    def mark(self) -> None:
        """Another stretch of the step begins."""
        self.levels.append(self.bytes)

    def follow(self, objective: nn.Module) -> None:
        """Learn from hooks in which part of the model an operation runs, forward and backward."""
        for name, module in objective.named_modules():
            if name:
                part = place_of(f"{name}.")
                module.register_forward_pre_hook(self.entering(part, first=name.endswith("blocks.0")))
                module.register_forward_hook(self.leaving(part))

    def entering(self, part: str, first: bool) -> Callable[..., None]:
        """Hook for a module that is about to run."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.mark()
            self.stack.append(part)
            if first:
                self.sequences.setdefault(row_of(part), tuple(inputs[0].shape))

        return hook

    def leaving(self, part: str) -> Callable[..., None]:
        """Hook for a module that has run; when the gradient gets to its output, backward is in that part.

        Recomputation stops in the middle of a module as soon as it has what it needs, which leaves its name on the
        stack.
        """

        def arrived(_: Tensor) -> None:
            self.mark()
            self.stack.clear()
            self.base = part

        def hook(module: nn.Module, inputs: object, outputs: Any) -> None:
            self.mark()
            self.stack.pop()
            if part != self.base == ENCODER and not self.stack:
                self.base = REST
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    cast(Any, output).register_hook(arrived)

        return hook


def place_of(name: str) -> str:
    """`decoders.2.blocks.0.attn` -> `decoders.2.blocks.0`, `decoders.2.head` -> `decoders.2`, `encoder.…` -> `encoder`:
    where something belongs, decoders block by block."""
    parts = name.split(".")
    if len(parts) == 1:
        return REST
    if parts[0] != "decoders":
        return parts[0]
    return ".".join(parts[: 4 if parts[2:3] == ["blocks"] and parts[3] else 2])


def row_of(place: str) -> str:
    """`decoders.2.blocks.0` -> `decoders.2`: rows of the plan."""
    return place.partition(".blocks.")[0]


def rows(places: Counter[str]) -> Counter[str]:
    """Blocks added up."""
    found: Counter[str] = Counter()
    for place, value in places.items():
        found[row_of(place)] += value
    return found


@dataclass(frozen=True)
class Step:
    """A step of some images: flops and bytes by place in the model, and live bytes after every operation."""

    objective: PretrainObjective
    forward: Counter[str]
    backward: Counter[str]
    held: Counter[str]
    fresh: Line
    """levels of a step without accumulation"""
    again: Line
    """and of a micro-batch that finds the gradients of others in place"""
    sequences: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cost:
    """What a step costs; counters are by part of the model, and all but `parameters` an image."""

    parameters: Counter[str]
    forward: Counter[str]
    """floating-point operations"""
    backward: Counter[str]
    held: Counter[str]
    """bytes kept from forward for backward"""
    fixed: int
    """bytes kept for backward whatever the batch: the weights' copies of autocast"""
    sequences: dict[str, tuple[int, ...]]
    """(sequences an image, tokens, width) that each part's first block sees"""
    weights: int
    """bytes of parameters and buffers"""
    trainable: int
    """bytes of trainable parameters: once more for gradients, twice for AdamW's moments"""
    averages: int
    """bytes of `train.ema`: averages of the weights, and a model to look at that has them"""
    inputs: int
    """bytes of a sample on the device"""
    levels: dict[bool, tuple[Line, Line]]
    """levels (of FEW images, more an image), without and with gradients in place"""
    objective: PretrainObjective
    """what was counted, without data"""
    places: dict[str, Counter[str]]
    """parameters, forward, backward, held and fixed once more, decoders block by block"""

    def beyond(self, decoder: str, depth: int) -> Counter[str]:
        """What more blocks would add to a decoder, up to `depth` of them, where those that were counted take turns."""
        blocks = [place for place in self.places["parameters"] if place.startswith(f"{decoder}.blocks.")]
        more = [blocks[i % len(blocks)] for i in range(len(blocks), depth)]
        return Counter({name: sum(counter[place] for place in more) for name, counter in self.places.items()})

    def peak(self, micro_batch: int, batch: int) -> int:
        """Most bytes at once: with weights, moments, averages and the micro-batch itself."""
        start, slope = self.levels[micro_batch < batch]
        work = int((start + (micro_batch - FEW) * slope).max())
        return self.weights + 2 * self.trainable + self.averages + micro_batch * self.inputs + work

    def largest_micro_batch(self, limit: float, batch: int) -> int:
        """Most images at once whose peak is within the limit, of at most `batch`; 0: not even one."""
        return bisect_right(range(1, batch + 1), limit, key=lambda images: self.peak(images, batch))


def count(build: Callable[[], PretrainObjective], precision: str, averaged: bool = False) -> Cost:
    """The cost of a training step.

    Args:
        build: makes the objective; called where torch allocates nothing.
        precision: as in training.
        averaged: whether training keeps a moving average of the weights.
    """
    few, more = run_step(build, precision, FEW), run_step(build, precision, MORE)
    objective, held = few.objective, minus(more.held, few.held)
    parameters: Counter[str] = Counter()
    for name, parameter in objective.named_parameters():
        parameters[place_of(name)] += parameter.numel()
    weights = sum(t.untyped_storage().nbytes() for t in state_of(objective))
    trainable = sum(p.untyped_storage().nbytes() for p in objective.parameters() if p.requires_grad)
    places = {
        "parameters": parameters,
        "forward": minus(more.forward, few.forward),
        "backward": minus(more.backward, few.backward),
        "held": held,
        "fixed": minus(few.held, Counter({place: FEW * size for place, size in held.items()})),
    }
    return Cost(
        parameters=rows(parameters),
        forward=rows(places["forward"]),
        backward=rows(places["backward"]),
        held=rows(held),
        fixed=places["fixed"].total(),
        sequences={part: (shape[0] // FEW, *shape[1:]) for part, shape in few.sequences.items()},
        weights=weights,
        trainable=trainable,
        averages=(weights + trainable) * averaged,
        inputs=sum(4 * prod(shape) for shape in objective.inputs.values()),
        levels={False: (few.fresh, more.fresh - few.fresh), True: (few.again, more.again - few.again)},
        objective=objective,
        places=places,
    )


def run_step(build: Callable[[], PretrainObjective], precision: str, images: int) -> Step:
    """A step of so many images on fake tensors."""
    with torch.device("meta"):
        objective = build()
    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        ledger.follow(objective)
        batch = {name: torch.rand(images, *shape) for name, shape in objective.inputs.items()}
        ledger.ignore([*state_of(objective), *batch.values()])
        with ledger:
            with torch.autocast("cpu", dtype=AUTOCAST[precision], enabled=precision != "fp32"):
                losses = objective(batch)
            forward, held, ledger.base = ledger.flops.copy(), ledger.live.copy(), REST
            losses.sum().backward()
    fresh = np.array(ledger.levels, dtype=np.int64)
    return Step(
        objective,
        forward,
        minus(ledger.flops, forward),
        held,
        fresh,
        fresh + accumulating(objective, ledger),
        ledger.sequences,
    )


def accumulating(objective: PretrainObjective, ledger: Ledger) -> Line:
    """(levels,) more live bytes where gradients are in place: all from the start, new ones gone once added."""
    gradients = [p.grad.untyped_storage() for p in objective.parameters() if p.grad is not None]
    added = np.zeros(len(ledger.levels) + 1, dtype=np.int64)
    for storage in gradients:
        added[ledger.born[storage._cdata] + 1] += storage.nbytes()
    return added.sum() - added.cumsum()[:-1]


def state_of(objective: PretrainObjective) -> list[Tensor]:
    """What is there before a step."""
    return [*objective.parameters(), *objective.buffers()]


def minus(a: Counter[str], b: Counter[str]) -> Counter[str]:
    """Difference that keeps what is negative."""
    return Counter({key: a[key] - b[key] for key in a})
