"""What is exported, without a run: small networks of random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vits import small

from miram.finetune.export.source import Source

SIZE = (64, 32)


def source_of(module: nn.Module, kind: Any = "encoder", size: tuple[int, int] = SIZE, **known: Any) -> Source:
    known = {"vit": None, "head": None, "mean": (0.2,), "std": (0.3,), "digest": "d" * 64} | known
    return Source(kind=kind, module=module.eval().requires_grad_(False), image_size=size, channels=1, **known)


def classifier() -> Source:
    vit, head = small(image=SIZE), nn.Linear(48, 2)
    about = {"classes": ("no", "yes"), "temperature": 1.7, "thresholds": {"image": (0.4,)}}
    return source_of(nn.Sequential(vit, head), "classifier", vit=vit, head=head, kind_of_task="binary", **about)


def images(count: int, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(count))
