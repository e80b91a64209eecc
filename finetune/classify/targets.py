"""What a head learns and says: the loss of its outputs, and the probabilities and decisions they stand for.

binary, multiclass  k outputs, softmax
ordinal             k - 1 outputs; the j-th: is the class above j, given that it is not below j?
multilabel          k outputs, each a question of its own

Legend: B or n images, k classes, w outputs of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...engine.metrics import Floats, Ints, Kind, calibration

LARGEST_WEIGHT = 100.0  # of a label's positives, be they ever so rare


@dataclass(frozen=True)
class Target:
    """A task's kind and classes; ordinal ones from lowest to highest, of two the second is the positive one."""

    name: str
    kind: Kind
    classes: tuple[str, ...]

    @property
    def width(self) -> int:
        """Outputs of the head."""
        return len(self.classes) - (self.kind == "ordinal")

    @property
    def thresholds(self) -> int:
        """How many it is decided by: one for two classes, one a label, none where the classes compete."""
        return {"binary": 1, "multilabel": len(self.classes)}.get(self.kind, 0)

    def loss(self, logits: Tensor, truth: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """(B,) the loss of each image.

        Args:
            logits: (B, w)
            truth: (B,) class, or (B, k) of 0 and 1 for multilabel.
            weights: (k,) of the classes; for multilabel of each one's positives.
            smoothing: share of the truth that is spread over all answers.
        """
        weights = None if weights is None else weights.to(logits)
        if self.kind == "multilabel":
            return _binary(logits, truth, smoothing, weights).mean(1)
        if self.kind != "ordinal":
            return F.cross_entropy(logits, truth, weights, reduction="none", label_smoothing=smoothing)
        told = corn_loss(logits, truth, smoothing)
        return told if weights is None else told * weights[truth]

    def probabilities(self, logits: Floats, temperature: float = 1.0) -> Floats:
        """(n, k) probabilities of the classes, from (n, w) logits; ordinal ones are never out of order."""
        return calibration.probabilities(self.kind, logits, temperature)

    def decide(self, probabilities: Floats, thresholds: tuple[float, ...]) -> Ints:
        """(n,) class, or (n, k) of 0 and 1 for multilabel.

        Args:
            probabilities: (n, k)
            thresholds: from which on it is yes; binary: of class 1; multilabel: of each class; others: ().
        """
        assert len(thresholds) == self.thresholds, thresholds
        if self.kind == "multilabel":
            return (probabilities >= np.array(thresholds)).astype(np.int64)
        if self.kind == "binary":
            return (probabilities[:, 1] >= thresholds[0]).astype(np.int64)
        if self.kind == "multiclass":
            return probabilities.argmax(1)
        return (probabilities.cumsum(1)[:, :-1] < 0.5).sum(1)  # the median

    def named(self, answer: Ints, separator: str) -> str:
        """The name of a class, or those of a (k,) row of 0 and 1, joined; "" where it has none."""
        if np.ndim(answer) == 0:
            return self.classes[int(answer)]
        return separator.join(name for name, has in zip(self.classes, answer, strict=True) if has)

    def class_weights(self, truth: Ints) -> Tensor:
        """(k,) weights under which every class counts alike; of a label: negatives a positive, at most 100."""
        several = self.kind == "multilabel"
        counts = truth.sum(0) if several else np.bincount(truth, minlength=len(self.classes))
        return self.weights_of(torch.from_numpy(counts), len(truth))

    def weights_of(self, counts: Tensor, n: int) -> Tensor:
        """The same of n images, from (k,) how many are of each class or have each label."""
        present = counts.double().clamp(min=1)  # a class may be missing from a fold
        if self.kind == "multilabel":
            return ((n - counts) / present).clamp(max=LARGEST_WEIGHT).float()
        return (n / (len(self.classes) * present)).float()


def corn_loss(logits: Tensor, truth: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B,) the CORN loss of (B, k - 1) logits: a mean over the questions that an image answers (Shi et al. 2023, 3.3).

    Question j, "above class j?", is asked of images that are not below j alone, so that its answer is a conditional
    probability. Their equation 5 averages over all answers of a batch; here images count alike, whatever their class.
    """
    place = torch.arange(logits.shape[1], device=logits.device)
    asked = truth[:, None] >= place
    told = _binary(logits, truth[:, None] > place, smoothing)
    return torch.where(asked, told, 0).sum(1) / asked.sum(1)


def _binary(logits: Tensor, truth: Tensor, smoothing: float, weights: Tensor | None = None) -> Tensor:
    """(B, w) binary cross-entropy of every output."""
    answers = truth.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, answers, pos_weight=weights, reduction="none")
