"""The training loop every objective shares.

A step draws one global batch (all its micro-batches), weighs it over all ranks, learns, and moves on. Losses are
sums over what they count (patches, images), divided by the count of the whole global batch: ranks and accumulation
change nothing but rounding. Everything random is seeded by what it is for, so position in the data is one integer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Annotated, Any, Literal, Protocol

import torch
from accelerate import Accelerator
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from . import checkpoint as checkpoints
from .config import Section
from .errors import Preempted, UserError
from .guard import StopSignals, require_finite
from .run import MetricsFile, Run
from .schedule import scaled_lr, warmup_cosine
from .seeding import stable_seed
from .track import Tracker, peak_memory_bytes

Batch = dict[str, Any]


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSection(Section):
    """How to train."""

    steps: PositiveInt | None = None
    """optimizer steps; give this or epochs"""
    epochs: PositiveFloat | None = None
    """passes over the data; give this or steps"""
    batch_size: PositiveInt = 256
    """images a step, over all ranks and accumulated micro-batches"""
    micro_batch: PositiveInt | None = None
    """images a rank holds at once; null: no accumulation"""
    blr: PositiveFloat = 1.5e-4
    """base learning rate; lr = blr * batch_size / 256"""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's decay of matrices; vectors and biases are not decayed"""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's averaging"""
    warmup_steps: int = Field(default=100, ge=0)
    """linear warm-up, at most all steps"""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """the same in passes over the data; takes the place of warmup_steps"""
    clip_grad: PositiveFloat | None = None
    """largest gradient norm"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """autocast type; bf16 is slow on processors without it"""
    compile: bool = False
    """torch.compile the model"""
    log_every: PositiveInt = 10
    """steps between lines of metrics.jsonl"""
    checkpoint_every: PositiveInt = 100
    """steps between checkpoints"""
    keep_checkpoints: PositiveInt = 2
    """checkpoints kept"""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        return self


class Stream(Protocol):
    """Where batches come from."""

    batches_per_epoch: int

    def skipped(self) -> int:
        """How many samples of this rank could not be read, and were skipped, since this was last asked."""
        ...

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Generator[Batch]:
        """Micro-batches of this rank from global batch `start` on, without end."""
        ...


class Objective(nn.Module):
    """What is learnt: a module whose forward maps a batch to S sums of losses."""

    loss_names: tuple[str, ...]
    loss_weights: tuple[float, ...]

    def counts(self, batch: Batch) -> Tensor:
        """(S,) how much each loss of this batch counts: its number of patches, images or whatever it sums over."""
        raise NotImplementedError

    def begin_step(self, step: int, steps: int) -> None:
        """Called once before the step's first forward: for what changes from step to step without being learnt."""


class Monitor(Protocol):
    """Looks at a training now and then, on the main process alone, and changes nothing of it."""

    every: int | None  # steps between looks; None: only at the end

    def __call__(self, step: int) -> dict[str, float]:
        """Look, and return what belongs into the line of metrics."""
        ...


class Trainer:
    """One training, from wherever its run folder has got to."""

    def __init__(
        self,
        run: Run,
        objective: Objective,
        stream: Stream,
        section: TrainSection,
        seed: int,
        accelerator: Accelerator,
        monitor: Monitor | None = None,
    ):
        self.run, self.objective, self.stream, self.section, self.seed = run, objective, stream, section, seed
        self.accelerator, self.monitor = accelerator, monitor
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.steps = section.steps or max(1, round((section.epochs or 0) * stream.batches_per_epoch))
        self.micro_batch, self.accumulation = split_batch(section, self.world)
        self.peak_lr = scaled_lr(section.blr, section.batch_size)
        self.warmup_steps = section.warmup_steps
        if section.warmup_epochs is not None:
            self.warmup_steps = round(section.warmup_epochs * stream.batches_per_epoch)
        self.step = 0
        self.window = Window(len(objective.loss_names), accelerator.device)
        self.adamw = adamw(objective, section)
        compiled = torch.compile(objective) if section.compile else objective
        self.model, self.optimizer = accelerator.prepare(compiled, self.adamw)

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            Preempted: a signal asked to stop; a checkpoint of that very step is on disk.
            RunFailed: a loss became infinite or not a number.
        """
        self.resume()
        batches = self.stream.batches(self.step, self.rank, self.world, self.micro_batch)
        # Closed before anything else ends: the stream's workers ignore the signals that would end them later.
        with closing(batches), self.tracker() as tracker, self.metrics_file() as metrics, StopSignals() as signals:
            while self.step < self.steps:
                losses, grad_norm = self.learn([next(batches) for _ in range(self.accumulation)])
                self.step += 1
                self.window.add(losses, grad_norm)
                tracker.advance(self.step)
                looking = self.monitor is not None and self.due(self.monitor.every)
                if looking or self.due(self.section.log_every):
                    self.log(tracker, metrics, self.look(tracker) if looking else {})
                stopping = signals.agreed(self.accelerator) and self.step < self.steps
                if stopping or self.due(self.section.checkpoint_every):
                    self.save()
                if stopping:
                    raise Preempted(
                        f"stopped on a signal after step {self.step} of {self.steps}; run the same command to go on"
                    )

    def due(self, every: int | None) -> bool:
        """Whether something done every so many steps, and at the end, is to be done now."""
        return self.step == self.steps or (every is not None and self.step % every == 0)

    def look(self, tracker: Tracker) -> dict[str, float]:
        """What the monitor sees; nothing on other ranks than the main one, which wait."""
        assert self.monitor is not None
        began = time.perf_counter()
        with torch.random.fork_rng():  # the training must not notice
            looked = self.monitor(self.step) if self.accelerator.is_main_process else {}
        self.accelerator.wait_for_everyone()
        tracker.leave_out(time.perf_counter() - began)
        return looked

    def learn(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step on a global batch, given this rank's micro-batches.

        Returns:
            (S,) losses of the global batch, and the norm of its gradient.
        """
        self.seed_step()
        self.objective.begin_step(self.step, self.steps)
        batches = [to_device(batch, self.accelerator.device) for batch in batches]
        counts = self.over_ranks(torch.stack([self.objective.counts(batch) for batch in batches]).sum(0))
        counts = counts.where(counts > 0, 1)  # where nothing counts, the sum is zero too
        weights = torch.tensor(self.objective.loss_weights, device=counts.device)
        losses = torch.zeros_like(counts)
        for i, batch in enumerate(batches):
            with self.accelerator.no_sync(self.model) if i + 1 < len(batches) else nullcontext():
                shares = self.model(batch) / counts  # autocast: `prepare` wrapped the model in it
                # DDP averages gradients over ranks; the losses are already shares of the global sum.
                self.accelerator.backward((shares * weights).sum() * self.world)
                losses += shares.detach()
        return self.over_ranks(losses), self.update()

    def update(self) -> Tensor:
        """Clip, step the optimizer at this step's learning rate, clear; returns the gradient's norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.section.clip_grad or math.inf)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def lr(self) -> float:
        """Learning rate of the current step."""
        return warmup_cosine(self.step, self.steps, self.warmup_steps, self.peak_lr)

    def over_ranks(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(values, "sum") if self.world > 1 else values

    def seed_step(self) -> None:
        """Dropout and the like draw from (seed, step, rank): a restart needs no memory of them."""
        torch.manual_seed(stable_seed(self.seed, "step", self.step, self.rank) % 2**63)

    def tracker(self) -> Tracker:
        """Progress for people."""
        return Tracker(self.run.stage, self.steps, self.step, visible=self.accelerator.is_main_process)

    def metrics_file(self) -> MetricsFile:
        """Progress for machines, cut back to where this start takes up."""
        return MetricsFile(self.run.folder / "metrics.jsonl", self.step, writes=self.accelerator.is_main_process)

    def log(self, tracker: Tracker, metrics: MetricsFile, looked: dict[str, float]) -> None:
        """One line of metrics: means over the steps since the last line, and what a monitor saw."""
        losses, grad_norm = self.window.take(self.step)
        epoch = self.step / self.stream.batches_per_epoch
        line = {"step": self.step, "epoch": round(epoch, 4), "samples": self.step * self.section.batch_size}
        line["loss"] = sum(w * value for w, value in zip(self.objective.loss_weights, losses, strict=True))
        line |= {f"loss/{name}": value for name, value in zip(self.objective.loss_names, losses, strict=True)}
        line |= {"lr": group_lr(self.adamw), "grad_norm": grad_norm}
        line |= {"images_per_s": round(tracker.steps_per_second(self.step) * self.section.batch_size, 2)}
        line |= {"peak_memory_bytes": peak_memory_bytes()} | looked
        skipped = torch.tensor(float(self.stream.skipped()), device=self.accelerator.device)
        if damaged := int(self.over_ranks(skipped)):
            line["damaged"] = damaged
        metrics.append(line)
        tracker.show(line)

    def save(self) -> None:
        """Checkpoint this step, once every rank has reached it."""
        require_finite(self.window.values, self.step)
        rng = self.accelerator.gather(torch.get_rng_state()[None].to(self.accelerator.device))
        if self.accelerator.is_main_process:
            checkpoint = checkpoints.Checkpoint(
                model=dict(self.objective.state_dict()),
                optimizer=checkpoints.optimizer_tensors(self.objective, self.adamw),
                rng={"torch": rng},
                state={"step": self.step, "window": self.window.values.tolist(), "world": self.world},
            )
            checkpoints.save(self.run.checkpoints, self.step, checkpoint, self.section.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Take up the newest sound checkpoint, if there is one."""
        found, skipped = checkpoints.load_latest(self.run.checkpoints)
        for sentence in skipped:
            self.accelerator.print(f"miram: {sentence}")
        if found is None:
            return
        self.objective.load_state_dict(found.model)
        checkpoints.load_optimizer_tensors(self.objective, self.adamw, found.optimizer)
        self.step = found.state["step"]
        self.window.values.copy_(torch.tensor(found.state["window"]))
        if len(found.rng["torch"]) == self.world:  # for what draws between steps; steps seed themselves
            torch.set_rng_state(found.rng["torch"][self.rank])
        self.accelerator.print(f"miram: going on from step {self.step} of {self.steps}")


class Window:
    """Sums of losses and gradient norm since the last line of metrics, on the device: nothing waits for them."""

    def __init__(self, losses: int, device: torch.device):
        self.values = torch.zeros(losses + 2, device=device)  # S losses, gradient norm, steps

    def add(self, losses: Tensor, grad_norm: Tensor) -> None:
        """Add a step."""
        self.values += torch.cat([losses, grad_norm.reshape(1), torch.ones_like(grad_norm).reshape(1)])

    def take(self, step: int) -> tuple[list[float], float]:
        """(S losses, gradient norm) as means, and start again.

        Raises:
            RunFailed: one of them is infinite or not a number.
        """
        require_finite(self.values, step)
        *losses, grad_norm, steps = self.values.tolist()
        self.values.zero_()
        return [loss / steps for loss in losses], grad_norm / steps


def split_batch(section: TrainSection, world: int) -> tuple[int, int]:
    """(micro-batch of a rank, micro-batches a step).

    Raises:
        UserError: the global batch does not divide.
    """
    micro_batch = section.micro_batch or max(1, section.batch_size // world)
    if section.batch_size % (world * micro_batch):
        raise UserError(
            f"train.batch_size={section.batch_size} is no multiple of {world} ranks x micro-batches of {micro_batch}; "
            "change train.batch_size or train.micro_batch"
        )
    return micro_batch, section.batch_size // (world * micro_batch)


def adamw(objective: Objective, section: TrainSection) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors and biases alone (timm's and MAE's grouping)."""
    trainable = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=section.betas, fused=True)


def group_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate the last step was taken at."""
    return float(optimizer.param_groups[0]["lr"])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of the batch on the device, the rest as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
