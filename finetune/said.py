"""What a locked model says of images, in words.

Legend: n images, k classes, w outputs of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.metrics import Floats
from .classify.config import Level
from .classify.locked import Locked
from .classify.targets import Target


@dataclass(frozen=True)
class Said:
    """What is said of one image.

    Attributes:
        number: of the class that a threshold decides on: of two the positive one, of labels the one furthest above its
            threshold (or least below); where classes compete, the decided one.
        answer: that class, as "mass = 1"; of labels the label alone.
        probability: of that class.
        threshold: from which on it is decided; None where classes compete.
        short: the decision on that class.
        verdict: the whole decision, as "mass = 1"; of labels all that are there.
    """

    number: int
    answer: str
    probability: float
    threshold: float | None
    short: str
    verdict: str

    @property
    def figures(self) -> str:
        """Probability and threshold, with as many digits as it takes to tell them apart."""
        if self.threshold is None:
            return f"{self.probability:.3f}"
        digits = 3 if round(self.probability, 3) != round(self.threshold, 3) else 6
        return f"{self.probability:.{digits}f} (threshold {self.threshold:.{digits}f})"

    @property
    def title(self) -> str:
        """For above a picture."""
        return f"{self.answer}: {self.figures}, decided {self.short}"

    @property
    def sentence(self) -> str:
        """For a caption."""
        return f"{self.answer} has probability {self.figures}; decided: {self.verdict}."


def said_of(locked: Locked, logits: Floats) -> Said:
    """What is said of an image with these (1, w) logits."""
    target, thresholds = locked.target, locked.card.thresholds["image"]
    probabilities = target.probabilities(logits, locked.card.temperature)
    decided, name = locked.decide(probabilities)[0], decision(locked, probabilities)[0]
    if target.kind == "multilabel":
        number = int((probabilities[0] - thresholds).argmax())
        short = "yes" if decided[number] else "no"
    else:
        number = 1 if target.kind == "binary" else int(decided)
        short = f"{name} (the median)" if target.kind == "ordinal" else name
    threshold = thresholds[number % len(thresholds)] if thresholds else None  # of two classes there is one
    answer, told = answered(target, target.classes[number]), float(probabilities[0, number])
    return Said(number, answer, told, threshold, short, answered(target, name))


def answered(target: Target, name: str) -> str:
    """An answer with what it answers: "mass = 1"; labels speak for themselves."""
    return (name or "none") if target.kind == "multilabel" else f"{target.name} = {name}"


def decision(locked: Locked, probabilities: Floats, level: Level = "image") -> list[str]:
    """What is decided of each row of (n, k) probabilities: a class, or the labels that are there."""
    separator = locked.card.target.separator
    return [locked.target.named(answer, separator) for answer in locked.decide(probabilities, level)]
