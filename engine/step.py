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
from torch.nn.utils import clip_grad_norm_

from .ema import Ema
from .guard import Bulletin, Culprits
from .launch import strategy
from .loss_scale import LossScale
from .noise import per_sample
from .objective import Batch, Objective
from .optim import adamw, set_lr
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
        self.model = wrap(objective, accelerator, strategy(section.parallel), section.compile)
        self.adamw = adamw(objective, section)  # of the parameters as they are after wrapping
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.ema = Ema(objective, section.ema) if section.ema else None
        self.loss_scale = LossScale(self.device, enabled=section.precision == "fp16")
        self.loss_weights = torch.tensor(objective.loss_weights, device=self.device)
        self.places = torch.arange(self.micro_batch, device=self.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=self.device)  # once true, nothing is learnt any more
        self.bulletin, self.culprits = Bulletin(self.device), Culprits()

    def learn(self, step: int, batches: list[Batch], stop: bool = False, save: bool = False) -> Outcome:
        """Take step number `step`, counted from 0, on a global batch of which `batches` are this rank's micro-batches.

        Args:
            stop: this rank was told to stop; goes on the bulletin.
            save: it finds that it is time for a checkpoint.
        """
        torch.manual_seed(stable_seed(self.seed, "step", step) % 2**63)
        self.objective.begin_step(step, self.steps)
        counts = self.count(batches)
        shares = torch.stack([self.backward(step, i, batch, counts) for i, batch in enumerate(batches)])
        bad = ~shares.isfinite().all(1)
        self.culprits.note(step + 1, bad, [batch.get(KEY, []) for batch in batches])
        flags = torch.stack([bad.any().float(), self.flag(stop), self.flag(save)])
        sums = self.over_ranks(torch.cat([shares.sum(0), flags]))
        losses, (some_bad, some_stop, some_save) = sums[:-3], sums[-3:]
        outcome = self.update(step, losses, some_bad > 0)
        self.bulletin.post(step + 1, torch.stack([self.broken, some_stop > 0, some_save > 0]))
        return outcome

    def count(self, batches: list[Batch]) -> Tensor:
        """(S,) how much each loss of the global batch counts; where nothing does, its sum is zero too."""
        counts = [self.objective.counts(OnDevice(batch, self.device)) for batch in batches]
        total = self.over_ranks(torch.stack(counts).sum(0))
        return total.where(total > 0, 1)

    def backward(self, step: int, i: int, batch: Batch, counts: Tensor) -> Tensor:
        """(S,) shares of micro-batch number `i` in the losses of the global batch; adds its gradient."""
        first = (self.rank * self.accumulation + i) * self.micro_batch
        self.noise.set(stable_seed(self.seed, "noise", step), self.places + first)
        last = i + 1 == self.accumulation
        with nullcontext() if last else without_sync(self.model, self.accelerator):
            with self.autocast():
                sums = self.model(dict(OnDevice(batch, self.device)))
            shares = sums / counts
            # Gradients are averaged over ranks; the losses are already shares of the global sum.
            total = (shares * self.loss_weights).sum() * self.world
            (total * self.loss_scale.scale).backward()
        return shares.detach()

    def update(self, step: int, losses: Tensor, bad: Tensor) -> Outcome:
        """Clip, step the optimizer at this step's learning rate, clear.

        Where a loss or the norm is no number, and ever after, the optimizer's own flag keeps weights and moments as
        they are. With fp16 a norm that overflows is no fault while the loss is scaled up: the step is skipped, and the
        loss scaled less from then.
        """
        limit = self.section.clip_grad or math.inf
        self.loss_scale.unscale_([p.grad for p in self.parameters if p.grad is not None])
        norm = whole(clip_grad_norm_(self.parameters, limit))
        overflowed = ~norm.isfinite()
        self.broken = self.broken | bad | (overflowed & (self.loss_scale.scale <= 1))
        cast(Any, self.adamw).found_inf = (self.broken | overflowed).float()
        set_lr(self.adamw, self.lr(step))
        self.adamw.step()
        self.adamw.zero_grad()
        self.loss_scale.update(overflowed)
        if self.ema:
            self.ema.update(step)
        return Outcome(losses, norm, (norm > limit) & ~overflowed, overflowed)

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

    def flag(self, value: bool) -> Tensor:
        """On the device without waiting for it."""
        return torch.full((), float(value), device=self.device)

    @property
    def averages(self) -> dict[str, Tensor]:
        """Moving averages of the weights, where they are kept."""
        return self.ema.tensors if self.ema else {}


class OnDevice(Mapping[str, Tensor]):
    """The tensors of a batch, which go to the device when they are asked for: counting needs few of them.

    Names of samples stay out: a compiled model would be compiled anew for each.
    """

    def __init__(self, batch: Batch, device: torch.device):
        self.batch, self.device = {name: x for name, x in batch.items() if isinstance(x, Tensor)}, device

    def __getitem__(self, name: str) -> Tensor:
        return self.batch[name].to(self.device, non_blocking=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)
