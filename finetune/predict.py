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
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..engine.errors import RunFailed, UserError
from ..engine.files import json_text, make_folder, write_atomic
from ..engine.metrics import Floats, Ints
from .classify.locked import Locked, read_locked, unlabelled
from .classify.units import cases
from .explain import decision, explain
from .films import Images, Taking, taken

PREDICTIONS = "miram.predictions/1"


@dataclass
class Predicted:
    """What a model says of images of one origin."""

    images: Images
    rows: Ints  # (n,) those that could be judged
    probabilities: Floats  # (n, k)
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
        pictures: folder for pictures of what the decisions rest on.
        encoder: where the encoder now lies.
        batch_size: frames judged at once.
        taking: what of the files is taken, and what they do not say themselves.

    Raises:
        UserError: the run has no sound model, an image is not there, or `out` is no CSV or JSON.
        RunFailed: none of the images could be used.
    """
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UserError(f"--out {out} must end in .csv or .json")
    locked = read_locked(run, encoder)
    with taken(images, locked.card, taking) as (found, left_out):
        judged = [judge(locked, some, left_out, batch_size) for some in found]
        for name, reason in left_out.items():
            print(f"miram: left out {name}: {reason}", file=sys.stderr)
        judged = [some for some in judged if len(some.rows)]
        if not judged:
            raise RunFailed(f"none of the {len(left_out)} images could be used; each is listed above with its reason")
        if pictures is not None:
            draw_all(locked, judged, pictures, batch_size)
        text = csv_of(locked, judged) if out is None or out.suffix == ".csv" else json_of(locked, judged, left_out)
    if out is None:
        print(text, end="")
    else:
        make_folder(out.parent)
        write_atomic(out, text)
        print(f"wrote {out}: {sum(len(some.rows) for some in judged)} images", file=sys.stderr)


def judge(locked: Locked, images: Images, left_out: dict[str, str], batch_size: int) -> Predicted:
    """The probabilities of images; what has not the resolution that tiles need is added to what is left out."""
    rows = np.arange(len(images.shards))
    if locked.card.input == "tiles" and images.records:
        faults = {row: fault for row in rows.tolist() if (fault := tiles_fault(locked, images, row))}
        left_out |= {images.names[row]: fault for row, fault in faults.items()}
        rows = np.array([row for row in rows.tolist() if row not in faults], np.int64)
    if not len(rows):
        return Predicted(images, rows, np.zeros((0, len(locked.target.classes))))
    return Predicted(images, rows, locked.probabilities(images.shards, rows, batch_size))


def tiles_fault(locked: Locked, images: Images, row: int) -> str:
    """Why tiles of the model's resolution cannot be cut from an image; nothing where they can."""
    said, wanted = images.shards.rows[row]["spacing_mm"], locked.card.tiles
    spacing = float(said) if said else wanted.spacing_mm
    if spacing is None:
        return "its spacing is unknown, and the model reads it at a stated resolution; say it with --spacing"
    too_coarse = wanted.mm_per_pixel < 0.99 * spacing
    return (
        f"it has {spacing:g} mm a pixel, coarser than the {wanted.mm_per_pixel:g} mm that the model reads" * too_coarse
    )


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


def draw_all(locked: Locked, judged: Sequence[Predicted], folder: Path, batch_size: int) -> None:
    """A picture an image, named after its file; of equal names the later ones are numbered."""
    make_folder(folder)
    used: set[str] = set()
    for some in judged:
        for row, name in zip(some.rows.tolist(), some.names, strict=True):
            file = Path(name).name
            stem = file.removesuffix(Path(name).suffix)
            free = (f"{stem}{end}.png" for end in chain([""], (f"-{n}" for n in count(2))))
            picture = next(one for one in free if one not in used)
            used.add(picture)
            explain(locked, some.images.shards, row, folder / picture, file, some.images.film(row), batch_size)
            some.pictures.append(picture)
