"""The raw layout of nnU-Net v2, read back as its documentation says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from miram.data.archive import Archive, SourceOptions
from miram.data.derive import derive
from miram.data.divide import make_split
from miram.data.geometry import Size
from miram.data.ingest import ingest
from miram.data.nnunet import export
from miram.data.phantom import PhantomSettings
from miram.data.shards import ShardDataset
from miram.data.sources.folder import read
from miram.data.sources.phantom import make_phantoms
from miram.data.splits import patient_of
from miram.engine.errors import UserError

Case = tuple[NDArray[Any], NDArray[Any]]


@pytest.fixture(scope="module")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 films of 12 patients, in train and test: `phantoms` are too few patients for folds here."""
    out = tmp_path_factory.mktemp("nnunet") / "phantoms"
    make_phantoms(out, 12, PhantomSettings(size=96, seed=7), workers=1)
    return out


def cases(folder: Path, side: str, ending: str) -> dict[str, Case]:
    """Image and labels by case, found as nnU-Net finds them: CASE_XXXX.png and CASE.png."""
    found: dict[str, Case] = {}
    for path in sorted((folder / f"images{side}").glob(f"*{ending}")):
        match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name)
        assert match, path.name
        assert match[2] == "0000"
        with Image.open(path) as image, Image.open(folder / f"labels{side}" / f"{match[1]}{ending}") as labels:
            found[match[1]] = np.asarray(image), np.asarray(labels)
    assert len(found) == len(list((folder / f"labels{side}").iterdir()))
    return found


def checked(folder: Path) -> tuple[dict[str, Any], dict[str, Case]]:
    """dataset.json and the training cases, after the checks of nnU-Net's own verify_dataset_integrity."""
    said = json.loads((folder / "dataset.json").read_text())
    assert {"labels", "channel_names", "numTraining", "file_ending"} <= said.keys()
    assert list(said["labels"].values()) == list(range(len(said["labels"])))
    assert said["labels"]["background"] == 0
    assert said["overwrite_image_reader_writer"] == "NaturalImage2DIO"
    found = cases(folder, "Tr", said["file_ending"])
    assert len(found) == said["numTraining"]
    for image, labels in found.values():
        channels = 1 if image.ndim == 2 else image.shape[2]
        assert channels == len(said["channel_names"])
        assert image.shape[:2] == labels.shape
        assert set(np.unique(labels)) <= set(said["labels"].values())
    return said, found


def write_films(folder: Path, masks: dict[str, NDArray[np.uint8] | None], colour: bool = False) -> Path:
    """PNG films FILE.png of noise, with masks MASKS/FILE.png, and a table of whose they are: p0 has p0a, p0b, …"""
    rng = np.random.default_rng(0)
    (folder / "masks").mkdir(parents=True)
    for name, mask in masks.items():
        shape = (40, 32, 3) if colour else (40, 32)
        Image.fromarray(rng.integers(1, 255, shape).astype(np.uint8)).save(folder / f"{name}.png")
        if mask is not None:
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    lines = ["file,patient", *(f"{name}.png,{name[:-1]}" for name in masks)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def shards_of(folder: Path, kind: str, channels: int = 1) -> Path:
    options = SourceOptions(
        labels=folder / "table.csv", masks=folder / "masks", mask_kind=kind, channels=channels  # type: ignore[arg-type]
    )  # fmt: skip
    archive: Archive = read(folder, options)
    out = folder.with_name(f"{folder.name}-shards")
    ingest(Archive(**{**vars(archive), "breast": False, "quarantine": False}), out, b"secret", workers=1)
    return out


def patches(*values: int) -> NDArray[np.uint8]:
    """A mask with a patch of each value in a row."""
    mask = np.zeros((40, 32), np.uint8)
    for i, value in enumerate(values):
        mask[4:20, 2 + 6 * i : 8 + 6 * i] = value
    return mask


def test_images_and_masks_of_findings_are_there_as_stored(dozen: Path, tmp_path: Path) -> None:
    done = export([str(dozen)], tmp_path / "raw", number=7, name="Phantoms")
    assert done.folder == tmp_path / "raw" / "Dataset007_Phantoms"
    said, train = checked(done.folder)
    assert said["labels"] == {"background": 0, "lesion": 1}
    shards = ShardDataset(dozen)
    test = cases(done.folder, "Ts", ".png")
    assert len(train) == done.training == shards.splits.count("train")
    assert len(test) == done.test == shards.splits.count("test")
    for i, row in enumerate(shards.rows):
        image, labels = (train if shards.splits[i] == "train" else test)[row["key"]]
        sample = shards[i]
        assert image.dtype == sample.pixels.dtype == np.uint16
        assert np.array_equal(image, np.asarray(sample.pixels))
        assert np.array_equal(labels, np.zeros_like(labels) if sample.mask is None else sample.mask > 0)


@pytest.mark.parametrize("seed", range(4))
def test_no_patient_is_on_two_sides_of_a_fold_and_findings_are_dealt_evenly(
    dozen: Path, tmp_path: Path, seed: int
) -> None:
    done = export([str(dozen)], tmp_path, folds=3, seed=seed)
    _, train = checked(done.folder)
    splits = json.loads((done.folder / "splits_final.json").read_text())
    patient = {row["key"]: patient_of(row) for row in ShardDataset(dozen).rows}
    assert len(splits) == 3
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == sorted(train)
        assert not {patient[key] for key in fold["train"]} & {patient[key] for key in fold["val"]}
    for one, other in combinations(splits, 2):
        assert not set(one["val"]) & set(other["val"])
    ill = {patient[key] for key, (_, labels) in train.items() if labels.any()}
    held = [{patient[key] for key in fold["val"]} for fold in splits]
    for wanted in (ill, {patient[key] for key in train} - ill):
        assert len(wanted) > 1
        numbers = [len(part & wanted) for part in held]
        assert max(numbers) - min(numbers) <= 1, numbers


def test_another_seed_deals_other_folds_and_the_same_one_the_same(dozen: Path, tmp_path: Path) -> None:
    done = [export([str(dozen)], tmp_path / str(i), folds=3, seed=seed) for i, seed in enumerate((0, 0, 5))]
    one, again, other = ((found.folder / "splits_final.json").read_text() for found in done)
    assert one == again != other


def test_a_split_file_says_who_is_tested_and_in_which_fold(dozen: Path, tmp_path: Path) -> None:
    shards = ShardDataset(dozen)
    split = make_split(shards.rows, seed=3, test=0.25, folds=2)
    split.write(tmp_path / "split.json", shards.population)
    done = export([str(dozen)], tmp_path / "raw", split_file=tmp_path / "split.json", folds=5)
    splits = json.loads((done.folder / "splits_final.json").read_text())
    patient = {row["key"]: patient_of(row) for row in shards.rows}
    assert [{patient[key] for key in fold["val"]} for fold in splits] == [set(fold) for fold in split.folds]
    assert {patient[key] for key in cases(done.folder, "Ts", ".png")} == set(split.splits["test"])


def test_classes_are_numbered_without_a_gap_and_what_is_ignored_comes_last(tmp_path: Path) -> None:
    masks = {f"p{i}a": patches(64, 128, 192, 255) for i in range(4)}
    masks |= {"p4a": None, "p5a": patches(64) * 0 + 64}
    shards = shards_of(write_films(tmp_path / "films", masks), "classes")
    named = {"rest": (0,), "fat": (128,), "gland": (192, 255), "ignored": (64,)}
    done = export([str(shards)], tmp_path / "raw", classes=named, folds=2)
    said, train = checked(done.folder)
    assert said["labels"] == {"background": 0, "fat": 1, "gland": 2, "ignore": 3}
    assert len(train) == 4
    assert done.left_out == 2  # nobody drew where classes lie, or all that was drawn is ignored
    wanted = np.zeros((40, 32), np.uint8)
    for value, number in ((64, 3), (128, 1), (192, 2), (255, 2)):
        wanted[patches(64, 128, 192, 255) == value] = number
    assert all(np.array_equal(labels, wanted) for _, labels in train.values())


def test_without_names_every_value_is_a_class(tmp_path: Path) -> None:
    masks = {f"p{i}a": patches(3 if i else 9, 200) for i in range(3)}
    shards = shards_of(write_films(tmp_path / "films", masks), "classes")
    said, train = checked(export([str(shards)], tmp_path / "raw", folds=2).folder)
    assert said["labels"] == {"background": 0, "3": 1, "9": 2, "200": 3}
    assert sorted(tuple(np.unique(labels)) for _, labels in train.values()) == [(0, 1, 3), (0, 1, 3), (0, 2, 3)]


def test_an_image_without_a_mask_has_no_finding(tmp_path: Path) -> None:
    masks = {"p0a": patches(1), "p0b": None, "p1a": patches(1, 2), "p2a": None}
    shards = shards_of(write_films(tmp_path / "films", masks), "instances")
    _, train = checked(export([str(shards)], tmp_path / "raw", folds=2).folder)
    assert sorted(labels.max() for _, labels in train.values()) == [0, 0, 1, 1]


def test_colour_is_one_file_of_three_channels(tmp_path: Path) -> None:
    masks: dict[str, Any] = {f"p{i}a": patches(1) for i in range(2)}
    shards = shards_of(write_films(tmp_path / "films", masks, colour=True), "instances", channels=3)
    said, train = checked(export([str(shards)], tmp_path / "raw", folds=2).folder)
    assert said["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert all(image.shape == (40, 32, 3) for image, _ in train.values())


def test_packed_data_sets_give_the_same(dozen: Path, tmp_path: Path) -> None:
    derive(str(dozen), tmp_path / "packed", Size(), packed=True, workers=1)
    one = checked(export([str(dozen)], tmp_path / "a").folder)
    other = checked(export([str(tmp_path / "packed")], tmp_path / "b").folder)
    assert one[0] == other[0]
    for key, (image, labels) in one[1].items():
        assert np.array_equal(image, other[1][key][0])
        assert np.array_equal(labels, other[1][key][1])


def test_what_does_not_fit_is_refused_and_leaves_nothing(dozen: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for how, said in (
        ({"number": 1000}, "from 1 to 999"),
        ({"name": "a b"}, "letters"),
        ({"folds": 40}, "lower --folds"),
        ({"classes": {"background": (0,), "mass": (1,)}}, "number findings"),
    ):
        with pytest.raises(UserError, match=said):
            export([str(dozen)], raw, **how)  # type: ignore[arg-type]
    assert not raw.exists() or not list(raw.iterdir())
    shards = shards_of(write_films(tmp_path / "films", {"p0a": patches(3, 4), "p1a": patches(3)}), "classes")
    for named, said in (
        ({"background": (0,), "fat": (3,)}, r"--classes: masks hold 4 \(in 1 image\), which no class takes"),
        ({"background": (0,), "ignore": (3, 4)}, "keeps ignore"),
        ({"none": (0,), "background": (3, 4)}, "calls the first class background"),
        ({"background": (3, 4), "fat": (9,)}, "no mask of a training image"),
    ):
        with pytest.raises(UserError, match=said):
            export([str(shards)], raw, classes=named, folds=2)
    export([str(dozen)], raw, number=3)
    with pytest.raises(UserError, match="Dataset003_Lesions is there already"):
        export([str(dozen)], raw, number=3, name="Other")
    assert [path.name for path in raw.iterdir()] == ["Dataset003_Lesions"]


def test_the_command_says_where_the_folds_belong(
    dozen: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = say("data", "nnunet", dozen, tmp_path, "--id", 12, "--name", "Ph", "--folds", 2)
    assert code == 0
    assert f"{tmp_path}/Dataset012_Ph holds 24 images to train on, 24 of test patients" in out
    assert "nnUNet_preprocessed/Dataset012_Ph/" in out
    code, _, error = say("data", "nnunet", dozen, tmp_path, "--id", 13, "--classes", "a=1,b=1")
    assert code == 2
    assert "each value is in one only" in error
