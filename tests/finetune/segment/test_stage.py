"""The segmentation stage as a user runs it, on phantoms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import on_ranks
from segments import encoder_at, result, run

from miram.data.shards import Sample, ShardDataset
from miram.engine.errors import UserError
from miram.engine.run import Run
from miram.finetune.segment import fits, stage
from miram.finetune.segment.casefile import read_cases
from miram.finetune.segment.locked import read_segmenter

FOLDS: dict[str, Any] = {"data": {"split": "train"}, "folds": 2, "threshold": 0.3}
NARROW: dict[str, Any] = {"model": "unet", "model_options": {"channels": [8, 8, 16, 16, 16]}, "image_size": [64, 32]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_at(tmp_path_factory.mktemp("stage") / "encoder")


@pytest.fixture(scope="module")
def official(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A light decoder, judged on the official test; of the runs here, the one with pictures."""
    return run(phantoms, tmp_path_factory.mktemp("runs") / "official", encoder)


@pytest.fixture(scope="module")
def folds(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two folds of one split's patients, and a last model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "draw_figures", undrawn)
        return run(phantoms, tmp_path_factory.mktemp("runs") / "folds", encoder, **FOLDS)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no run that is made while a test runs: they take longer than all the rest, and nobody looks at them."""
    monkeypatch.setattr(stage, "draw_figures", undrawn)


def undrawn(*_: Any) -> dict[str, str]:
    """In place of pictures."""
    return {}


def said(folder: Path) -> dict[str, Any]:
    """The masks of a run by key."""
    return {path.stem: np.asarray(Image.open(path)) for path in sorted((folder / "masks").glob("*.png"))}


def thresholds(folder: Path) -> list[Any]:
    return [json.loads(path.read_text())["thresholds"] for path in sorted(folder.glob("fits/*/fit.json"))]


def test_the_test_is_judged_once_image_by_image(official: Run, phantoms: Path) -> None:
    shards = ShardDataset(phantoms)
    test = {row["key"]: i for i, row in enumerate(shards.rows) if shards.splits[i] == "test"}
    cases = read_cases(official.folder)
    assert [case.key for case in cases] == sorted(test)
    assert said(official.folder).keys() == test.keys()
    for case in cases:
        truth, mask = shards[test[case.key]].mask, said(official.folder)[case.key]
        assert truth is not None
        assert mask.shape == truth.shape == (case.height, case.width)
        (overlap,) = case.overlaps
        assert (overlap.truth, overlap.said) == ((truth > 0).sum(), (mask == 1).sum())
        assert overlap.both == ((truth > 0) & (mask == 1)).sum()
        assert len(case.lesions) == len(np.unique(truth)) - 1
    content = result(official)
    assert content["split"] == "official train and test"
    assert content["n_images"] == len(test)


def test_the_figure_that_leads_is_the_mean_dice_of_the_masks_that_are_there(official: Run, phantoms: Path) -> None:
    shards, masks = ShardDataset(phantoms), said(official.folder)
    dice = []
    for i, row in enumerate(shards.rows):
        truth = shards[i].mask
        if row["key"] in masks and truth is not None and truth.any():
            both = ((truth > 0) & (masks[row["key"]] > 0)).sum()
            dice.append(2 * both / ((truth > 0).sum() + (masks[row["key"]] > 0).sum()))
    assert result(official)["metric"] == "mean Dice"
    assert result(official)["value"] == pytest.approx(float(np.mean(dice)), abs=1e-9)


def test_the_kept_model_says_the_masks_of_the_run(official: Run, phantoms: Path) -> None:
    segmenter, shards = read_segmenter(official.folder), ShardDataset(phantoms)
    keys = {row["key"]: i for i, row in enumerate(shards.rows)}
    for key, mask in [*said(official.folder).items()][:4]:
        assert np.array_equal(segmenter.mask(segmenter.probabilities(shards[keys[key]])), mask)
    card = segmenter.card
    assert list(card.thresholds or ()) == thresholds(official.folder)[0]
    assert card.trained_on.patients == 6
    assert card.flips == ((-2,),)  # the chest wall is left in this data, so nothing is mirrored


def test_what_a_run_leaves_is_what_it_says(official: Run) -> None:
    content, folder = result(official), official.folder
    assert json.loads((folder / "state.json").read_text())["status"] == "finished"
    assert content["cost"]["trainable"] < content["cost"]["parameters"]
    assert content["rules"]["iou"] == 0.1
    (chosen,) = (note for note in content["notes"] if note.startswith("Threshold"))
    assert " 8 held-out images" in chosen  # of 2 of the 6 patients
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert all((folder / "figures" / name).is_file() for name in captions if name.endswith(".png"))
    assert not list(folder.rglob("checkpoints")), "checkpoints of finished trainings are left"


def test_a_finished_run_is_not_run_again(
    official: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fits.Fits, "fit", None)
    stage.segment(str(official.folder.with_suffix(".yaml")))
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_the_masks_of_judged_images_change_nothing_but_their_scores(
    official: Run, phantoms: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth of the test, turned upside down: the same model, threshold and masks; other figures."""
    read = ShardDataset.__getitem__

    def turned(self: ShardDataset, i: int) -> Sample:
        sample = read(self, i)
        if self.splits[i] == "test" and sample.mask is not None:
            return Sample(sample.key, sample.pixels, sample.max_value, sample.meta, sample.mask[::-1].copy())
        return sample

    monkeypatch.setattr(ShardDataset, "__getitem__", turned)
    other = run(phantoms, tmp_path / "turned", encoder)
    monkeypatch.undo()
    assert thresholds(other.folder) == thresholds(official.folder)
    for key, mask in said(official.folder).items():
        assert np.array_equal(mask, said(other.folder)[key])
    assert read_segmenter(other.folder).card.files == read_segmenter(official.folder).card.files
    assert result(other)["value"] != result(official)["value"]


def test_folds_judge_everybody_and_the_last_model_knows_everybody(folds: Run, phantoms: Path) -> None:
    shards = ShardDataset(phantoms, "train")
    cases = read_cases(folds.folder)
    assert sorted(case.key for case in cases) == sorted(row["key"] for row in shards.rows)
    by_fold = [{case.patient for case in cases if case.fold == fold} for fold in (0, 1)]
    assert by_fold[0]
    assert by_fold[1]
    assert not by_fold[0] & by_fold[1]
    assert thresholds(folds.folder) == [[0.3]] * 3
    segmenter = read_segmenter(folds.folder)
    assert segmenter.card.trained_on.patients == 6
    assert segmenter.card.trained_on.images == len(shards)


@pytest.mark.parametrize(("changes", "learn"), [({"encoder": None, **NARROW}, "all"), ({"method": "lora"}, "some")])
def test_other_models_run_and_come_back_from_disk(
    phantoms: Path, encoder: Path, tmp_path: Path, changes: dict[str, Any], learn: str
) -> None:
    found = run(phantoms, tmp_path / "run", **{"encoder": encoder, **changes}, train={"steps": 2}, smallest=3)
    cost, shards = result(found)["cost"], ShardDataset(phantoms)
    assert (cost["trainable"] == cost["parameters"]) == (learn == "all")
    key, mask = next(iter(said(found.folder).items()))
    row = next(i for i, row in enumerate(shards.rows) if row["key"] == key)
    segmenter = read_segmenter(found.folder)
    assert np.array_equal(segmenter.mask(segmenter.probabilities(shards[row])), mask)


def test_without_what_the_encoder_sees_the_encoder_makes_no_difference(
    phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(encoder.parent, other)
    from safetensors.torch import load_file, save_file

    weights = {name: tensor + 0.1 for name, tensor in load_file(encoder).items()}
    save_file(weights, other / "encoder.safetensors")
    changes: dict[str, Any] = {"control": "zeroed", "train": {"steps": 2}, "final": False}
    here = run(phantoms, tmp_path / "a", encoder, **changes)
    there = run(phantoms, tmp_path / "b", other / "encoder.safetensors", **changes)
    assert result(here)["value"] == result(there)["value"]
    assert {k: v.tolist() for k, v in said(here.folder).items()} == {
        k: v.tolist() for k, v in said(there.folder).items()
    }


class Stopped(Exception):
    """In place of a kill."""


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stops a run after so many judged images; [] never."""
    left: list[int] = []
    case = fits.Fits.case

    def counted(self: fits.Fits, *arguments: Any, **named: Any) -> Any:
        if left and (left.append(left.pop() - 1) or left[0] < 0):  # type: ignore[func-returns-value]
            raise Stopped
        return case(self, *arguments, **named)

    monkeypatch.setattr(fits.Fits, "case", counted)
    return left


def test_a_run_that_was_stopped_goes_on_to_the_same_masks(
    folds: Run, phantoms: Path, encoder: Path, tmp_path: Path, stops: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second fold, while images are judged: neither fold is trained again."""
    changes: dict[str, Any] = {**FOLDS, "final": False}
    stops.append(14)
    with pytest.raises(Stopped):
        run(phantoms, tmp_path / "stopped", encoder, **changes)
    stops.clear()
    first = (tmp_path / "stopped/fits/outer-0/metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    resumed = run(phantoms, tmp_path / "stopped", encoder, **changes)
    assert "going on from step 4 of 4" in capsys.readouterr().out
    assert (tmp_path / "stopped/fits/outer-0/metrics.jsonl").stat().st_mtime_ns == first
    for name in ("cases.csv", "lesions.csv", "candidates.csv"):
        assert (resumed.folder / name).read_bytes() == (folds.folder / name).read_bytes()
    assert {k: v.tolist() for k, v in said(resumed.folder).items()} == {
        k: v.tolist() for k, v in said(folds.folder).items()
    }


def test_two_ranks_say_what_one_does(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    alone = run(phantoms, tmp_path / "one", encoder, train={"steps": 2})
    ended = on_ranks(2, lambda: str(run(phantoms, tmp_path / "two", encoder, train={"steps": 2})))
    assert not [one for one in ended if isinstance(one, Exception)]
    one, two = said(alone.folder), said(tmp_path / "two")
    assert one.keys() == two.keys()
    assert np.mean([(one[key] != two[key]).mean() for key in one]) < 1e-3
    first, second = result(alone), json.loads((tmp_path / "two" / "result.json").read_text())
    assert second["n_images"] == first["n_images"]
    assert second["value"] == pytest.approx(first["value"], abs=0.01)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "lihgt"}, "light"),
        ({"model": "mdsa_unet", "model_options": {}}, r"segment\.encoder: mdsa_unet stands on no encoder"),
        ({"encoder": None}, r"segment\.encoder: light needs an encoder"),
        (
            {"model": "unet", "model_options": {}, "encoder": None, "control": "untrained"},
            r"segment\.control: unet stands on no encoder",
        ),
        ({"method": "loar"}, "lora"),
        ({"model_options": {"widht": 3}}, "width"),
        ({"mm_per_pixel": 0.1}, r"segment\.mm_per_pixel=0\.1: 48 of 48 images cannot be seen so"),
        ({"classes": {"none": [0], "lesion": [1]}}, "these number findings"),
        ({"folds": 30, "data": {"split": "train"}}, r"lower segment\.folds"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    phantoms: Path, encoder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    wanted = changes.pop("encoder", encoder)
    with pytest.raises(UserError, match=said):
        run(phantoms, tmp_path / "run", wanted, **changes)
    assert not (tmp_path / "run").exists()


def test_training_learns(phantoms: Path, tmp_path: Path) -> None:
    """After 25 steps it marks lesions of unseen patients three times as well as a mask of all tissue would, or more."""
    settings = {"steps": 25, "blr": 0.3}
    found = run(phantoms, tmp_path / "run", None, **NARROW, final=False, train=settings)
    shards, blind = ShardDataset(phantoms, "test"), []
    for one in (shards[i] for i in range(len(shards))):
        if one.mask is not None and one.mask.any():
            lesion, tissue = one.mask > 0, np.asarray(one.pixels) > 0
            blind.append(2 * (lesion & tissue).sum() / (lesion.sum() + tissue.sum()))
    assert result(found)["value"] > 3 * float(np.mean(blind))
    for line in (found.folder / "fits/outer-0/metrics.jsonl").read_text().splitlines():
        told = json.loads(line)
        assert told["loss"] == pytest.approx(told["loss/pixels"] + told["loss/dice"], rel=1e-5)
