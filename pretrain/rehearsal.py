"""Before a long run: one step of it that leaves nothing; and after memory ran out, what would have fitted."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped, unused-ignore]
import torch
from accelerate import Accelerator

from ..engine.loop import Trainer
from ..engine.recipe import split_batch
from .config import PretrainConfig
from .plan import HEADROOM, cost_of, countable, plan_of
from .plan.tables import show


def rehearse(settings: PretrainConfig, trainer: Trainer) -> None:
    """Take the next step on real data, print its figures and the plan. Nothing is written.

    Raises:
        RunFailed: the step failed as it would have failed in the run.
    """
    line = trainer.rehearse()
    trainer.accelerator.print(f"miram: rehearsed step {line['step']:.0f} of {trainer.steps}: {figures(line)}")
    if trainer.accelerator.is_main_process:
        show(plan_of(settings, world=trainer.world, compared=False))
        print(f"miram: a dry run; nothing was written to {settings.out}")


def figures(line: dict[str, float]) -> str:
    """The step in a few figures; the first step of a process is its slowest."""
    learnt = f"loss {line['loss']:.4f}, gradient norm {line['grad_norm']:.3g}"
    speed = f"{line['images_per_s']:.1f} images/s, {line['data_wait']:.0%} waiting for data"
    return f"{learnt}, {speed}, peak {line['peak_memory_bytes'] / 1e9:.2f} GB"


def advice(settings: PretrainConfig, accelerator: Accelerator) -> str:
    """What would fit into this rank's device, counted as `miram plan` counts; less than what did not."""
    micro_batch, accumulation = split_batch(settings.train, accelerator.num_processes)
    share, limit = micro_batch * accumulation, HEADROOM * bytes_of(accelerator.device)
    fits = cost_of(countable(settings)).largest_micro_batch(limit, share)
    smaller = [n for n in range(1, micro_batch) if share % n == 0 and n <= fits]
    first = f"set train.micro_batch={smaller[-1]}, or " if smaller and settings.objective == "miram" else ""
    return (
        f"by the plan {fits} images at once fit into {limit / 1e9:.1f} GB that nothing else uses; {first}set "
        "model.checkpointing=true and model.scales.N.checkpointing=true (the run goes on as it was), or start another "
        "with a lower model.scales.N.decode_fraction; `miram plan` tells what each saves"
    )


def bytes_of(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().total)
