"""FedProx: a site's loss, with a pull towards where the round began (Li et al. 2020, arXiv 1812.06127, equation 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...engine.objective import Batch
from ..classify.objective import Classify
from ..peft.base import learnt


class Proximal(Classify):
    """loss(w) + mu / 2 |w - w_t|^2, w_t what learns when this is made; with mu = 0 it is the loss."""

    def __init__(self, *args: Any, mu: float, **options: Any):
        super().__init__(*args, **options)
        self.loss_names = (*self.loss_names, "proximal")
        self.loss_weights = (*self.loss_weights, mu)
        self.start = [(tensor, tensor.detach().clone()) for _, tensor in learnt(self.tuned)]

    def forward(self, batch: Batch) -> Tensor:
        """Sums over the images of the losses, and of the distance, which is the same for each of them."""
        return torch.cat([super().forward(batch), len(batch["image"]) * self.distance().reshape(1)])

    def distance(self) -> Tensor:
        """() half of the squared distance from the start."""
        return torch.stack([(now - then.to(now)).square().sum() for now, then in self.start]).sum() / 2
