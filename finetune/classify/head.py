"""A linear head over standardised features, and the convex problem that gives a good one at once.

Features of a masked autoencoder vary little about a large mean; a head that learns by gradient descent gets nowhere on
them. MAE's linear probe puts a BatchNorm without affine before it; here the statistics are those of the training images
under the frozen encoder, and are folded into the weights in the end.

Legend: n training images, D features, w outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.metrics import Floats
from .targets import Target

CONSTANT = 1e-12  # a deviation below is that of a feature that does not vary


class StandardisedLinear(nn.Linear):
    """x (B, D) -> W ((x - mean) / deviation) + b, (B, w); zero at first."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, outputs: int):
        super().__init__(len(mean), outputs, dtype=mean.dtype)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    @classmethod
    def of(cls, x: Floats, outputs: int) -> StandardisedLinear:
        """By the statistics of (n, D) features, in float64."""
        deviation = x.std(0)
        scale = np.where(deviation > CONSTANT, deviation, 1.0)
        return cls(torch.from_numpy(x.mean(0)), torch.from_numpy(scale), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, w)."""
        return F.linear((x - self.mean) / self.deviation, self.weight, self.bias)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """The linear layer that computes the same of features as they are."""
        head = nn.Linear(self.in_features, self.out_features).to(self.weight)
        weight = self.weight.double() / self.deviation.double()
        head.weight.copy_(weight)
        head.bias.copy_(self.bias.double() - weight @ self.mean.double())
        return head


def solve(
    head: StandardisedLinear,
    x: Tensor,
    truth: Tensor,
    target: Target,
    weights: Tensor | None,
    smoothing: float,
    c: float,
) -> None:
    """Give a head the minimum of  mean_i loss(head(x_i), y_i) + |W|^2 / (2 C n), by L-BFGS from where it is.

    The problem is convex for every kind of task, so that the answer does not depend on the start.

    Args:
        head: changed in place.
        x: (n, D) features.
        truth: (n,) classes, or (n, k) of 0 and 1.
        target: whose loss it is.
        weights: (k,) of classes.
        smoothing: of labels.
        c: inverse strength of regularisation, as scikit-learn counts it.
    """
    lbfgs = torch.optim.LBFGS(
        head.parameters(), max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        penalty = head.weight.square().sum() / (2 * c * len(x))
        loss = target.loss(head(x), truth, weights, smoothing).mean() + penalty
        loss.backward()
        return loss

    lbfgs.step(closure)
    lbfgs.zero_grad()  # what learns on would begin with the last gradient
