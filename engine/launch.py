"""What Accelerate is used for, and what not.

Used: starting ranks, device placement, DDP wrapping, autocast, backward, clipping, reductions between ranks.
Not used: its loaders (they break on sharded data), its scheduler wrapping (it steps once a rank) and its
`save_state` (it deletes the old checkpoint before the new one is whole, and writes pickles). We own those three.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from .errors import UserError


def device() -> torch.device:
    """The accelerator of this machine, or its processor."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def make_accelerator(precision: str) -> Accelerator:
    """The process group and precision of this run.

    `cpu` is passed explicitly: left to itself Accelerate makes two CPU processes two independent ranks 0.

    Raises:
        UserError: the launcher started another number of processes than there are ranks.
    """
    mixed_precision = {"fp32": "no"}.get(precision, precision)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device().type == "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher set WORLD_SIZE={launched}, but {accelerator.num_processes} ranks came up; check its settings"
        )
    return accelerator
