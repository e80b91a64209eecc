"""What Accelerate is used for, and what not.

Used: starting ranks and the group they form, device placement, DDP wrapping, sums and gathers between ranks, barriers,
trackers. `accelerate launch` and its files (configs/accelerate) are the way to start many ranks; torchrun works, too.

Not used, because each broke in a trial:
    its loaders       they drop, repeat or re-read samples of sharded data, and cannot be taken up again exactly
    its schedulers    they step once a rank
    its `save_state`  it deletes the old checkpoint before the new one is whole, and writes pickles
    its FSDP plugin   without a GPU it silently is DDP, so nothing of it could be tested; torch's own is as short
    its loss scaling  fp16 then runs on no processor, and its overflow flag takes the place of the guard's
Those we own: data/stream.py, schedule.py, checkpoint.py, parallel.py, loss_scale.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler

from .errors import RunFailed, UserError

Strategy = Literal["alone", "ddp", "fsdp2"]
FSDP_ASKED = "ACCELERATE_USE_FSDP"  # set by `accelerate launch` for a file that asks for FSDP


def device() -> torch.device:
    """The accelerator of this machine, or its processor."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def make_accelerator(deterministic: bool = False, patience: timedelta | None = None) -> Accelerator:
    """The process group of this run.

    `cpu` is passed explicitly: left to itself Accelerate makes two CPU processes two independent ranks 0. Precision is
    the loop's: autocast and loss scaling have to be the same on a processor.

    Args:
        deterministic: only kernels that give the same bits every time.
        patience: how long ranks wait for one that works alone; None: as torch has it, 10 minutes on GPUs.

    Raises:
        UserError: the launcher started another number of processes than there are ranks.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(deterministic)
    warn_of_stale_store()
    with hidden(FSDP_ASKED):
        waits: list[KwargsHandler] = [InitProcessGroupKwargs(timeout=patience)] if patience else []
        accelerator = Accelerator(mixed_precision="no", cpu=device().type == "cpu", kwargs_handlers=waits)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher set WORLD_SIZE={launched}, but {accelerator.num_processes} ranks came up; check its settings"
        )
    return accelerator


def together(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Do something on every rank that may fail on one; where it does, none goes on.

    Raises:
        UserError, RunFailed: what it raised here, or one of the same kind that points to another rank.
    """
    failure: UserError | RunFailed | None = None
    try:
        work()
    except (UserError, RunFailed) as error:
        failure = error
    failed = torch.tensor([float(isinstance(failure, kind)) for kind in (UserError, RunFailed)])
    theirs, broke = accelerator.reduce(failed.to(accelerator.device), "sum").tolist()
    if failure is not None:
        raise failure
    if theirs or broke:
        raise (UserError if theirs else RunFailed)("another rank cannot go on, and says why")


def warn_of_stale_store() -> None:
    """Ranks that torchrun starts again may look for dead ones in its store, and hang (torch 2.15, pytorch #135712)."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0":
        said = "torchrun started its ranks again; if they hang now, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it"
        print(f"miram: {said}", file=sys.stderr, flush=True)


@contextmanager
def hidden(variable: str) -> Iterator[None]:
    """Without an environment variable inside."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def strategy(parallel: Literal["auto", "ddp", "fsdp2"], world: int) -> Strategy:
    """How `world` ranks share the model: as configured, or, with auto, as the launcher's file asks.

    Raises:
        UserError: the file asks for the first FSDP.
    """
    if world == 1:
        return "alone"
    if parallel != "auto":
        return parallel
    if os.environ.get(FSDP_ASKED, "").lower() not in ("1", "true", "yes"):
        return "ddp"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "accelerate's file asks for FSDP 1; set fsdp_version: 2 in it, as in configs/accelerate/fsdp2.yaml"
        )
    return "fsdp2"
