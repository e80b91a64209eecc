"""What the masks of a data set hold, and which class each stored value stands for.

Masks of `instances` hold k in the k-th finding: all are lesions. Masks of `classes` hold numbers that the user may
name, background first; where nobody does, every number is a class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import UserError
from ..engine.track import Meter
from .findings import IGNORED
from .record import MaskKind
from .shards import Sample, ShardDataset

BACKGROUND, LESION = "background", "lesion"
IGNORED_NAME = "ignored"  # what the user calls values that count for nothing
NUMBERED = {BACKGROUND: (0,), LESION: tuple(range(1, 256))}

Classes = Mapping[str, Sequence[int]]  # stored values by name, background first
Lookup = NDArray[np.uint8]  # (256,) class number of each stored value, IGNORED where it counts for nothing


@dataclass(frozen=True)
class Held:
    """What the mask of one image holds."""

    kind: MaskKind | None  # None: it has no mask
    complete: bool  # whether ingest could use every mask of it
    values: Mapping[int, int]  # how many pixels have each value

    @classmethod
    def of(cls, sample: Sample) -> Held:
        """As the sample tells."""
        complete = not dict(sample.meta.get("facts", {})).get("masks")
        if sample.mask is None:
            return cls(None, complete, {})
        pixels = np.bincount(sample.mask.ravel(), minlength=256)
        values = {value: int(pixels[value]) for value in np.flatnonzero(pixels).tolist()}
        return cls(sample.meta.get("mask_kind", "instances"), complete, values)

    def counts(self, lookup: Lookup, unmasked: bool) -> bool:
        """Whether there is anything to learn from or be judged by; `unmasked`: so there is without a mask."""
        if self.kind is None:
            return self.complete and unmasked
        return self.complete and any(lookup[value] != IGNORED for value in self.values)

    def positive(self, lookup: Lookup) -> bool:
        """Whether there is any class but background."""
        return any(lookup[value] not in (0, IGNORED) for value in self.values)


def look(shards: ShardDataset) -> list[Held]:
    """What every image's mask holds, in the order of the rows.

    Raises:
        UserError: a sample is damaged.
    """
    found = []
    with Meter("masks", len(shards)) as meter:
        for i in range(len(shards)):
            found.append(Held.of(shards[i]))
            meter.advance()
    return found


def one_kind(shards: ShardDataset, held: Sequence[Held]) -> MaskKind:
    """What masks hold.

    Raises:
        UserError: there are none, or some hold findings and others classes.
    """
    kinds = {one.kind for one in held if one.kind is not None}
    where = ", ".join(shards.roots)
    if not kinds:
        raise UserError(f"{where} has no masks; ingest it with them (miram data ingest folder … --masks DIR)")
    if len(kinds) > 1:
        raise UserError(f"{where}: some masks number findings, others classes; ingest them with one --mask-kind")
    return kinds.pop()


def all_named(kind: MaskKind, held: Sequence[Held], named: Classes | None, setting: str) -> Classes:
    """Classes that cover every value: as the user named them, or each value one with 0 as the background.

    Args:
        kind: of all masks; findings are one class, `lesion`.
        named: by the user.
        setting: where the user names them, for messages.

    Raises:
        UserError: findings are named, or a mask holds a value that has no name.
    """
    if kind == "instances":
        if named is not None:
            raise UserError(
                f"{setting} names values of masks that hold classes, and these number findings; leave it out, or "
                "ingest the data with --mask-kind classes"
            )
        return NUMBERED
    holders = Counter(value for one in held for value in one.values)
    named = named or {BACKGROUND: (0,)} | {str(value): (value,) for value in sorted(holders.keys() - {0})}
    known = {value for values in named.values() for value in values} | {0}
    if strange := sorted(holders.keys() - known):
        told = ", ".join(f"{value} (in {images(holders[value])})" for value in strange[:4])
        raise UserError(
            f"{setting}: masks hold {told}, which no class takes; add it to a class, or to {IGNORED_NAME!r}"
        )
    if len(names_of(named)) > IGNORED:
        raise UserError(f"{setting}: masks hold {len(names_of(named))} classes, and {IGNORED} are the most; join some")
    return named


def names_of(named: Classes) -> tuple[str, ...]:
    """Names by class number."""
    return tuple(name for name in named if name != IGNORED_NAME)


def lookup_of(named: Classes) -> Lookup:
    """Class number of each value; those that nobody names, 0 among them, are background."""
    lookup = np.zeros(256, np.uint8)
    for number, name in enumerate(names_of(named)):
        lookup[list(named[name])] = number
    lookup[list(named.get(IGNORED_NAME, ()))] = IGNORED
    return lookup


def images(count: int) -> str:
    """A number of them, in words."""
    return "1 image" if count == 1 else f"{count} images"
