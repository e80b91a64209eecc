"""A data set in the raw layout of nnU-Net v2, which can then learn from the same images of the same patients.

OUT/Dataset501_Lesions/       OUT is the folder that nnU-Net calls nnUNet_raw
    dataset.json              {"channel_names": {"0": "mammogram"}, "labels": {"background": 0, "lesion": 1},
                              "numTraining", "file_ending": ".png", "overwrite_image_reader_writer":
                              "NaturalImage2DIO", "name", "licence"}
    splits_final.json         [{"train": [KEY, …], "val": [KEY, …]}, …]: a fold is a set of whole patients; nnU-Net
                              looks for it in nnUNet_preprocessed/Dataset501_Lesions, else it divides images
    imagesTr/KEY_0000.png     as stored: grey of 8 or 16 bits, or RGB, whose three channels are in one file
    labelsTr/KEY.png          0 background, 1, 2, … the classes; "ignore", if there is one, is the highest
    imagesTs/, labelsTs/      the same of patients in split test, which nnU-Net itself leaves alone

Channels that are not called CT, or by the name of another scheme, are brought to mean 0 and deviation 1 image by image,
so that it does not matter how many bits are in use. PNG tells no spacing: nnU-Net takes all pixels to be alike.

Folds are those of `miram data split`; `miram segment` deals its own (finetune/task.py), which validate on other
patients, so that only figures of the test can be compared patient by patient.

Source: documentation/{dataset_format,manual_data_splits,ignore_label}.md of https://github.com/MIC-DKFZ/nnUNet.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import UserError
from ..engine.files import make_folder, sync_folder, write_atomic
from ..engine.track import Meter
from .divide import make_split
from .findings import IGNORED
from .image import encode_png
from .layout import LABEL, partial_folder
from .masks import (
    BACKGROUND,
    IGNORED_NAME,
    Classes,
    Held,
    Lookup,
    all_named,
    images,
    look,
    lookup_of,
    names_of,
    one_kind,
)
from .record import MaskKind
from .shards import ShardDataset
from .splits import TEST, patient_of, read_split, refuse_shared_patients

IGNORE = "ignore"  # nnU-Net's word, as `background` is
READER = "NaturalImage2DIO"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PRESENT = "mask"  # a label that says whether a patient has anything in a mask


@dataclass(frozen=True)
class Labels:
    """What the values of stored masks become."""

    kind: MaskKind
    names: tuple[str, ...]  # by nnU-Net's numbers: background first, what is ignored last
    lookup: Lookup

    @property
    def numbers(self) -> NDArray[np.uint8]:
        """(256,) nnU-Net's number of each stored value."""
        return np.where(self.lookup == IGNORED, len(self.names) - 1, self.lookup).astype(np.uint8)


@dataclass(frozen=True)
class Exported:
    """What was written, and what its owner should know."""

    folder: Path
    training: int
    test: int
    left_out: int
    notes: tuple[str, ...]

    def summary(self) -> str:
        """What its owner is told, and what there is to do."""
        also = f", {self.test} of test patients" if self.test else ""
        without = f", {self.left_out} left out" if self.left_out else ""
        return (
            f"{self.folder} holds {images(self.training)} to train on{also}{without}\n"
            f"after nnUNetv2_plan_and_preprocess, copy {self.folder / 'splits_final.json'} to "
            f"nnUNet_preprocessed/{self.folder.name}/: without it, nnU-Net divides images and not patients"
        )


def export(
    folders: Sequence[str],
    out: Path,
    *,
    number: int = 501,
    name: str = "Lesions",
    classes: Classes | None = None,
    folds: int = 5,
    seed: int = 0,
    split_file: Path | None = None,
) -> Exported:
    """Write a data set for nnU-Net.

    Args:
        folders: data sets with masks.
        out: the folder of all its data sets.
        number: of the data set, 1 to 999.
        name: of the data set.
        classes: of masks that hold classes: values by name, background first, `ignored` for those that count for
            nothing; None: every value is a class.
        folds: parts of the training patients, each of which is validated on once; at least 2.
        seed: of the folds.
        split_file: of `miram data split`: says who is in test, and the folds if it has some.

    Raises:
        UserError: the data has no masks, `classes` does not fit them, a patient is in several splits, there are fewer
            patients than folds, or the data set is there already.
    """
    folder = free_folder(out, number, name)
    shards = ShardDataset(folders, split_file=split_file)
    if split_file is None:
        refuse_shared_patients(shards.rows, ", ".join(shards.roots))
    held = look(shards)
    labels = labels_of(shards, held, classes)
    rows = [row for row, one in enumerate(held) if one.counts(labels.lookup, labels.kind == "instances")]
    test = {row for row in rows if shards.splits[row] == TEST}
    train = [row for row in rows if row not in test]
    if not any(held[row].positive(labels.lookup) for row in train):
        raise UserError(f"{', '.join(shards.roots)}: no mask of a training image holds anything but background")
    folds_of = divided(shards, held, labels, train, folds, seed, split_file)
    part = partial_folder(folder)
    shutil.rmtree(part, ignore_errors=True)
    write_images(shards, labels, rows, test, part)
    write_json_at(part / "dataset.json", described(shards, labels, len(train), folder.name))
    write_json_at(part / "splits_final.json", folds_of)
    part.rename(folder)
    sync_folder(out)
    return Exported(folder, len(train), len(test), len(held) - len(rows), tuple(notes(shards)))


def free_folder(out: Path, number: int, name: str) -> Path:
    """Where the data set is to lie.

    Raises:
        UserError: the number or the name is none that nnU-Net takes, or the number is taken.
    """
    if not 1 <= number <= 999:
        raise UserError(f"--id {number}: give a number from 1 to 999")
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: give letters, digits, - and _")
    if taken := sorted(out.glob(f"Dataset{number:03d}_*")):
        raise UserError(f"{taken[0]} is there already; give another --id, or remove it")
    return out / f"Dataset{number:03d}_{name}"


def labels_of(shards: ShardDataset, held: Sequence[Held], classes: Classes | None) -> Labels:
    """What the values become.

    Raises:
        UserError: there are no masks, their kinds differ, or the classes do not fit them or nnU-Net.
    """
    kind = one_kind(shards, held)
    named = all_named(kind, held, classes, "--classes")
    names = (BACKGROUND, *names_of(named)[1:])
    if len(set(names)) < len(names) or IGNORE in names:
        raise UserError(f"--classes: nnU-Net calls the first class {BACKGROUND} and keeps {IGNORE}; use other names")
    return Labels(kind, (*names, IGNORE) if IGNORED_NAME in named else names, lookup_of(named))


# ---------------------------------------------------------------------------------------------- folds


def divided(
    shards: ShardDataset,
    held: Sequence[Held],
    labels: Labels,
    train: Sequence[int],
    folds: int,
    seed: int,
    split_file: Path | None,
) -> list[dict[str, list[str]]]:
    """Keys to train and to validate on, fold by fold: whole patients, with and without findings alike."""
    known = read_split(split_file).folds if split_file is not None else ()
    patients = {row: patient_of(shards.rows[row]) for row in train}
    if not known:
        positive = {patients[row] for row in train if held[row].positive(labels.lookup)}
        told = [shards.rows[row] | {LABEL + PRESENT: str(patients[row] in positive)} for row in train]
        known = make_split(told, task=PRESENT, seed=seed, test=0, folds=folds).folds
    key = {row: shards.rows[row]["key"] for row in train}
    return [
        {
            "train": [key[row] for row in train if patients[row] not in fold],
            "val": [key[row] for row in train if patients[row] in fold],
        }
        for fold in map(set, known)
    ]


# ---------------------------------------------------------------------------------------------- files


def write_images(shards: ShardDataset, labels: Labels, rows: Sequence[int], test: set[int], folder: Path) -> None:
    """Every image and its labels."""
    for name in ("Tr", "Ts") if test else ("Tr",):
        for kind in ("images", "labels"):
            make_folder(folder / f"{kind}{name}")
    with Meter("images", len(rows)) as meter:
        for row in rows:
            sample, side = shards[row], "Ts" if row in test else "Tr"
            mask = np.zeros(sample.pixels.shape[:2], np.uint8) if sample.mask is None else sample.mask
            (folder / f"images{side}" / f"{sample.key}_0000.png").write_bytes(encode_png(np.asarray(sample.pixels)))
            (folder / f"labels{side}" / f"{sample.key}.png").write_bytes(encode_png(labels.numbers[mask]))
            meter.advance()


def described(shards: ShardDataset, labels: Labels, training: int, name: str) -> dict[str, Any]:
    """What dataset.json holds."""
    channels = ("mammogram",) if shards.channels == 1 else ("R", "G", "B")
    return {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": {label: i for i, label in enumerate(labels.names)},
        "numTraining": training,
        "file_ending": ".png",
        "overwrite_image_reader_writer": READER,
        "name": name,
        "licence": ", ".join(sorted({str(manifest.get("licence", "unknown")) for manifest in shards.manifests})),
    }


def write_json_at(path: Path, content: Any) -> None:
    """JSON in the form of nnU-Net, without a schema's name."""
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def notes(shards: ShardDataset) -> Iterator[str]:
    """What may be other than the user thinks."""
    found = sorted({float(value) for value in shards.rows.column("spacing_mm") if value})
    if len(found) > 1:
        yield (
            f"pixels are {found[0]:g} to {found[-1]:g} mm wide, and PNG does not say so: nnU-Net takes them to be "
            "alike; make them so first with `miram data resize --spacing`"
        )
