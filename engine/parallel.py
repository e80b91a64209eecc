"""One model on many ranks: whole copies (DDP) or shards of its parameters (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .launch import Strategy, strategy
from .recipe import TrainSection
from .tensors import whole


def wrap(model: nn.Module, accelerator: Accelerator, kind: Strategy, compiled: bool) -> nn.Module:
    """The model on this rank's device, ready to be trained on all; parameters keep their names."""
    model.to(accelerator.device)
    if kind == "fsdp2":
        return shard(model, accelerator, compiled)
    if compiled:
        model.compile()
    # Of depth-wise kernels, a few numbers each; to the user it would say that training is slow.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return accelerator.prepare(model)


def shard(model: nn.Module, accelerator: Accelerator, compiled: bool) -> nn.Module:
    """FSDP2: block by block, so that one block at a time is whole on a device, and then the rest."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks(model):
        if compiled:
            block.compile()  # the hooks between blocks cannot be compiled
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The items of every list of modules called `blocks`, timm's name for them."""
    for name, module in model.named_modules():
        if name.split(".")[-2:-1] == ["blocks"]:
            yield module


def without_sync(model: nn.Module, accelerator: Accelerator, kind: Strategy) -> AbstractContextManager[None]:
    """Inside, gradients stay on their rank: for all micro-batches of a step but the last.

    Shards are reduced after each micro-batch all the same: not to would take the memory that sharding saves.
    """
    return accelerator.no_sync(model) if kind == "ddp" else nullcontext()


def needs_twin(section: TrainSection, accelerator: Accelerator) -> bool:
    """Whether the model in training can not be looked at or saved as it is."""
    return section.ema is not None or strategy(section.parallel, accelerator.num_processes) == "fsdp2"


class Twin:
    """A copy of the objective on the main process, for what the training model is no good for: it lies in shards, or
    its moving average is wanted.

    Args:
        model: not yet wrapped.
        needed: without need, and on other ranks, the model stands for itself.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, needed: bool):
        self.needed, self.main = needed, accelerator.is_main_process
        self.model = deepcopy(model).to(accelerator.device) if needed and self.main else model

    @torch.no_grad()
    def follow(self, model: nn.Module, averages: dict[str, Tensor]) -> None:
        """Take over the model's weights, or their averages where there are; all ranks must call it."""
        if not self.needed:
            return
        own = self.model.state_dict() if self.main else {}
        for name, tensor in (model.state_dict() | averages).items():
            full = whole(tensor)
            if self.main:
                own[name].copy_(full)
