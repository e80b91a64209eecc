"""The training loop every objective shares.

Position is one integer, the number of global batches taken: whatever is random is seeded by what it is for. The host
waits for the device only to write a line, a picture or a checkpoint; what went wrong in a step it hears a step later.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from . import checkpoint as checkpoints
from . import restore
from .circumstances import Circumstances
from .errors import Preempted, RunFailed, UserError
from .guard import telling_of_lost_ranks, telling_of_memory
from .launch import together
from .objective import Batch, Monitor, Objective, Stream
from .parallel import Twin
from .profile import Profile, parse_window
from .recipe import TrainSection, lengths
from .run import MetricsFile, Run
from .signals import StopSignals
from .step import Learner
from .track import Tracker, reset_peak_memory
from .trackers import start_trackers
from .watchdog import Watchdog
from .window import Window


class Trainer:
    """One training, from wherever its run folder has got to.

    Args:
        run: the folder; nothing is written before `fit`.
        objective: what is learnt.
        stream: global batches, and this rank's part of them.
        section: how to train.
        seed: of whatever is random in a step.
        accelerator: the group of ranks.
        monitor: looks at `twin.model` while it trains.
        twin: made of the objective before it came here; None: it is looked at itself.
        told: settings that trackers are told at the start.
        signals: what was noted while the run started.
        quiet: show nothing on the terminal; one of many trainings.

    Raises:
        UserError: the batch does not divide among ranks, or the profile lies behind the end.
    """

    def __init__(
        self,
        run: Run,
        objective: Objective,
        stream: Stream,
        section: TrainSection,
        seed: int,
        accelerator: Accelerator,
        monitor: Monitor | None = None,
        twin: Twin | None = None,
        told: Mapping[str, Any] | None = None,
        signals: StopSignals | None = None,
        quiet: bool = False,
    ):
        self.run, self.objective, self.stream, self.section = run, objective, stream, section
        self.accelerator, self.monitor, self.told = accelerator, monitor, told or {}
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.main = accelerator.is_main_process
        self.visible = self.main and not quiet
        self.steps, warmup_steps = lengths(section, stream.batches_per_epoch)
        if section.profile_steps and parse_window(section.profile_steps)[0] > self.steps:
            raise UserError(f"train.profile_steps={section.profile_steps} begins after the last of {self.steps} steps")
        self.twin = twin or Twin(objective, accelerator, needed=False)
        self.learner = Learner(objective, section, self.steps, warmup_steps, seed, accelerator)
        self.step = self.saved_step = 0
        self.saved_at = time.monotonic()
        self.window = Window(len(objective.loss_names), accelerator.device)
        self.signals = signals or StopSignals()
        self.watchdog = Watchdog(run.folder, self.rank, self.world, section.stall_seconds)
        self.circumstances = Circumstances.here(accelerator, self.learner.micro_batch, self.learner.strategy)
        self.checkpoints = checkpoints.Checkpoints(
            run.checkpoints,
            keep_last=section.keep_checkpoints,
            keep_every=section.keep_every,
            writes=self.main,
            background=section.checkpoint_async,
        )

    @telling_of_lost_ranks()
    def fit(self) -> None:
        """Train to the last step.

        Raises:
            Preempted: a signal asked to stop; a checkpoint of that very step is on disk.
            RunFailed: a loss became infinite or not a number, memory ran out, a checkpoint could not be written, or
                another rank is gone.
        """
        reset_peak_memory()
        self.resume()
        with self.at_work() as batches:
            while self.step < self.steps:
                self.learn(self.draw(batches))
                self.heed(self.pausing)
                self.look_and_log()
                self.save()
                self.leave()
            together(self.accelerator, self.checkpoints.wait)
            self.twin.follow(self.objective, self.learner.averages)

    def rehearse(self) -> dict[str, float]:
        """Take the next step of `fit`, write nothing, and return its line of metrics.

        Raises:
            RunFailed: as `fit`.
        """
        self.resume()
        self.tracker = Tracker(self.run.stage, self.steps, self.step, self.section.batch_size, visible=False)
        self.profile = Profile(None, self.run.folder, self.rank)
        batches = self.stream.batches(self.step, self.rank, self.world, self.learner.micro_batch)
        with telling_of_memory(self.burden), closing(batches):
            self.learn(self.draw(batches))
            self.heed(waiting=True)
        return self.line({})

    @contextmanager
    def at_work(self) -> Iterator[Generator[Batch]]:
        """All that is open while training."""
        section, folder = self.section, self.run.folder
        self.tracker = Tracker(self.run.stage, self.steps, self.step, section.batch_size, visible=self.visible)
        self.profile = Profile(section.profile_steps, folder, self.rank)
        batches = self.stream.batches(self.step, self.rank, self.world, self.learner.micro_batch)
        with ExitStack() as stack:
            self.metrics = stack.enter_context(MetricsFile(folder / "metrics.jsonl", self.step, self.main))
            self.trackers = start_trackers(section.trackers, folder, "miram", self.told, self.main, self.step)
            stack.enter_context(closing(self.trackers))
            for part in (self.tracker, self.watchdog, self.signals.training(), telling_of_memory(self.burden)):
                stack.enter_context(part)
            stack.enter_context(closing(self.profile))
            # Closed before anything else ends: the stream's workers ignore the signals that would end them later.
            yield stack.enter_context(closing(batches))

    # ------------------------------------------------------------------------------------------ a step

    def draw(self, batches: Iterator[Batch]) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        self.watchdog.at("reading data", self.step + 1)
        self.profile.at(self.step + 1)
        with self.tracker.waiting():
            return [next(batches) for _ in range(self.learner.accumulation)]

    def learn(self, batches: list[Batch]) -> None:
        """Take a step, and add it up."""
        self.watchdog.at("learning", self.step + 1)
        damaged = self.stream.skipped()
        outcome = self.learner.learn(self.step, batches, bool(self.signals.received), self.save_by_now, damaged)
        self.step += 1
        self.window.add(outcome)
        self.tracker.advance(self.step)

    def heed(self, waiting: bool) -> None:
        """Read what ranks agreed on in the step before or, `waiting` for the device, in this one.

        Raises:
            RunFailed: a loss or gradient is no number; the weights are those of the step before it.
        """
        self.watchdog.at("waiting for the device", self.step)
        alone = self.world == 1 and bool(self.signals.received)  # with nobody to agree with
        told = self.learner.bulletin.read(waiting or alone)
        if told.stop or told.save:
            told |= self.learner.bulletin.read(waiting=True)  # what is saved has to be sound
        self.stopping = told.stop or alone
        self.saving = told.save or self.stopping or self.saving_due
        if told.broken:
            together(self.accelerator, self.checkpoints.wait)
            raise RunFailed(
                f"{self.learner.culprits.named(self.accelerator, told.broken)}; nothing was learnt from it, and "
                f"{self.kept}. Start another run (--out) with a lower train.blr, a longer train.warmup_steps or "
                f"train.clip_grad=1{'' if self.section.precision == 'fp32' else ', or with train.precision=fp32'}"
            )

    def look_and_log(self) -> None:
        """A line of metrics when it is due, with what the monitor sees when that is due."""
        looking = self.monitor is not None and self.due(self.monitor.every)
        if looking or self.due(self.section.log_every):
            self.log(self.look() if looking else {})

    def save(self) -> None:
        """A checkpoint when it is due, once every rank has reached it.

        Raises:
            RunFailed: it could not be written; the one before it is whole.
        """
        if not self.saving:
            return
        self.watchdog.at("saving", self.step)
        self.metrics.sync()
        together(self.accelerator, lambda: self.checkpoints.save(self.step, self.parts(), self.state()))
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def leave(self) -> None:
        """Stop here if any rank was told to.

        Raises:
            Preempted: it was; the checkpoint is on disk.
        """
        if self.stopping and self.step < self.steps:
            together(self.accelerator, self.checkpoints.wait)
            raise Preempted(
                f"stopped on a signal after step {self.step} of {self.steps}; run the same command to go on"
            )

    # ------------------------------------------------------------------------------------------ when

    def due(self, every: int | None) -> bool:
        """Whether something done every so many steps, and at the end, is to be done now."""
        return self.step == self.steps or (every is not None and self.step % every == 0)

    @property
    def pausing(self) -> bool:
        """Whether the host waits for the device in this step anyway; the same on all ranks."""
        looking = self.monitor is not None and self.due(self.monitor.every)
        return looking or self.due(self.section.log_every) or self.saving_due

    @property
    def saving_due(self) -> bool:
        """Whether this step has a checkpoint of its own."""
        return self.due(self.section.checkpoint_every) or self.due(self.section.keep_every)

    @property
    def save_by_now(self) -> bool:
        """Whether the main process finds the last checkpoint too old."""
        minutes = self.section.checkpoint_minutes
        return self.main and minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    @property
    def kept(self) -> str:
        """A clause about what is on disk."""
        return f"the checkpoint of step {self.saved_step} is sound" if self.saved_step else "there is no checkpoint yet"

    def burden(self) -> str:
        """What does not fit when memory runs out."""
        return f"rank {self.rank} in step {self.step + 1}, with {self.learner.micro_batch} images at once"

    # ------------------------------------------------------------------------------------------ lines and looks

    def look(self) -> dict[str, float]:
        """What the monitor sees; nothing on other ranks than the main one, which wait."""
        assert self.monitor is not None
        self.watchdog.at("looking", self.step)
        device = self.accelerator.device
        with self.tracker.left_out(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.twin.follow(self.objective, self.learner.averages)
            looked = self.see(self.monitor) if self.main else {}
            self.accelerator.wait_for_everyone()
        return looked

    def see(self, monitor: Monitor) -> dict[str, float]:
        """Ask the monitor; a picture that finds no room on the disk is no reason to lose the training."""
        try:
            return monitor(self.step)
        except OSError as error:
            said = f"{error.filename or 'a picture'}: {error.strerror}"
            print(f"miram: nothing was looked at in step {self.step} ({said}); the training goes on", file=sys.stderr)
            return {}

    def log(self, looked: dict[str, float]) -> None:
        """Tell everyone who listens."""
        line = self.line(looked)
        self.metrics.append(line)
        self.trackers.log(line)
        self.tracker.show(line)

    def line(self, looked: dict[str, float]) -> dict[str, float]:
        """Means over the steps since the last line, and what a monitor saw."""
        epoch = round(self.step / self.stream.batches_per_epoch, 4)
        line = {"step": self.step, "epoch": epoch, "samples": self.step * self.section.batch_size}
        line |= self.window.take(self.objective.loss_names, self.objective.loss_weights)
        line |= {"lr": self.learner.lr(self.step - 1)} | self.tracker.figures(self.step) | looked
        if self.learner.loss_scale.enabled:
            line["loss_scale"] = float(self.learner.loss_scale.scale)
        return line

    # ------------------------------------------------------------------------------------------ checkpoints

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint."""
        rng = torch.get_rng_state()[None].to(self.accelerator.device)
        parts = {
            "model": dict(self.objective.state_dict()),
            "optimizer": restore.optimizer_tensors(self.objective, self.learner.optimizer),
            "rng": {"torch": self.accelerator.gather(rng)},
        }
        return parts | ({"ema": self.learner.averages} if self.learner.averages else {})

    def state(self) -> dict[str, Any]:
        """And what is no tensor by name."""
        return {
            "step": self.step,
            "window": self.window.values.tolist(),
            "loss_scale": self.learner.loss_scale.state().tolist(),
            "circumstances": self.circumstances.record(),
        }

    def resume(self) -> None:
        """Take up the newest sound checkpoint, if there is one: the main process finds it, all read it.

        Raises:
            UserError: there are checkpoints, and none of them is sound.
        """
        found = torch.zeros((), device=self.accelerator.device)
        newest = checkpoints.newest_step
        together(self.accelerator, lambda: found.fill_(newest(self.run.checkpoints) if self.main else 0))
        step = int(self.learner.over_ranks(found))
        if step:
            self.load(step)
            self.accelerator.print(f"miram: going on from step {self.step} of {self.steps}")

    def load(self, step: int) -> None:
        """Everything as it was after a step."""
        path = self.run.checkpoints / f"step-{step:08d}"
        state, learner = restore.read_state(path), self.learner
        restore.load_model(path, self.objective)
        restore.load_optimizer(path, self.objective, learner.optimizer)
        if learner.averages:
            restore.load_into(path, "ema", learner.averages)
        self.step = self.saved_step = step
        self.window.values.copy_(torch.tensor(state["window"]))
        learner.loss_scale.load(torch.tensor(state["loss_scale"]))
        rng = restore.load_tensors(path, "rng")["torch"]
        if len(rng) == self.world:  # for what draws between steps; steps seed themselves
            torch.set_rng_state(rng[self.rank].clone())  # of a view torch reads the start of its storage, and beyond
        if changes := self.circumstances.changes(state["circumstances"]):
            self.accelerator.print(f"miram: this run went on elsewhere ({changes}): equal to rounding, not to the bit")
