"""What equal bits depend on beside the configuration: recorded with every checkpoint, and a change is said."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from .launch import Strategy


@dataclass(frozen=True)
class Circumstances:
    """Where and with what a training runs."""

    ranks: int
    parallel: str
    micro_batch: int
    threads: int
    device: str
    torch: str
    numpy: str
    deterministic: bool

    @classmethod
    def here(cls, accelerator: Accelerator, micro_batch: int, strategy: Strategy) -> Circumstances:
        """Of this process."""
        gpu = accelerator.device.type == "cuda"
        return cls(
            ranks=accelerator.num_processes,
            parallel=strategy,
            micro_batch=micro_batch,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if gpu else f"{platform.machine()} processor",
            torch=torch.__version__,
            numpy=np.__version__,
            deterministic=not gpu or torch.are_deterministic_algorithms_enabled(),
        )

    def record(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        return asdict(self)

    def changes(self, before: Mapping[str, Any]) -> str:
        """`ranks 2 -> 1, …`, or nothing."""
        return ", ".join(f"{k} {before[k]} -> {v}" for k, v in asdict(self).items() if k in before and before[k] != v)
