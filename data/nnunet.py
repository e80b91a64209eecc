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

Source: documentation/{dataset_format,manual_data_splits,ignore_label}.md of https://github.com/MIC-DKFZ/nnUNet.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import UserError
from ..engine.files import make_folder, sync_folder, write_atomic
from ..engine.track import Meter
from .arguments import IGNORED
from .divide import make_split
from .image import decode_png, encode_png
from .layout import LABEL, partial_folder
from .record import MaskKind
from .shards import ShardDataset
from .splits import TEST, patient_of, read_split, refuse_shared_patients

BACKGROUND, LESION, IGNORE = "background", "lesion", "ignore"  # the first and the last are nnU-Net's words
READER = "NaturalImage2DIO"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PRESENT = "mask"  # a label that says whether a patient has anything in a mask

Classes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Labels:
    """What the values of stored masks become: names by number, background first, and (256,) numbers by value."""

    kind: MaskKind
    names: tuple[str, ...]
    lookup: NDArray[np.uint8]

    @property
    def ignored(self) -> int | None:
        """The number of pixels that count for nothing."""
        return self.names.index(IGNORE) if IGNORE in self.names else None


@dataclass(frozen=True)
class Held:
    """What the mask of an image holds; kind None: it has no mask."""

    kind: MaskKind | None
    complete: bool  # whether ingest could use every mask of it
    values: frozenset[int]


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
            f"{self.folder} holds {self.training} images to train on{also}{without}\n"
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
        folds: parts of the training patients, each of which is validated on once; 0: none are said.
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
    rows = [row for row, one in enumerate(held) if counts(one, labels)]
    test = {row for row in rows if shards.splits[row] == TEST}
    train = [row for row in rows if row not in test]
    if not any(foreground(held[row], labels) for row in train):
        raise UserError(f"{', '.join(shards.roots)}: no mask of a training image holds anything but background")
    folds_of = divided(shards, held, labels, train, folds, seed, split_file)
    part = partial_folder(folder)
    shutil.rmtree(part, ignore_errors=True)
    write_images(shards, labels, rows, test, part)
    write_json_at(part / "dataset.json", described(shards, labels, len(train), folder.name))
    if folds_of:
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


# ---------------------------------------------------------------------------------------------- what masks hold


def look(shards: ShardDataset) -> list[Held]:
    """What every mask holds."""
    found = []
    with Meter("masks", len(shards)) as meter:
        for i, row in enumerate(shards.rows):
            meta = read_meta(shards, i)
            complete = not dict(meta.get("facts", {})).get("masks")
            if row.get("mask.png_size"):
                mask = decode_png(shards.member(i, "mask.png"), row["key"])
                values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()
                found.append(Held(meta.get("mask_kind", "instances"), complete, frozenset(values)))
            else:
                found.append(Held(None, complete, frozenset()))
            meter.advance()
    return found


def read_meta(shards: ShardDataset, i: int) -> Mapping[str, Any]:
    """A sample's JSON, without its pixels.

    Raises:
        UserError: it is damaged.
    """
    row = shards.rows[i]
    try:
        return dict(json.loads(shards.member(i, "json"))) if row.get("json_size") else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shards.root(i)}: sample {row['key']} has a damaged JSON; run `miram data verify`") from error


def labels_of(shards: ShardDataset, held: Sequence[Held], classes: Classes | None) -> Labels:
    """What the values become.

    Raises:
        UserError: there are no masks, their kinds differ, or the classes do not fit them.
    """
    where, kinds = ", ".join(shards.roots), {one.kind for one in held if one.kind is not None}
    if len(kinds) != 1:
        fault = "some masks number findings, others classes" if kinds else "it has no masks"
        raise UserError(f"{where}: {fault}; ingest it with --masks and one --mask-kind")
    if kinds == {"instances"}:
        if classes is not None:
            raise UserError(f"{where}: its masks number findings, and have no classes to name; leave out --classes")
        return Labels("instances", (BACKGROUND, LESION), np.minimum(np.arange(256), 1).astype(np.uint8))
    values = frozenset().union(*(one.values for one in held))
    named = classes or {BACKGROUND: (0,)} | {str(value): (value,) for value in sorted(values - {0})}
    known = {value for of in named.values() for value in of} | {0}
    if strange := sorted(values - known):
        told = ", ".join(map(str, strange[:4]))
        raise UserError(f"{where}: masks hold {told}, which --classes leaves out; add it to a class, or to {IGNORED}")
    return numbered(named)


def numbered(named: Classes) -> Labels:
    """Classes as nnU-Net numbers them: without a gap, the first called background, what is ignored last."""
    kept = [name for name in named if name != IGNORED]
    names, lookup = (BACKGROUND, *kept[1:]), np.zeros(256, np.uint8)
    if len(set(names)) < len(names) or IGNORE in names:
        raise UserError(f"--classes: nnU-Net calls the first class {BACKGROUND} and keeps {IGNORE}; use other names")
    for number, name in enumerate((*kept, *([IGNORED] if IGNORED in named else ()))):
        lookup[list(named[name])] = number
    return Labels("classes", (*names, IGNORE) if IGNORED in named else names, lookup)


def foreground(one: Held, labels: Labels) -> bool:
    """Whether a mask holds any class."""
    return any(labels.lookup[value] not in (0, labels.ignored) for value in one.values)


def counts(one: Held, labels: Labels) -> bool:
    """Whether an image goes out. One without a mask has no finding; of classes nobody knows where they lie."""
    if one.kind is None:
        return one.complete and labels.kind == "instances"
    return one.complete and any(labels.lookup[value] != labels.ignored for value in one.values)


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
        positive = {patients[row] for row in train if foreground(held[row], labels)}
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
            (folder / f"labels{side}" / f"{sample.key}.png").write_bytes(encode_png(labels.lookup[mask]))
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
