"""What was said of every judged image, for people, sweeps and comparisons.

    RUN/predictions.csv    key, patient, breast, truth, fold, p_CLASS…, logit_0…, decision; one row a judged image

`patient` is "dataset/patient". Probabilities are calibrated, logits are not; the decision is that of the image alone.
Several labels of an image are joined by a separator, in truth and decision.

Legend: j judged images, k classes, w outputs of a head.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import UserError
from ...engine.files import write_atomic
from ...engine.metrics import Floats, Ints, Kind
from .config import ReadoutSection
from .judged import Judged
from .labels import Labelled
from .targets import Target

WHO = ("key", "patient", "breast", "truth", "fold")


@dataclass(frozen=True)
class Predictions:
    """predictions.csv, read back."""

    keys: NDArray[np.str_]  # (j,)
    patients: NDArray[np.str_]  # (j,)
    breasts: NDArray[np.str_]  # (j,)
    truth: NDArray[np.str_]  # (j,) as written
    decisions: NDArray[np.str_]  # (j,) as written
    fold: Ints  # (j,)
    classes: tuple[str, ...]
    probabilities: Floats  # (j, k)
    logits: Floats  # (j, w)

    def coded(self, written: NDArray[np.str_], kind: Kind, separator: str = "|") -> Ints:
        """`truth` or `decisions` as (j,) classes, or (j, k) 0/1 of labels.

        Raises:
            UserError: there is something else among them.
        """
        several = kind == "multilabel"
        sets = [(names.split(separator) if names else []) if several else [names] for names in written.tolist()]
        if unknown := sorted({name for names in sets for name in names} - set(self.classes)):
            known = ", ".join(map(repr, self.classes))
            raise UserError(f"predictions.csv names {unknown[0]!r}, and its classes are {known}; make it again")
        found = np.array([[name in names for name in self.classes] for names in sets], np.int64)
        return found if several else found.argmax(1)

    def labelled(self, task: str, kind: Kind, separator: str = "|") -> Labelled:
        """The judged images as all there are of a task, row by row.

        Raises:
            UserError: the truth of one is no class.
        """
        target, rows = Target(task, kind, self.classes), np.arange(len(self.keys))
        truth, splits = self.coded(self.truth, kind, separator), np.full(len(rows), "")
        return Labelled(target, rows, truth, self.patients, self.breasts, self.keys, splits, {})


def write_predictions(path: Path, judged: Judged, separator: str = "|") -> None:
    """Write predictions.csv, numbers in full."""
    labelled, which = judged.labelled, judged.images
    classes = labelled.target.classes
    truth, decided = labelled.truth[which], judged.decided(judged.cases("image", ReadoutSection()))
    outputs = (f"logit_{i}" for i in range(judged.logits.shape[1]))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow([*WHO, *(f"p_{name}" for name in classes), *outputs, "decision"])
    for j, image in enumerate(which.tolist()):
        who = labelled.keys[image], labelled.patients[image], labelled.breasts[image]
        numbers = (*judged.probabilities[j].tolist(), *judged.logits[j].tolist())
        so, said = (labelled.target.named(answer[j], separator) for answer in (truth, decided))
        table.writerow([*who, so, judged.fold[j], *numbers, said])
    write_atomic(path, buffer.getvalue())


def check_numbers(patients: NDArray[np.str_], fold: Ints, *numbers: Floats) -> None:
    """Refuse what no run says.

    Raises:
        ValueError: a number is not finite, or models of several folds judged a patient.
    """
    if not all(np.isfinite(some).all() for some in numbers):
        raise ValueError("a number is not finite")
    if len(set(zip(patients.tolist(), fold.tolist(), strict=True))) > len(np.unique(patients)):
        raise ValueError("a patient is in several folds")


def read_predictions(path: Path) -> Predictions:
    """What `write_predictions` wrote.

    Raises:
        UserError: the file is missing, or is none of ours.
    """
    try:
        header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        text = [np.array(columns[name]) for name in (*WHO[:4], "decision")]
        names = [tuple(name for name in header if name.startswith(kind)) for kind in ("p_", "logit_")]
        numbers = [np.array([columns[name] for name in group], np.float64).T for group in names]
        fold = np.array(columns["fold"]).astype(np.int64)
        check_numbers(text[1], fold, *numbers)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; `miram finetune` writes it when it has judged") from error
    except (csv.Error, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or of another version ({error}); run what wrote it again") from error
    keys, patients, breasts, truth, decisions = text
    classes = tuple(name.removeprefix("p_") for name in names[0])
    return Predictions(keys, patients, breasts, truth, decisions, fold, classes, *numbers)
