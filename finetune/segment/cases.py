"""What there is to say of one segmented image: pixels of each class, lesions one by one, marks one by one.

Definitions, all in stored pixels; what is over many images is in `measures.py`.

    ignored       pixels of unknown class count nowhere: everything is as though the image ended there
    component     8-connected pixels of one class
    touches       shares a pixel with
    false         a said component that touches no truth of its class
    lesion        one finding of `Target.findings`
    part of a     what a region shows of a lesion: the region without what lies on other lesions of its class, so that
      region      two lesions that meet can both be drawn perfectly
    missed        no said component touches the lesion
    candidate     a component of probability >= rules.floor, of an image the rules.most most probable ones; its score is
                  the peak, its region what is connected to the peak at half of it or more; where several pixels share
                  the peak, it is the one nearest their middle
    hit, iou      a region's part of the lesion has an intersection over union with it of at least rules.iou
    hit, point    the peak lies in the lesion
    HD95          95th percentile of the distances of one outline's pixels to the other outline, the larger of both ways
    surface Dice  share of both outlines' pixels that lie within the tolerance of the other outline

A region may hit several lesions; a lesion is found as surely as the best candidate that hits it. The mask that was said
hits by the same two rules, its components in the place of regions.

Legend: H W of the stored image, K classes with background as class 0, h w of a crop, n of a crop's components.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from ...data.findings import IGNORED, TOUCHING

NAN = float("nan")

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int32]
Box = tuple[slice, slice]


@dataclass(frozen=True)
class Rules:
    """When a mark hits, and how near an outline must be."""

    iou: float = 0.1
    floor: float = 0.05  # probability under which there is no candidate; never above half a threshold (fits.py)
    most: int = 100  # candidates of an image and class, the most probable ones
    tolerance_mm: float = 1.0
    tolerance_px: float = 5.0  # where the spacing is unknown

    def tolerance(self, spacing_mm: float | None) -> float:
        """Pixels within which two outlines agree."""
        return self.tolerance_px if spacing_mm is None else self.tolerance_mm / spacing_mm


@dataclass(frozen=True)
class Overlap:
    """Pixels of one class on one image, and what is said where that class is not."""

    truth: int
    said: int
    both: int
    false_components: int = 0  # said components that touch no truth of the class
    false_area: int = 0  # their pixels

    @property
    def dice(self) -> float:
        """2 both / (truth + said); nan where there is no truth, whatever is said: that is counted as false."""
        return 2 * self.both / (self.truth + self.said) if self.truth else NAN

    @property
    def iou(self) -> float:
        """Both / either; nan where there is no truth."""
        return self.both / (self.truth + self.said - self.both) if self.truth else NAN


@dataclass(frozen=True)
class Lesion:
    """One lesion and what was made of it."""

    cls: int
    number: int
    area: int  # px
    diameter: float  # px, of a disc of that area
    hit_iou: bool  # by the mask that was said
    hit_point: bool
    dice: float  # with the part of the said components that touch it; 0 where missed
    hd95: float  # px; nan where missed
    surface_dice: float  # nan where missed
    score_iou: float  # highest of a candidate that hits it, nan where none
    score_point: float

    @property
    def missed(self) -> bool:
        """Nothing said touches it."""
        return self.dice == 0


@dataclass(frozen=True)
class Candidate:
    """A mark, at whatever threshold."""

    cls: int
    score: float  # its peak probability
    area: int  # px of its region
    lesion_iou: int  # number of the lesion it hits (of several, the one with the largest overlap), 0: none
    lesion_point: int


@dataclass(frozen=True)
class Case:
    """One image."""

    key: str
    patient: str
    fold: int
    spacing_mm: float | None
    height: int
    width: int
    overlaps: tuple[Overlap, ...]  # of classes 1..K-1
    false_components: int  # of all classes
    false_area: int  # px
    lesions: tuple[Lesion, ...]
    candidates: tuple[Candidate, ...]

    @property
    def positive(self) -> bool:
        """Whether there is any truth."""
        return any(overlap.truth for overlap in self.overlaps)


def score_case(
    key: str,
    patient: str,
    fold: int,
    spacing_mm: float | None,
    truth: NDArray[np.uint8],
    findings: NDArray[np.int32] | None,
    said: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    rules: Rules | None = None,
) -> Case:
    """Everything there is to say of one image.

    Args:
        key: of the image.
        patient: whose it is.
        fold: of the model that judged it.
        spacing_mm: of its pixels; None where unknown.
        truth: (H, W) class numbers, IGNORED where nothing is known.
        findings: (H, W) 1.. numbers of lesions, each within one class, 0 elsewhere; None: no lesions, no candidates.
        said: (H, W) class numbers.
        probabilities: (K, H, W).
        rules: None: those that are usual.
    """
    rules = rules or Rules()
    assert truth.shape == said.shape == probabilities.shape[1:], "truth, mask and probabilities of different images"
    overlaps: list[Overlap] = []
    lesions: list[Lesion] = []
    candidates: list[Candidate] = []
    for cls in range(1, len(probabilities)):
        of = OfClass(cls, truth, said, probabilities[cls], findings)
        overlaps.append(of.overlap())
        if findings is not None:
            marks = of.candidates(rules)
            lesions += of.lesions(marks, rules.iou, rules.tolerance(spacing_mm))
            candidates += (of.candidate(mark, rules.iou) for mark in marks)
    falsely = sum(o.false_components for o in overlaps), sum(o.false_area for o in overlaps)
    height, width = truth.shape
    found = tuple(overlaps), *falsely, tuple(lesions), tuple(candidates)
    return Case(key, patient, fold, spacing_mm, height, width, *found)


@dataclass(frozen=True)
class Mark:
    """A region, its peak, and what it shares with the lesions of its class."""

    box: Box
    region: Mask  # (h, w) in the box
    score: float
    on: dict[int, int]  # lesion number -> pixels; 0: pixels on none
    at: int  # lesion under the peak

    def iou(self, number: int, area: int) -> float:
        """Of its part of a lesion with the lesion."""
        return self.on.get(number, 0) / (area + self.on.get(0, 0))

    def touched(self) -> Iterator[int]:
        """Numbers of the lesions it touches."""
        return (number for number in self.on if number)


class OfClass:
    """One class of one image."""

    def __init__(
        self,
        cls: int,
        truth: NDArray[np.uint8],
        said: NDArray[np.uint8],
        probability: NDArray[np.float32],
        findings: NDArray[np.int32] | None,
    ):
        self.cls, self.probability = cls, probability
        self.counted: Mask = truth != IGNORED
        self.truth: Mask = truth == cls
        self.said: Mask = (said == cls) & self.counted
        self.parts, self.boxes = components(self.said)
        self.numbers: Numbers = np.where(self.truth, 0 if findings is None else findings, 0).astype(np.int32)
        self.areas = counts(self.numbers[self.truth])

    def overlap(self) -> Overlap:
        """Pixels, and what is false."""
        areas = np.bincount(self.parts[self.said], minlength=len(self.boxes) + 1)
        false = areas > 0
        false[self.parts[self.truth & self.said]] = False
        both = int(np.count_nonzero(self.truth & self.said))
        return Overlap(int(self.truth.sum()), int(self.said.sum()), both, int(false.sum()), int(areas[false].sum()))

    def candidates(self, rules: Rules) -> list[Mark]:
        """The candidates; a noisy map has ten thousand, of which only the most probable could ever count."""
        labels, boxes = components((self.probability >= rules.floor) & self.counted)
        peaks = ndimage.maximum(self.probability, labels, np.arange(1, len(boxes) + 1)) if boxes else []
        kept = np.sort(np.argsort(-np.asarray(peaks), kind="stable")[: rules.most])
        return [self.mark(boxes[n], labels[boxes[n]] == n + 1, half=True) for n in kept.tolist()]

    def mark(self, box: Box, component: Mask, half: bool) -> Mark:
        """A component's region and peak.

        Args:
            box: the component's.
            component: (h, w) in the box.
            half: whether the region is what is connected to the peak at half of it or more, and not all.
        """
        heights, numbers = self.probability[box], self.numbers[box]
        score = heights[component].max()
        peak = middle(component & (heights == score))
        if half:
            near = ndimage.label(component & (heights >= score / 2), TOUCHING)[0]
            component = near == near[peak]
        return Mark(box, component, float(score), counts(numbers[component]), int(numbers[peak]))

    def candidate(self, mark: Mark, iou: float) -> Candidate:
        """A candidate and the lesion it hits."""
        ious = {number: mark.iou(number, self.areas[number]) for number in mark.touched()}
        best = max(ious, key=ious.__getitem__, default=0)
        hit = best if best and ious[best] >= iou else 0
        return Candidate(self.cls, mark.score, sum(mark.on.values()), hit, mark.at)

    def lesions(self, candidates: list[Mark], iou: float, tolerance: float) -> Iterator[Lesion]:
        """Every lesion of the class, by its number."""
        marks = [self.mark(box, self.parts[box] == n, half=False) for n, box in enumerate(self.boxes, 1)]
        for number, box in enumerate(ndimage.find_objects(self.numbers), 1):
            if box is not None:
                yield self.lesion(number, box, marks, candidates, iou, tolerance)

    def lesion(
        self, number: int, box: Box, marks: list[Mark], candidates: list[Mark], iou: float, tolerance: float
    ) -> Lesion:
        """One of them."""
        area = self.areas[number]
        touching = [mark for mark in marks if number in mark.on]
        both, beside = (sum(mark.on.get(at, 0) for mark in touching) for at in (number, 0))
        hd95, agree = self.outlines(number, box, touching, tolerance) if touching else (NAN, NAN)
        hits = [mark.score for mark in candidates if number in mark.on and mark.iou(number, area) >= iou]
        points = [mark.score for mark in candidates if mark.at == number]
        return Lesion(
            cls=self.cls,
            number=number,
            area=area,
            diameter=2 * sqrt(area / pi),
            hit_iou=any(mark.iou(number, area) >= iou for mark in touching),
            hit_point=any(mark.at == number for mark in marks),
            dice=2 * both / (area + both + beside),
            hd95=hd95,
            surface_dice=agree,
            score_iou=max(hits, default=NAN),
            score_point=max(points, default=NAN),
        )

    def outlines(self, number: int, box: Box, touching: list[Mark], tolerance: float) -> tuple[float, float]:
        """HD95 and surface Dice of a lesion and the part of the components that touch it, on a crop around both."""
        crop = around([box, *(mark.box for mark in touching)])
        numbers, labels = self.numbers[crop], self.parts[crop]
        said = np.isin(labels, [self.parts[mark.box][mark.region][0] for mark in touching])
        return distances(numbers == number, said & ((numbers == 0) | (numbers == number)), tolerance)


def components(mask: Mask) -> tuple[Numbers, list[Box]]:
    """(H, W) numbers 1.. of 8-connected components, and the box of each."""
    labels: Numbers = ndimage.label(mask, TOUCHING)[0]
    return labels, ndimage.find_objects(labels)


def counts(numbers: Numbers) -> dict[int, int]:
    """How often each number occurs."""
    times = np.bincount(numbers)
    return {number: int(times[number]) for number in np.flatnonzero(times).tolist()}


def middle(mask: Mask) -> tuple[int, int]:
    """The pixel of a mask that is nearest its centre; of several the first."""
    y, x = (np.arange(side, dtype=np.float64) for side in mask.shape)
    (down, right), total = (mask.sum(1) @ y, mask.sum(0) @ x), np.count_nonzero(mask)
    far = np.where(mask, (y - down / total)[:, None] ** 2 + (x - right / total) ** 2, np.inf)
    nearest = int(far.argmin())
    return nearest // mask.shape[1], nearest % mask.shape[1]


def around(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all."""
    rows, columns = zip(*boxes, strict=True)
    down, right = (slice(min(s.start for s in of), max(s.stop for s in of)) for of in (rows, columns))
    return down, right


def outline(mask: Mask) -> NDArray[np.int64]:
    """(n, 2) places of a mask's pixels that have a side in common with something else, or with the crop's edge."""
    inside = ndimage.binary_erosion(mask)
    return np.argwhere(mask & ~inside)


def distances(truth: Mask, said: Mask, tolerance: float) -> tuple[float, float]:
    """HD95 and surface Dice of two masks that hold something, in pixels, as MONAI defines them.

    Nearest neighbours among outline pixels, for a said component as large as the breast would have a distance transform
    of millions of pixels for each lesion it touches.
    """
    here, there = outline(truth), outline(said)
    ways = cKDTree(there).query(here)[0], cKDTree(here).query(there)[0]
    return max(float(np.percentile(way, 95)) for way in ways), float((np.concatenate(ways) <= tolerance).mean())
