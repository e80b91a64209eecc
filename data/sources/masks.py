"""Masks in files of their own: which image each belongs to, and what its values mean.

    IMAGES/a/film7.png      MASKS/a/film7.png           the image's name, in the same place or anywhere below MASKS
                            MASKS/film7_mask.png        with one of WORDS behind or in front of it
                            MASKS/film7_mask_1.png …    numbered: one file a finding
                            MASKS/film7_benign.png      with a word of FINDINGS: one file a finding, the word its label

Other words of a mask's name are dropped, as labels are stored in the clear and the word may be a patient's name.

Instances: a file of black and white is one finding. Black and white is what has two values, is a JPEG, or has
grey levels only along the edges (JPEG's ringing, smoothing): it is cut at half. A file of several values numbers its
findings, and keeps its numbers. Classes: the values are kept as they are. Palettes of colours give their numbers.
DICOM masks are not looked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ...engine.errors import UserError
from ..image import SUFFIXES, UnreadableImage, as_stored, in_gray, opened
from ..record import Film, MaskKind, Pixels

WORDS = {"mask", "masks", "seg", "segmentation", "label", "labels", "lesion", "li", "roi", "annotation", "annotations"}
WORDS |= {"gt", "groundtruth", "ground", "truth"}
_FINDINGS = """
benign malignant normal abnormal suspicious cancer carcinoma dcis idc ilc tumour tumor mass masses cyst nodule
calc calcs calcification calcifications microcalcification microcalcifications cluster architectural distortion
fibroadenoma asymmetry focal global spiculated lymph node implant scar breast pectoral muscle nipple skin fat
gland vessel optic disc cup haemorrhage hemorrhage exudate
"""
FINDINGS = set(_FINDINGS.split())
IMAGE_WORDS = {"image", "img", "orig", "original"}  # film7_image.png has the mask film7_mask.png
VIEWS = {"l", "r", "left", "right", "cc", "mlo", "ml", "lm", "lat"}  # such a word makes it the name of another image
SEPARATOR = r"[\s_.()-]"
JPEG_REACH = 8  # pixels from an edge that compression disturbs: one block
MOST_GREY = 0.2  # of all pixels, on edges; real masks have 0.015, noise three quarters
MOST_NUMBERS = 64  # findings in one file
Values = NDArray[np.uint8]


@dataclass(frozen=True)
class MaskFile:
    """A mask's file, what its name calls the finding (maybe nothing), and its number among several."""

    path: Path
    finding: str = ""
    number: int = 0
    strange: bool = False  # its name holds other words, which were dropped


# ---------------------------------------------------------------------------------------------- names


def stem_of(path: Path) -> str:
    """The name without its suffix, where that is one: DICOM files are called 1.2.840.113 too."""
    return path.stem if path.suffix.lower() in SUFFIXES | {".dcm", ".dicom"} else path.name


def meaning(path: Path, rest: str, *, marked: bool = False) -> MaskFile | None:
    """What stands behind the image's name in a mask's; None where it is another image's name, or not `marked`."""
    tokens = [token for token in re.split(SEPARATOR, rest) if token]
    words = [token for token in tokens if not token.isdecimal() and token.lower() not in WORDS]
    numbers = [int(token[:9]) for token in tokens if token.isdecimal()]
    has_mark = any(token.lower() in WORDS for token in tokens)
    if len(words) > 2 or len(numbers) > 1 or any(word.lower() in VIEWS for word in words):
        return None
    if (marked and not has_mark) or (tokens and not words and not has_mark):
        return None
    found = [word.lower() for word in words if word.lower() in FINDINGS]
    return MaskFile(path, " ".join(found), numbers[0] if numbers else 0, len(found) < len(words))


def prefixes(stem: str) -> Iterator[tuple[str, str]]:
    """The ways to cut a mask's name into an image's name and the rest, longest first; a word in front goes behind."""
    yield stem, ""
    cuts = [match.start() for match in re.finditer(SEPARATOR, stem)]
    yield from ((stem[:cut], stem[cut:]) for cut in reversed(cuts))
    if cuts and stem[: cuts[0]].lower() in WORDS:
        yield stem[cuts[0] + 1 :], stem[: cuts[0]]


def split_shared(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(images, masks) of files that lie together: a mask is called as another file, and one of WORDS."""
    stems = {stem_of(path) for path in files}

    def is_mask(path: Path) -> bool:
        stem = stem_of(path)
        return any(p != stem and p in stems and meaning(path, rest, marked=True) for p, rest in prefixes(stem))

    masks = [path for path in files if is_mask(path)]
    known = set(masks)
    return [path for path in files if path not in known], masks


def pair(
    images: Sequence[Path], src: Path, files: Sequence[Path], folder: Path
) -> tuple[dict[Path, list[MaskFile]], list[Path]]:
    """The masks of each image that has some, in the order of their numbers, and the files that belong to none.

    Raises:
        UserError: a mask fits several images.
    """
    by_name = defaultdict(list)
    for image in images:
        by_name[stem_of(image)].append(image)
        if (short := _without_image_word(stem_of(image))) != stem_of(image):
            by_name[short].append(image)
    pairs: dict[Path, list[MaskFile]] = defaultdict(list)
    strays = []
    for file in files:
        name, rest = next(((p, rest) for p, rest in prefixes(stem_of(file)) if p in by_name), ("", ""))
        mask = meaning(file, rest) if name else None
        if mask is None:
            strays.append(file)
        else:
            pairs[_the_one(by_name[name], src, file, folder)].append(mask)
    return {image: sorted(m, key=lambda m: (m.number, m.path)) for image, m in pairs.items()}, strays


def _without_image_word(stem: str) -> str:
    first, *others = tokens = re.split(r"([\s_.-]+)", stem)
    if tokens[-1].lower() in IMAGE_WORDS:
        return "".join(tokens[:-2])
    return "".join(others[1:]) if first.lower() in IMAGE_WORDS else stem


def _the_one(images: list[Path], src: Path, file: Path, folder: Path) -> Path:
    """Of images with the same name the one that lies where the mask does, or has its whole name."""
    place = file.parent.relative_to(folder)
    for close in (
        images,
        [image for image in images if image.parent == file.parent or image.parent.relative_to(src) == place],
        [image for image in images if image.parent.relative_to(src) == place and image.name == file.name],
    ):
        if len(close) == 1:
            return close[0]
    raise UserError(
        f"the mask {file} fits {len(images)} images, such as {images[0]} and {images[1]}; "
        "give masks the same folders below --masks as the images have"
    )


# ---------------------------------------------------------------------------------------------- values


def with_masks(film: Film, paths: Sequence[Path], kind: MaskKind) -> Film:
    """The film with the masks in these files as one; without any, as it is.

    Where findings overlap, the smaller one is kept whole. Numbers follow the order of the files.

    Raises:
        UnreadableImage: a mask cannot be read, has another size than the film, or values that do not fit its kind.
    """
    if not paths:
        return film
    masks = [read_mask(path, kind) for path in paths]
    for mask in masks:
        if mask.shape != film.pixels.shape[:2]:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (mask.shape, film.pixels.shape)]
            raise UnreadableImage(f"its mask has {sizes[0]} pixels, the image {sizes[1]}")
    return replace(film, mask=masks[0] if len(masks) == 1 else joined(masks), mask_kind=kind)


def joined(masks: Sequence[Values]) -> Values:
    """Masks of instances as one, numbered through."""
    parts = [mask == number for mask in masks for number in np.unique(mask) if number]
    if len(parts) > np.iinfo(np.uint8).max:
        raise UnreadableImage(f"its masks hold {len(parts)} findings, and 255 can be kept")
    result = np.zeros(masks[0].shape, np.uint8)
    for number, part in sorted(enumerate(parts, 1), key=lambda numbered: -int(numbered[1].sum())):
        result[part] = number
    return result


def read_mask(path: Path, kind: MaskKind) -> Values:
    """(H, W) numbers of findings or classes; 0 is nothing.

    Raises:
        UnreadableImage: no image, in colour, numbers beyond 255, or grey levels that number nothing.
    """
    try:
        with opened(path) as image:
            lossy, values = image.format in ("JPEG", "MPO"), _numbers(image)
    except UnreadableImage as error:
        raise UnreadableImage(f"its mask: {error}") from error
    if kind == "classes" and lossy:
        raise UnreadableImage("its mask is a JPEG, which does not keep the numbers of classes; save it as PNG")
    if kind == "instances" and lossy:
        return (values > np.iinfo(np.uint8).max // 2).astype(np.uint8)
    return instances(values) if kind == "instances" else _small(values)


def _numbers(image: Image.Image) -> Pixels:
    expanded, _ = as_stored(image, upright=True)
    if image.mode == "P" and (expanded != expanded[..., :1]).any():
        indexes: Pixels = np.asarray(image)
        return indexes
    return in_gray(expanded)


def instances(values: Pixels) -> Values:
    """Numbers of findings in a file that keeps values exactly.

    Raises:
        UnreadableImage: neither black and white, nor few enough values to be numbers.
    """
    found: list[int] = np.unique(values).tolist()
    if len(found) == 2:
        return (values == found[1]).astype(np.uint8)
    numbers = [value for value in found if value > 0]
    if len(numbers) < 2:
        return (values > 0).astype(np.uint8)
    counted = numbers[-1] == len(numbers) <= MOST_NUMBERS  # 1, 2, 3 …
    if not counted and is_black_and_white(values, numbers[-1]):
        return (values > numbers[-1] // 2).astype(np.uint8)
    if len(numbers) > MOST_NUMBERS:
        raise UnreadableImage(
            f"its mask has {len(numbers)} grey levels, neither black and white nor numbers of findings"
        )
    return _small(values)


def is_black_and_white(values: Pixels, white: int) -> bool:
    """Whether every grey lies near an edge between black and white, and few do."""
    if ((values > white / 8) & (values < white * 7 / 8)).mean() > MOST_GREY:
        return False
    bright = (values > white // 2).astype(np.uint8)
    size = 2 * JPEG_REACH + 1
    edge = ndimage.maximum_filter(bright, size) != ndimage.minimum_filter(bright, size)
    return not ((values > 0) & (values < white) & ~edge).any()


def _small(values: Pixels) -> Values:
    if values.max() > np.iinfo(np.uint8).max:
        raise UnreadableImage(f"its mask holds the number {values.max()}, and 255 is the largest that can be kept")
    return values.astype(np.uint8)
