"""Adam or SGD in groups: matrices decay, vectors do not, and each encoder block may learn at a rate of its own."""

from __future__ import annotations

import torch
from torch import nn

from .objective import Objective
from .recipe import TrainSection


def make_optimizer(objective: Objective, section: TrainSection) -> torch.optim.Optimizer:
    """A fused optimizer over what is trainable, made after the objective is moved or sharded; its rate starts at 0.

    Parameters of two or more dimensions decay, learned tokens and positions among them; vectors and biases do not
    (MAE's pretraining, with timm's `param_groups_weight_decay`). With `layer_decay`, a parameter learns at
    layer_decay ** distance of the rate (BEiT, Bao et al. 2022, appendix; MAE's fine-tuning), which its group carries
    as "lr_scale". The group that learns fastest comes first, and matrices before vectors.
    """
    parameters, distances = dict(objective.named_parameters()), objective.distances()
    assert distances.keys() <= parameters.keys()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            scale = (section.layer_decay or 1.0) ** distances.get(name, 0)
            groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    options = [
        {"params": groups[scale, decays], "lr_scale": scale, "weight_decay": section.weight_decay * decays}
        for scale, decays in sorted(groups, reverse=True)
    ]
    if section.optimizer == "sgd":
        return torch.optim.SGD(options, lr=0.0, fused=True)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[section.optimizer]
    return kind(options, lr=0.0, betas=section.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
