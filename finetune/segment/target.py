"""From the masks of a data set to what is segmented: which images count, and what a stored value means.

Masks of `instances` hold k in the k-th finding: all are lesions, told apart one by one. Masks of `classes` hold numbers
that `segment.classes` gives names: those of lesions, of which each connected part is one, or of tissues, which are not
counted.

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ...data.findings import IGNORED, TOUCHING
from ...data.masks import Held, Lookup, all_named, images, lookup_of, names_of, one_kind
from ...data.record import MaskKind
from ...data.shards import Sample, ShardDataset
from ...engine.errors import UserError
from ..task import Task
from .config import SegmentSection

RARE = 0.05  # of all pixels: classes other than background that have less are lesions
COMMON = 0.25  # of all pixels: findings that have more are worth a remark


@dataclass(frozen=True)
class Target:
    """What is segmented.

    Attributes:
        classes: names, background first.
        lookup: from stored values.
        lesions: whether findings are told apart and counted.
        parts: whether each 8-connected part of a finding is a lesion of its own.
    """

    kind: MaskKind
    classes: tuple[str, ...]
    lookup: Lookup
    lesions: bool
    parts: bool = False

    def truth(self, sample: Sample) -> NDArray[np.uint8]:
        """(H, W) class numbers; nothing where the sample has no mask."""
        if sample.mask is None:
            return np.zeros(sample.pixels.shape[:2], np.uint8)
        return np.asarray(self.lookup[sample.mask])

    def findings(self, sample: Sample) -> NDArray[np.int32]:
        """(H, W) numbers of lesions from 1 on, 0 elsewhere."""
        numbered = np.zeros(sample.pixels.shape[:2], np.int32)
        if sample.mask is None:
            return numbered
        of = sample.mask if self.kind == "instances" else self.lookup[sample.mask]  # several values may be one class
        count = 0
        for number in np.setdiff1d(of, (0,) if self.kind == "instances" else (0, IGNORED)).tolist():
            here = of == number
            parts, found = ndimage.label(here, TOUCHING) if self.parts else (here.astype(np.int32), 1)
            numbered[here] = parts[here] + count
            count += found
        return numbered


@dataclass(frozen=True)
class Asked:
    """The images that count, and what is segmented on them."""

    target: Target
    task: Task  # rows, patients, splits; truth: whether there is anything
    keys: NDArray[np.str_]  # (n,)
    notes: tuple[str, ...]  # what was left out


def read_target(shards: ShardDataset, found: Sequence[Held], section: SegmentSection) -> Asked:
    """What the masks of a data set ask for.

    Raises:
        UserError: there are no masks, their kinds differ, or a setting does not fit them.
    """
    target = target_of(one_kind(shards, found), found, section)
    unmasked = {"auto": "negative" if target.lesions else "left_out"}.get(section.unmasked, section.unmasked)
    rows = np.flatnonzero([one.counts(target.lookup, unmasked == "negative") for one in found])
    positive = [found[row].positive(target.lookup) for row in rows.tolist()]
    if not any(positive):
        raise UserError(f"{', '.join(shards.roots)}: no mask holds anything but background; there is nothing to learn")
    columns = (np.array(c)[rows] for c in (*map(shards.rows.column, ("dataset", "patient", "key")), shards.splits))
    dataset, patient, keys, splits = columns
    patients = np.char.add(np.char.add(dataset, "/"), patient)
    task = Task("lesions" if target.lesions else "classes", ("without", "with"), rows, np.array(positive, np.int64),
                patients, splits)  # fmt: skip
    notes = left_out(found, unmasked)
    if target.lesions:
        one = "connected part of a mask" if target.parts else "numbered finding of a mask"
        notes.append(f"Lesions are segmented; one is a {one} (segment.task, segment.lesion).")
        if (share := foreground(found, target.lookup)) > COMMON:
            notes.append(
                f"Findings cover {100 * share:.0f} % of all pixels, which lesions do not: if the masks hold classes, "
                "ingest them with --mask-kind classes; if these are regions cut out of films, no figure is of films."
            )
    return Asked(target, task, keys, tuple(notes))


def target_of(kind: MaskKind, found: Sequence[Held], section: SegmentSection) -> Target:
    """What stored values become.

    Raises:
        UserError: a setting does not fit what the masks hold.
    """
    named = all_named(kind, found, section.classes, "segment.classes")
    lookup = lookup_of(named)
    if kind == "instances":
        lesions, parts = True, each_part(found, section)
    else:
        lesions = parts = section.task == "lesions" or (section.task == "auto" and foreground(found, lookup) < RARE)
    check_task(kind, lesions, section)
    return Target(kind, names_of(named), lookup, lesions, parts)


def each_part(found: Sequence[Held], section: SegmentSection) -> bool:
    """Whether each part of a finding is a lesion."""
    unnumbered = all(value <= 1 for one in found for value in one.values)
    return section.lesion == "part" or (section.lesion == "auto" and unnumbered)


def check_task(kind: MaskKind, lesions: bool, section: SegmentSection) -> None:
    """Refuse settings that would do nothing.

    Raises:
        UserError: tissues are asked for where findings are numbered, or are given what lesions have.
    """
    if kind == "instances" and section.task == "tissues":
        raise UserError("segment.task=tissues: the masks number findings; leave it out, or ingest them as classes")
    if lesions:
        return
    instead = "leave it out, or set segment.task=lesions if these classes are lesions"
    if section.threshold is not None:
        raise UserError(
            f"segment.threshold={section.threshold:g}: tissues are segmented, of which the likeliest is said; {instead}"
        )
    if section.lesion != "auto":
        raise UserError(f"segment.lesion={section.lesion}: tissues are segmented, which are not counted; {instead}")


def foreground(found: Sequence[Held], lookup: Lookup) -> float:
    """Share of the pixels of all masks, as far as they count, that is not background."""
    pixels = np.zeros(256, np.int64)
    for one in found:
        for value, count in one.values.items():
            pixels[lookup[value]] += count
    return float(pixels[1:IGNORED].sum() / max(1, pixels[:IGNORED].sum()))


def left_out(found: Sequence[Held], unmasked: Literal["negative", "left_out"] | str) -> list[str]:
    """Sentences about images that do not count."""
    partly = sum(not one.complete for one in found)
    bare = sum(one.complete and one.kind is None for one in found)
    notes = [f"Left out, as not every mask could be read: {images(partly)}."] if partly else []
    if bare and unmasked == "negative":
        notes.append(f"Without a mask, which counts as without a finding: {images(bare)}.")
    elif bare:
        notes.append(f"Left out, as there is no mask: {images(bare)}.")
    return notes
