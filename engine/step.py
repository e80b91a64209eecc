"""One optimizer step on a global batch: the same on any number of ranks and micro-batches, but for rounding.

Nothing here waits for the device. Where a loss is no number, the flag that says so stays there, too: the optimizer
reads it and leaves everything as it is, and the loop learns of it a step later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .ema import Ema
from .guard import Bulletin, Culprits
from .launch import strategy
from .loss_scale import LossScale
from .noise import per_sample
from .objective import Batch, Objective
from .optim import make_optimizer, set_lr
from .parallel import without_sync, wrap
from .recipe import TrainSection, split_batch
from .schedule import learning_rate, scaled_lr
from .seeding import stable_seed
from .tensors import whole

KEY = "key"  # of a batch: names of its samples
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Outcome:
    """What came of a step, on the device."""

    losses: Tensor
    """(S,) of the global batch"""
    norm: Tensor
    """() of its gradient, before clipping"""
    clipped: Tensor
    """() whether that was too large"""
    skipped: Tensor
    """() whether fp16 overflowed, so that nothing was learnt"""
    damaged: Tensor
    """() samples of all ranks that others stood in for"""


class Learner:
    """An objective, its optimizer, and how a step is taken.

    Args:
        objective: what is learnt; its parameters go to this rank's device, or lie in shards on all.
        section: how to train.
        steps: of the whole training.
        warmup_steps: of these.
        seed: of whatever is random in a step.
        accelerator: the group of ranks.

    Raises:
        UserError: the global batch does not divide into ranks and micro-batches.
    """

    def __init__(
        self,
        objective: Objective,
        section: TrainSection,
        steps: int,
        warmup_steps: int,
        seed: int,
        accelerator: Accelerator,
    ):
        self.objective, self.section, self.seed, self.accelerator = objective, section, seed, accelerator
        self.steps, self.warmup_steps = steps, warmup_steps
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        self.micro_batch, self.accumulation = split_batch(section, self.world)
        self.noise = per_sample(objective)
        self.strategy = strategy(section.parallel, self.world)
        self.model = wrap(objective, accelerator, self.strategy, section.compile)
        self.optimizer = make_optimizer(objective, section)  # of the parameters as they are after wrapping
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.ema = Ema(objective, section.ema) if section.ema else None
        self.loss_scale = LossScale(self.device, enabled=section.precision == "fp16")
        self.loss_weights = torch.tensor(objective.loss_weights, device=self.device)
        self.places = torch.arange(self.micro_batch, device=self.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=self.device)  # once true, nothing is learnt any more
        self.bulletin, self.culprits = Bulletin(self.device), Culprits()

    def learn(
        self, step: int, batches: list[Batch], stop: bool = False, save: bool = False, damaged: int = 0
    ) -> Outcome:
        """Take step number `step`, counted from 0, on a global batch of which `batches` are this rank's micro-batches.

        Args:
            stop: this rank was told to stop; goes on the bulletin.
            save: it finds that it is time for a checkpoint.
            damaged: samples of this rank that others stood in for.
        """
        torch.manual_seed(stable_seed(self.seed, "step", step) % 2**63)
        self.objective.begin_step(step, self.steps)
        moved = [OnDevice(batch, self.device) for batch in batches]
        counts = self.count(moved)
        shares = torch.stack([self.backward(step, i, batch, counts) for i, batch in enumerate(moved)])
        bad = ~shares.isfinite().all(1)
        self.culprits.note(step + 1, bad, [batch.get(KEY, []) for batch in batches])
        told = torch.stack([bad.any().float(), *map(self.number, (stop, save, damaged))])
        sums = self.over_ranks(torch.cat([shares.sum(0), told]))
        losses, (some_bad, some_stop, some_save, all_damaged) = sums[:-4], sums[-4:]
        outcome = self.update(step, losses, some_bad > 0, all_damaged)
        self.bulletin.post(step + 1, torch.stack([self.broken, some_stop > 0, some_save > 0]))
        return outcome

    def count(self, batches: list[OnDevice]) -> Tensor:
        """(S,) how much each loss of the global batch counts; where nothing does, its sum is zero too."""
        total = self.over_ranks(torch.stack([self.objective.counts(batch) for batch in batches]).sum(0))
        return total.where(total > 0, 1)

    def backward(self, step: int, i: int, batch: OnDevice, counts: Tensor) -> Tensor:
        """(S,) shares of micro-batch number `i` in the losses of the global batch; adds its gradient."""
        first = (self.rank * self.accumulation + i) * self.micro_batch
        self.noise.set(stable_seed(self.seed, "noise", step), self.places + first)
        last = i + 1 == self.accumulation
        with nullcontext() if last else without_sync(self.model, self.accelerator, self.strategy):
            with self.autocast():
                sums = self.model(batch.take())
            shares = sums / counts
            # Gradients are averaged over ranks; the losses are already shares of the global sum.
            total = (shares * self.loss_weights).sum() * self.world
            (total * self.loss_scale.scale).backward()
        return shares.detach()

    def update(self, step: int, losses: Tensor, bad: Tensor, damaged: Tensor) -> Outcome:
        """Clip, step the optimizer at this step's learning rate, clear.

        Where a loss or the norm is no number, and ever after, the optimizer's own flag keeps weights and moments as
        they are. With fp16 a norm that overflows is no fault while the loss is scaled up: the step is skipped, and the
        loss scaled less from then.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.loss_scale.unscale_(gradients)
        norm, limit = get_total_norm(gradients), self.section.clip_grad or math.inf
        if self.section.clip_grad:
            clip_grads_with_norm_(self.parameters, limit, norm)
        norm = whole(norm)
        overflowed = ~norm.isfinite()
        self.broken = self.broken | bad | (overflowed & (self.loss_scale.scale <= 1))
        cast(Any, self.optimizer).found_inf = (self.broken | overflowed).float()
        set_lr(self.optimizer, self.lr(step))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss_scale.update(overflowed)
        if self.ema:
            self.ema.update(step)
        return Outcome(losses, norm, (norm > limit) & ~overflowed, overflowed, damaged)

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(
            step,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            peak=scaled_lr(self.section.blr, self.section.batch_size),
            schedule=self.section.schedule,
            cooldown=self.section.cooldown,
            lr_floor=self.section.lr_floor,
        )

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        precision = self.section.precision
        return torch.autocast(self.device.type, AUTOCAST[precision], enabled=precision != "fp32")

    def over_ranks(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(values, "sum") if self.world > 1 else values

    def number(self, value: float) -> Tensor:
        """On the device without waiting for it."""
        return torch.full((), float(value), device=self.device)

    @property
    def averages(self) -> dict[str, Tensor]:
        """Moving averages of the weights, where they are kept."""
        return self.ema.tensors if self.ema else {}


class OnDevice(Mapping[str, Tensor]):
    """The tensors of a batch, each of which goes to the device once, when it is first asked for: counting needs few.

    Names of samples stay out: a compiled model would be compiled anew for each.
    """

    def __init__(self, batch: Batch, device: torch.device):
        self.tensors, self.device = {name: x for name, x in batch.items() if isinstance(x, Tensor)}, device

    def __getitem__(self, name: str) -> Tensor:
        self.tensors[name] = self.tensors[name].to(self.device, non_blocking=True)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def take(self) -> dict[str, Tensor]:
        """All of them on the device, and none kept here: the next micro-batch needs the room."""
        taken = {name: self[name] for name in list(self.tensors)}
        self.tensors.clear()
        return taken
