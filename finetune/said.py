"""What a locked model says of images, in words.

Legend: n images, k classes, w outputs of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.metrics import Floats
from .classify.config import Level
from .classify.locked import Locked


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
        verdict: the whole decision, as "mass = 1".
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
    decided, verdict = locked.decide(probabilities)[0], decision(locked, probabilities)[0]
    if target.kind == "multilabel":
        number = int((probabilities[0] - thresholds).argmax())
        answer, short = target.classes[number], "yes" if decided[number] else "no"
    else:
        number = 1 if target.kind == "binary" else int(decided)
        answer, short = (
            f"{target.name} = {target.classes[number]}",
            verdict + " (the median)" * (target.kind == "ordinal"),
        )
    threshold = {"binary": thresholds[:1], "multilabel": thresholds[number : number + 1]}.get(target.kind, ())
    told = float(probabilities[0, number])
    return Said(number, answer, told, *(threshold or (None,)), short, f"{target.name} = {verdict or 'none'}")


def decision(locked: Locked, probabilities: Floats, level: Level = "image") -> list[str]:
    """What is decided of each row of (n, k) probabilities: a class, or the labels that are there."""
    separator = locked.card.target.separator
    return [locked.target.named(answer, separator) for answer in locked.decide(probabilities, level)]
