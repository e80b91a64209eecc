"""Which judged images are shown, and what is looked at on them.

best, worst     highest and lowest Dice of the images with something on them of which something was found
median          nearest to the median Dice of all images with something on them: where most were missed, another miss
missed          the largest of what was missed altogether: lesions that no rule calls hit; classes, on masks of those
false alarm     the most falsely marked pixels, on images with nothing on them as long as there are such

An image is shown once. Its Dice is the mean over the classes that are on it. Legend: H W of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ...data.findings import IGNORED, TOUCHING
from ...data.shards import Sample, ShardDataset
from .cases import Case, Lesion
from .measures import dice_of
from .overlay import Mask, draw_overlay, present
from .target import Target

KINDS = ("best", "median", "worst", "missed", "false alarm")  # in the order they are shown in
SHOWN = 2  # of a kind, at most


@dataclass(frozen=True)
class Example:
    """An image to be shown."""

    kind: str
    case: Case
    why: str
    lesion: Lesion | None = None  # the one that was missed
    cls: int | None = None  # the class that was missed

    def focus(self, target: Target, sample: Sample, truth: NDArray[np.uint8], said: NDArray[np.uint8]) -> Mask | None:
        """(H, W) what is to be seen enlarged; None: the largest finding."""
        if self.kind == "false alarm":
            return largest_false(truth, said)
        if self.lesion is not None:
            return np.asarray(target.findings(sample) == self.lesion.number)
        return None if self.cls is None else np.asarray(truth == self.cls)


def draw_examples(folder: Path, cases: Sequence[Case], shards: ShardDataset, rows: Mapping[str, int], masks: Path,
                  target: Target) -> dict[str, str]:  # fmt: skip
    """Draw `overlay-1-best-1.png` …; the captions by file name.

    Args:
        folder: where they go.
        cases: the judged images.
        shards: that they are from.
        rows: row of the data set by key.
        masks: folder with what was said of each, KEY.png.
        target: what is segmented.
    """
    captions, kinds = {}, list[str]()
    for example in examples(cases, target.classes):
        kinds.append(example.kind)
        kind = f"{KINDS.index(example.kind) + 1}-{example.kind.replace(' ', '-')}"
        name = f"overlay-{kind}-{kinds.count(example.kind)}.png"
        key, sample = example.case.key, shards[rows[example.case.key]]
        truth, said = target.truth(sample), np.asarray(Image.open(masks / f"{key}.png"))
        pixels, focus = np.asarray(sample.pixels), example.focus(target, sample, truth, said)
        title = f"{example.kind}: {key}"
        draw_overlay(folder / name, pixels, sample.max_value, truth, said, target.classes, title, focus=focus)
        captions[name] = f"{example.kind.capitalize()}: {key}, {example.why}."
    return captions


def examples(cases: Sequence[Case], classes: Sequence[str], count: int = SHOWN) -> list[Example]:
    """Up to so many images of each kind, those that are hard to come by chosen first."""
    used: set[str] = set()
    found = {
        kind: taken(of, used, count)
        for kind, of in (
            ("missed", missed(cases, classes)),
            ("false alarm", false_alarms(cases)),
            *by_dice(cases).items(),
        )
    }
    return [example for kind in KINDS for example in found[kind]]


def taken(of: Sequence[Example], used: set[str], count: int) -> list[Example]:
    """The first so many whose images are not used yet, which they are from now on."""
    kept: list[Example] = []
    for example in of:
        if len(kept) < count and example.case.key not in used:
            kept.append(example)
            used.add(example.case.key)
    return kept


def by_dice(cases: Sequence[Case]) -> dict[str, list[Example]]:
    """Best, worst and median, each in its order. A third of the images at most is best, and a third worst."""
    positive = sorted((case for case in cases if case.positive), key=dice_of)
    something = [case for case in positive if dice_of(case) > 0]
    if not something:
        return {"best": [], "worst": [], "median": []}
    middle, share = float(np.median([dice_of(case) for case in positive])), max(1, len(something) // 3)
    near = sorted(positive, key=lambda case: abs(dice_of(case) - middle))
    of = f"of {len(positive)} images with something on them"
    among = f"{len(something)} on which something was found"

    def told(kind: str, chosen: Sequence[Case], why: str) -> list[Example]:
        return [Example(kind, case, f"Dice {dice_of(case):.3f}, {why}") for case in chosen]

    return {
        "best": told("best", something[::-1][:share], f"among the highest of {among}"),
        "worst": told("worst", something[:share], f"among the lowest of {among}"),
        "median": told("median", near, f"nearest to the median {middle:.3f} {of}"),
    }


def missed(cases: Sequence[Case], classes: Sequence[str]) -> list[Example]:
    """What was missed altogether, the largest first: lesions, and classes where no lesions are told apart."""
    found: list[tuple[float, Example]] = []
    for case in cases:
        for lesion in case.lesions:
            if not (lesion.hit_iou or lesion.hit_point):
                why = f"a {classes[lesion.cls]} of {across(case, lesion)}, among the largest that no rule counts as hit"
                found.append((lesion.area, Example("missed", case, why, lesion=lesion)))
        for cls, overlap in enumerate(case.overlaps, 1):
            if not case.lesions and overlap.truth and not overlap.both:
                why = f"nothing of its {overlap.truth:,} pixels of {classes[cls]} was found"
                found.append((overlap.truth, Example("missed", case, why, cls=cls)))
    return [example for _, example in sorted(found, key=lambda one: -one[0])]


def false_alarms(cases: Sequence[Case]) -> list[Example]:
    """Where most is said that touches nothing of its class; images with nothing on them come first."""
    found = sorted((case for case in cases if case.false_area), key=lambda case: (case.positive, -case.false_area))
    return [Example("false alarm", case, "".join(told_false(case))) for case in found]


def told_false(case: Case) -> Iterator[str]:
    """What a false alarm is."""
    parts = "1 part" if case.false_components == 1 else f"{case.false_components} parts"
    yield f"{parts} of {case.false_area:,} pixels in all marked where nothing of the class is"
    yield ", on an image with other findings" if case.positive else ", on an image with nothing on it"


def across(case: Case, lesion: Lesion) -> str:
    """A lesion's diameter in words."""
    if case.spacing_mm is None:
        return f"{lesion.diameter:.0f} pixels across"
    return f"{lesion.diameter * case.spacing_mm:.1f} mm across"


def largest_false(truth: NDArray[np.uint8], said: NDArray[np.uint8]) -> Mask:
    """The largest connected part of what was said of a class that touches nothing of it; nothing where all do."""
    best, most = np.zeros(said.shape, np.bool_), 0
    for cls in np.unique(said[present(said)]).tolist():
        number, _ = ndimage.label((said == cls) & (truth != IGNORED), TOUCHING)
        size = np.bincount(number.ravel())
        size[np.unique(number[truth == cls])] = size[0] = 0
        if size.max() > most:
            best, most = number == size.argmax(), int(size.max())
    return best
