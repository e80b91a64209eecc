"""Breast Ultrasound Images (Al-Dhabyani et al. 2020): 780 images of 600 women, a mask a lesion.

    SRC/[Dataset_BUSI_with_GT/]benign/benign (1).png            gray, stored as RGB; sizes differ
                               benign/benign (1)_mask.png       of the first lesion, black where there is none
                               benign/benign (1)_mask_1.png …   of others, in 17 images
                               malignant/…, normal/…

Nothing tells which images are of one woman, and a letter to the journal (Pawłowska et al. 2023) found many duplicates,
some of them in two classes: figures on random splits of this set are too good. `binary` is 1 for malignant and 0 for
benign and normal. Written from the published description; no original file was seen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from pathlib import Path

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..image import stamp
from ..reading import walk_files
from ..record import Record
from .folder import Reading, read_one

FILE = re.compile(r"((benign|malignant|normal) \(\d+\))(_mask(?:_(\d+))?)?\.png", re.IGNORECASE)
LICENCE = "BUSI: none stated; cite Al-Dhabyani et al. 2020"
NOTES = (
    "patients are unknown: each image counts as one of its own, though 600 women have 780 images",
    "many images are known to be near-duplicates (Pawlowska et al. 2023), some in two classes: splits leak",
)


def read(src: Path, options: SourceOptions) -> Archive:
    """The images that are there, with their masks.

    Raises:
        UserError: none is there, or one is there twice.
    """
    options.only("busi", "channels")
    images: dict[str, Path] = {}
    masks: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in walk_files(src):
        if match := FILE.fullmatch(path.name):
            name = match[1].lower()
            if match[3]:
                masks[name].append((int(match[4] or 0), path))
            elif name in images:
                raise UserError(f"{src} holds {path.name} twice, as {images[name]} and {path}; name one copy's folder")
            else:
                images[name] = path
    if not images:
        raise UserError(f"{src} holds no `benign (1).png` or the like; name the folder Dataset_BUSI_with_GT")
    records = [record(name, path, [p for _, p in sorted(masks[name])], options) for name, path in images.items()]
    bare = sum(not masks[name] for name in images)
    return Archive(
        dataset="busi",
        licence=LICENCE,
        records=records,
        breast=False,
        channels=options.channels,
        notes=(*NOTES, *([f"{bare} images have no mask"] if bare else [])),
    )


def record(name: str, path: Path, masks: list[Path], options: SourceOptions) -> Record:
    """An image's record."""
    kind = name.split()[0]
    how = Reading(path=path, dicom=options.dicom, channels=options.channels, masks=tuple(masks))
    return Record(
        read=partial(read_one, how),
        name=path.name,
        stamp=", ".join(stamp(file) for file in (path, *masks)),
        image_id=name,
        patient_id=f"image:{name}",
        labels={"class": kind, "binary": int(kind == "malignant")},
    )
