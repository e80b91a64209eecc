"""From the masks of a data set to what is segmented: which images count, and what a stored value means.

Masks of `instances` hold k in the k-th finding: all are lesions, told apart one by one. Masks of `classes` hold numbers
that `segment.classes` gives names: those of lesions, of which each connected part is one, or of tissues, which are not
counted.

Legend: n images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ...data.findings import IGNORED
from ...data.record import MaskKind
from ...data.shards import Sample, ShardDataset
from ...engine.errors import UserError
from ..task import Task
from .config import IGNORE, SegmentSection
from .survey import Surveyed

RARE = 0.05  # of all pixels: classes other than background that have less are lesions
TOUCHING = np.ones((3, 3), np.bool_)  # pixels that share a corner are connected


@dataclass(frozen=True)
class Target:
    """What is segmented.

    Attributes:
        classes: names, background first.
        lookup: (256,) class number of each stored value.
        lesions: whether findings are told apart and counted.
        parts: whether each 8-connected part of a finding is a lesion of its own.
    """

    kind: MaskKind
    classes: tuple[str, ...]
    lookup: NDArray[np.uint8]
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
        count = 0
        for value in np.unique(sample.mask).tolist():
            if self.lookup[value] not in (0, IGNORED):
                here = sample.mask == value
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


def read_target(shards: ShardDataset, found: Sequence[Surveyed], section: SegmentSection) -> Asked:
    """What the masks of a data set ask for.

    Raises:
        UserError: there are no masks, their kinds differ, or `segment.classes` does not fit them.
    """
    kind = one_kind(shards, found)
    target = findings(found, section) if kind == "instances" else classes(found, section)
    unmasked = {"auto": "negative" if target.lesions else "left_out"}.get(section.unmasked, section.unmasked)
    rows = np.flatnonzero([counts(one, target, unmasked == "negative") for one in found])
    positive = [any(target.lookup[value] not in (0, IGNORED) for value in found[row].values) for row in rows.tolist()]
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
    return Asked(target, task, keys, tuple(notes))


def counts(one: Surveyed, target: Target, unmasked: bool) -> bool:
    """Whether an image has anything to learn from or be judged by."""
    if one.kind is None:
        return one.complete and unmasked
    return one.complete and any(target.lookup[value] != IGNORED for value in one.values)


def one_kind(shards: ShardDataset, found: Sequence[Surveyed]) -> MaskKind:
    """What masks hold.

    Raises:
        UserError: there are none, or some hold findings and others classes.
    """
    kinds = {one.kind for one in found if one.kind is not None}
    if not kinds:
        raise UserError(
            f"{', '.join(shards.roots)} has no masks; ingest it with them (miram data ingest folder … --masks DIR)"
        )
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(shards.roots)}: some masks number findings, others classes; ingest them with one --mask-kind"
        )
    return kinds.pop()


def findings(found: Sequence[Surveyed], section: SegmentSection) -> Target:
    """Every finding is a lesion.

    Raises:
        UserError: `segment.classes` is set.
    """
    if section.classes is not None:
        raise UserError(
            "segment.classes names values of masks that hold classes, and these number findings; leave it out, or "
            "ingest the data with --mask-kind classes"
        )
    if section.task == "tissues":
        raise UserError("segment.task=tissues: the masks number findings; leave it out, or ingest them as classes")
    lookup = np.ones(256, np.uint8)
    lookup[0] = 0
    unnumbered = all(value <= 1 for one in found for value in one.values)
    parts = section.lesion == "part" or (section.lesion == "auto" and unnumbered)
    return Target("instances", ("background", "lesion"), lookup, lesions=True, parts=parts)


def classes(found: Sequence[Surveyed], section: SegmentSection) -> Target:
    """Lesions or tissues by their values: as named, or every value one, 0 the background.

    Raises:
        UserError: a mask holds a value that `segment.classes` does not name, or there is but one.
    """
    images = Counter(value for one in found for value in one.values)
    named = section.classes or {"background": (0,)} | {str(value): (value,) for value in sorted(images.keys() - {0})}
    lookup = lookup_of(named)
    known = {value for values in named.values() for value in values} | {0}
    if strange := sorted(images.keys() - known):
        told = ", ".join(f"{value} (in {images[value]} images)" for value in strange[:4])
        raise UserError(
            f"segment.classes: masks hold {told}, which no class takes; add it to a class, or to {IGNORE!r}"
        )
    names, rare = tuple(name for name in named if name != IGNORE), foreground(found, lookup) < RARE
    lesions = section.task == "lesions" or (section.task == "auto" and rare)
    return Target("classes", names, lookup, lesions, parts=lesions)


def foreground(found: Sequence[Surveyed], lookup: NDArray[np.uint8]) -> float:
    """Share of the pixels of all masks, as far as they count, that is not background."""
    pixels = np.zeros(256, np.int64)
    for one in found:
        for value, count in one.values.items():
            pixels[lookup[value]] += count
    return float(pixels[1:IGNORED].sum() / max(1, pixels[:IGNORED].sum()))


def lookup_of(named: Mapping[str, Sequence[int]]) -> NDArray[np.uint8]:
    """(256,) class number of each value; those that nobody names, 0 among them, are background."""
    lookup = np.zeros(256, np.uint8)
    for number, name in enumerate(name for name in named if name != IGNORE):
        lookup[list(named[name])] = number
    lookup[list(named.get(IGNORE, ()))] = IGNORED
    return lookup


def left_out(found: Sequence[Surveyed], unmasked: Literal["negative", "left_out"] | str) -> list[str]:
    """Sentences about images that do not count."""
    partly = sum(not one.complete for one in found)
    bare = sum(one.complete and one.kind is None for one in found)
    notes = [f"{partly} images are left out: not every mask of theirs could be read."] if partly else []
    if bare and unmasked == "negative":
        notes.append(f"{bare} images have no mask and count as images without a finding.")
    elif bare:
        notes.append(f"{bare} images without a mask are left out.")
    return notes
