"""`miram predict`: a user's own films in, probabilities and decisions out.

FILE.csv     file, p_CLASS…, decision, threshold, temperature, model: one row an image
FILE.json    {"schema": "miram.predictions/1", "model", "task", "kind", "classes", "temperature", "thresholds",
             "images": [{"file", "probabilities", "decision", "laterality", "view", "patient", "picture"}],
             "breasts", "patients": [{"patient", "laterality", "files", "probabilities", "decision"}],
             "left_out": [{"file", "reason"}]}

`patient` is a number that says which images belong together, as far as headers tell; no id is written.
Legend: n images, k classes.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..engine.errors import RunFailed, UserError
from ..engine.files import json_text, make_folder, write_atomic
from ..engine.metrics import Floats, Ints
from .classify.locked import Locked, read_locked, unlabelled
from .classify.mil import MilModel
from .classify.tiles import fault_of
from .classify.units import cases
from .explain import explain
from .films import Images, Taking, say, taken
from .pictures import claim, names_for
from .said import decision

PREDICTIONS = "miram.predictions/1"


@dataclass
class Predicted:
    """What a model says of images of one origin."""

    images: Images
    rows: Ints  # (n,) those that could be judged
    probabilities: Floats = field(default_factory=lambda: np.zeros((0, 0)))  # (n, k), once they are judged
    pictures: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """(n,) what the user calls them."""
        return [self.images.names[row] for row in self.rows]


def predict(
    run: str | Path,
    images: Sequence[str],
    out: Path | None = None,
    pictures: Path | None = None,
    encoder: str | None = None,
    batch_size: int = 64,
    taking: Taking = Taking(),
) -> None:
    """Judge images with the model of a run; print a CSV, or write one, or JSON.

    Args:
        run: of `miram finetune`.
        images: DICOM files or pictures, folders of them, data sets.
        out: file to write, .csv or .json; None: print.
        pictures: folder for pictures of what the decisions rest on (pictures.py).
        encoder: where the encoder now lies.
        batch_size: frames judged at once.
        taking: what of the files is taken, and what they do not say themselves.

    Raises:
        UserError: the run has no sound model, an image is not there, `out` is no CSV or JSON, or a picture would
            replace something else.
        RunFailed: none of the images could be used.
    """
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UserError(f"--out {out} must end in .csv or .json")
    locked = read_locked(run, encoder)
    with taken(images, locked.card, taking) as (found, left_out):
        usable = [Predicted(some, rows) for some in found if len(rows := usable_rows(locked, some, left_out))]
        for name, reason in left_out.items():
            say(f"left out {name}: {reason}")
        if not usable:
            raise RunFailed(f"none of the {len(left_out)} images could be used; each is listed above with its reason")
        if pictures is not None:
            name_pictures(locked, usable, pictures)
        for some in usable:
            judge(locked, some, batch_size)
        write(locked, usable, left_out, out)  # before pictures, which may fail
        if pictures is not None:
            draw_all(locked, usable, pictures, batch_size)


def usable_rows(locked: Locked, images: Images, left_out: dict[str, str]) -> Ints:
    """The images that the model can read; those without the resolution that its tiles need are added to `left_out`."""
    if locked.card.input != "tiles":
        return np.arange(len(images.shards))
    section, usable = locked.tiling(images.shards), []
    for row, (name, value) in enumerate(zip(images.names, images.shards.rows.column("spacing_mm"), strict=True)):
        if fault := fault_of(value, section):
            left_out[name] = f"{fault}; ingest it again with its spacing" if not (value or images.records) else fault
        else:
            usable.append(row)
    return np.array(usable, np.int64)


def judge(locked: Locked, some: Predicted, batch_size: int) -> None:
    """Fill in the probabilities; says on the screen where films are not known to be of one breast."""
    if isinstance(locked.model, MilModel) and locked.model.bag == "breast":
        sides, patients = some.images.shards.rows.take(some.rows).column("laterality"), some.images.patients[some.rows]
        if lonely := int((~((np.array(sides) != "") & (patients != ""))).sum()):
            say(
                f"{lonely} of {len(some.rows)} images do not say whose breast they show, so each is judged alone; the "
                "model was trained to read all images of a breast together"
            )
    some.probabilities = locked.probabilities(some.images.shards, some.rows, batch_size)


def write(locked: Locked, judged: Sequence[Predicted], left_out: dict[str, str], out: Path | None) -> None:
    """Print a CSV, or write a file."""
    text = json_of(locked, judged, left_out) if out and out.suffix == ".json" else csv_of(locked, judged)
    if out is None:
        print(text, end="", flush=True)
        return
    make_folder(out.parent)
    write_atomic(out, text)
    print(f"wrote {out}: {sum(len(some.rows) for some in judged)} images", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- what is written


def csv_of(locked: Locked, judged: Sequence[Predicted]) -> str:
    """One row an image."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    card = locked.card
    columns = (f"p_{name}" for name in card.target.classes)
    table.writerow(["file", *columns, "decision", "threshold", "temperature", "model"])
    thresholds = card.target.separator.join(f"{t:.6g}" for t in card.thresholds["image"])
    for some in judged:
        decided = decision(locked, some.probabilities)
        for name, shares, said in zip(some.names, some.probabilities, decided, strict=True):
            numbers = (f"{share:.6f}" for share in shares)
            table.writerow([name, *numbers, said, thresholds, f"{card.temperature:.6g}", locked.digest])
    return buffer.getvalue()


def json_of(locked: Locked, judged: Sequence[Predicted], left_out: dict[str, str]) -> str:
    """Images, and breasts and patients where they are known."""
    card = locked.card
    numbers: dict[tuple[int, str], int] = {}
    for i, some in enumerate(judged):
        for patient in some.images.patients[some.rows].tolist():
            if patient:
                numbers.setdefault((i, patient), 1 + len(numbers))
    content: dict[str, Any] = {
        "model": locked.digest,
        "task": card.target.name,
        "kind": card.target.kind,
        "classes": card.target.classes,
        "temperature": card.temperature,
        "thresholds": card.thresholds,
        "images": [row for i, some in enumerate(judged) for row in images_of(locked, some, i, numbers)],
        "breasts": [row for i, some in enumerate(judged) for row in units_of(locked, some, "breast", i, numbers)],
        "patients": [row for i, some in enumerate(judged) for row in units_of(locked, some, "patient", i, numbers)],
        "left_out": [{"file": name, "reason": reason} for name, reason in left_out.items()],
    }
    return json_text(PREDICTIONS, content)


def images_of(
    locked: Locked, some: Predicted, number: int, numbers: dict[tuple[int, str], int]
) -> Iterator[dict[str, Any]]:
    """What the JSON says of each image."""
    decided, patients = decision(locked, some.probabilities), some.images.patients
    for i, row in enumerate(some.rows.tolist()):
        known = some.images.shards.rows[row]
        yield {
            "file": some.images.names[row],
            "probabilities": shares(locked, some.probabilities[i]),
            "decision": decided[i],
            "laterality": known["laterality"] or None,
            "view": known["view"] or None,
            "patient": numbers.get((number, str(patients[row]))),
            **({"picture": some.pictures[i]} if some.pictures else {}),
        }


def units_of(
    locked: Locked,
    some: Predicted,
    level: Literal["breast", "patient"],
    number: int,
    numbers: dict[tuple[int, str], int],
) -> Iterator[dict[str, Any]]:
    """What the JSON says of each breast of a known side, or each patient."""
    patients = some.images.patients[some.rows]
    sides = np.array(some.images.shards.rows.take(some.rows).column("laterality"))
    here = np.flatnonzero((patients != "") & ((sides != "") | (level == "patient")))
    if not len(here):
        return
    labelled = unlabelled(locked.target, some.images.shards, some.rows[here])
    alone = np.zeros(len(here), np.int64)
    of = cases(labelled, np.arange(len(here)), some.probabilities[here], alone, level, locked.card.readout)
    decided = decision(locked, of.probabilities, level)
    for members, probabilities, said in zip(of.members, of.probabilities, decided, strict=True):
        first = here[members[0]]
        yield {
            "patient": numbers[number, str(patients[first])],
            **({"laterality": str(sides[first])} if level == "breast" else {}),
            "files": [some.names[here[i]] for i in members],
            "probabilities": shares(locked, probabilities),
            "decision": said,
        }


def shares(locked: Locked, probabilities: Floats) -> dict[str, float]:
    """The probability of each class by its name."""
    return {name: round(float(p), 6) for name, p in zip(locked.target.classes, probabilities, strict=True)}


# ---------------------------------------------------------------------------------------------- pictures


def name_pictures(locked: Locked, judged: Sequence[Predicted], folder: Path) -> None:
    """Give each image its picture's name, before hours are spent.

    Raises:
        UserError: a picture would replace what is no picture of it.
    """
    names = names_for([name for some in judged for name in some.names])
    free = iter(names)
    for some in judged:
        some.pictures = [next(free) for _ in some.rows]
    files = dict(zip(names, (name for some in judged for name in some.names), strict=True))
    inputs = (Path(name) for some in judged if some.images.records for name in some.images.names)
    claim(folder, files, locked.digest, inputs)


def draw_all(locked: Locked, judged: Sequence[Predicted], folder: Path, batch_size: int) -> None:
    """A picture an image."""
    for some in judged:
        for row, name, picture in zip(some.rows.tolist(), some.names, some.pictures, strict=True):
            shards, film = some.images.shards, some.images.film(row)
            explain(locked, shards, row, folder / picture, Path(name).name, film, batch_size, rows=some.rows)
