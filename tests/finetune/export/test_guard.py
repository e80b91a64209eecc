"""The guard: the figure is of patients the model did not learn from, paired, and a loss beyond the margin stops it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lockables import lock, write_encoder
from segments import encoder_at, result, run
from sklearn.metrics import roc_auc_score
from torch import Tensor

from miram.data.shards import ShardDataset
from miram.engine.config import dump_yaml
from miram.engine.errors import RunFailed, UserError
from miram.engine.metrics import Estimate
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.classify.locked import read_locked
from miram.finetune.export.guard import Change, Guard, NotMeasured, refuse_worse
from miram.finetune.export.judges import Asking, section_of
from miram.finetune.export.source import Source, read_source
from miram.finetune.segment.config import SegmentSection


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("guard") / "encoder")


@pytest.fixture(scope="module")
def tuned(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt from split train, and whose configuration says so."""
    folder = tmp_path_factory.mktemp("guard") / "tuned"
    lock(folder, phantoms, encoder)
    tree = {
        "out": "here",
        "data": {"shards": str(phantoms), "task": "mass"},
        "finetune": {"encoder": str(encoder)},
        "train": {"steps": 1, "batch_size": 4},
    }
    (folder / "config.yaml").write_text(dump_yaml(FinetuneConfig.model_validate(tree)))
    return folder


def noisy(source: Source, amount: float) -> Any:
    def said(images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(images.sum() * 1e4) % 1000)
        with torch.inference_mode():
            wanted = source.module(images)
        return wanted + amount * torch.randn(wanted.shape, generator=generator)

    return said


def test_the_same_network_changes_nothing_whatever_the_bootstrap_draws(tuned: Path) -> None:
    source = read_source(tuned)
    change = Guard(source, tuned).change(lambda images: source.module(images) + 0)
    assert (change.difference.value, change.difference.interval) == (0, (0, 0))
    assert change.before == change.after
    refuse_worse(change, 0.0)


def test_figures_are_those_of_scikit_learn_on_the_own_test_of_the_run(tuned: Path, phantoms: Path) -> None:
    source = read_source(tuned)
    change = Guard(source, tuned).change(noisy(source, 3.0))
    shards = ShardDataset(phantoms, "test")
    truth = np.array(shards.labels("mass")).astype(int)
    logits = read_locked(tuned).logits(shards, np.arange(len(shards)))
    wanted = roc_auc_score(truth, logits[:, 1] - logits[:, 0])
    assert change.before.value == pytest.approx(wanted)
    assert (change.n_images, change.metric) == (len(shards), "AUC")
    assert change.n_patients == len(set(shards.rows.column("patient")))
    assert change.difference.value == pytest.approx(change.after.value - change.before.value)
    low, high = change.difference.interval
    assert low <= change.difference.value <= high
    assert "'test'" in change.split


def test_patients_that_the_model_learnt_from_are_refused_or_left_out(
    tuned: Path, phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    source = read_source(tuned)
    with pytest.raises(UserError, match="the model learnt from 6 patients of these"):
        Guard(source, tuned, str(phantoms)).change(source.module)
    named = Guard(source, tuned, [str(phantoms)], "test").change(source.module)
    assert named.before == Guard(source, tuned).change(source.module).before
    everybody = tmp_path / "everybody"
    lock(everybody, phantoms, encoder, split=None)
    (everybody / "config.yaml").write_text((tuned / "config.yaml").read_text())
    with pytest.raises(NotMeasured, match="the model learnt from all patients of its run's data; name others"):
        Guard(source, everybody).change(source.module)


def test_without_images_nothing_is_measured_and_the_reason_is_said(
    tuned: Path, phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    source = read_source(encoder)
    with pytest.raises(NotMeasured, match="name them with --data"):
        Guard(source, encoder).change(source.module)
    source = read_source(tuned)
    moved = tmp_path / "moved"
    lock(moved, phantoms, encoder)
    (moved / "config.yaml").write_text((tuned / "config.yaml").read_text().replace(str(phantoms), "elsewhere"))
    with pytest.raises(NotMeasured, match="name where it lies with --data"):
        Guard(source, moved).change(source.module)


@pytest.mark.parametrize("asked", [{"split": "tset"}, {"split": "train"}, {"task": "mass"}])
def test_who_names_a_part_of_the_images_is_told_where_it_cannot_be_measured(
    asked: dict[str, Any], tuned: Path, encoder: Path, tmp_path: Path
) -> None:
    source = read_source(tuned)
    cases = [(read_source(encoder), encoder, "name them with --data")]
    if "split" in asked:
        cases += [(source, tuned, "tset" if asked["split"] == "tset" else "learnt from all")]
    moved = Path(shutil.copytree(tuned, tmp_path / "moved"))
    (moved / "config.yaml").write_text((tuned / "config.yaml").read_text().replace("shards: ", "shards: /nowhere"))
    cases += [(source, moved, "/nowhere"), (source, moved / "model", "/nowhere")]
    shutil.copytree(tuned / "model", tmp_path / "alone" / "model")
    cases += [(source, tmp_path / "alone" / "model", "a model without its run")]
    for of, place, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            Guard(of, place, **asked).change(of.module)
        assert not isinstance(caught.value, NotMeasured)


def test_a_federation_is_judged_on_its_own_data_and_its_coordinator_on_none(tuned: Path, tmp_path: Path) -> None:
    source = read_source(tuned)
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    config, section = (tuned / "config.yaml").read_text(), "federate:\n  sites: 3\n"
    (run / "config.yaml").write_text(config + section)
    own = Guard(source, tuned, replicates=20).change(source.module)
    assert Guard(source, run, replicates=20).change(source.module) == own
    (run / "config.yaml").write_text("schema: miram.plan/1\n" + section)  # as a coordinator keeps its plan
    with pytest.raises(NotMeasured, match="does not say what the model is judged on"):
        Guard(source, run).change(source.module)
    (run / "config.yaml").write_text(config.replace("shards: ", "shards: /nowhere") + section)
    with pytest.raises(NotMeasured, match="/nowhere"):
        Guard(source, run).change(source.module)


def test_a_segmenter_without_its_run_is_judged_by_its_card_on_images_that_are_named(
    phantoms: Path, tmp_path: Path
) -> None:
    about = (("background", "mass"), "instances", (0.5,))
    assert read_section(tmp_path, sealed(*about), named=True).task == "lesions"
    assert read_section(tmp_path, sealed(("background", "fat"), "classes", None), named=True).task == "tissues"
    with pytest.raises(NotMeasured, match="a model without its run"):
        read_section(tmp_path, sealed(*about), named=False)


def sealed(classes: tuple[str, ...], kind: str, thresholds: tuple[float, ...] | None) -> Any:
    return SimpleNamespace(classes=classes, kind=kind, thresholds=thresholds, smallest=3)


def read_section(run: Path, card: Any, named: bool) -> SegmentSection:
    return section_of(run, card, Asking("named" if named else None, None, None))[0]


def test_an_encoder_is_judged_by_a_probe_of_its_features(phantoms: Path, encoder: Path) -> None:
    source = read_source(encoder)

    def blind(images: Tensor) -> Tensor:
        return torch.zeros(len(images), 32)

    asked = {"data": str(phantoms), "task": "mass", "split": None, "replicates": 50}
    change = Guard(source, encoder, **asked).change(blind)
    assert change.after.value == 0.5, "a blind probe tells nobody from anybody"
    assert change.before.value != 0.5
    again = Guard(source, encoder, **asked).change(lambda images: 2 * source.module(images))
    assert again.difference.value == pytest.approx(0, abs=1e-6), "the probe standardises what it is given"


def test_what_is_exported_is_judged_once_however_many_exports_there_are(tuned: Path) -> None:
    source, seen = read_source(tuned), []
    source.module.register_forward_hook(lambda *_: seen.append(1))
    guard = Guard(source, tuned)
    first = guard.change(lambda images: torch.zeros(len(images), 2))
    asked = len(seen)
    assert guard.change(lambda images: torch.ones(len(images), 2)) == first, "both say the same of everybody"
    assert len(seen) == asked > 0


CHANGE = Change("AUC", "mass", "test", *(Estimate(v, (v - 0.1, v + 0.1)) for v in (0.8, 0.75, -0.05)), 40, 10)


def test_a_loss_beyond_the_margin_stops_the_export_and_says_how_large_it_is() -> None:
    refuse_worse(CHANGE, 0.0501)
    with pytest.raises(
        RunFailed,
        match=r"model: AUC of mass fell by 0.0500 \[-0.0500, 0.1500\] on 40 images of 10 patients, more than "
        r"--margin 0.04; nothing was written",
    ):
        refuse_worse(CHANGE, 0.04, "model")
    refuse_worse(Change("AUC", "mass", "test", *(Estimate(v, (v, v)) for v in (0.8, 0.5, 0.5 - 0.8)), 40, 10), 0.3)
    better = Change("AUC", "mass", "test", CHANGE.after, CHANGE.before, Estimate(0.05, (0.0, 0.1)), 40, 10)
    refuse_worse(better, 0.0)


def test_a_margin_or_a_change_that_is_no_number_stops_the_export() -> None:
    nan = float("nan")
    with pytest.raises(RunFailed):
        refuse_worse(CHANGE, nan)
    with pytest.raises(RunFailed):
        refuse_worse(Change("AUC", "mass", "test", CHANGE.before, CHANGE.after, Estimate(nan, (nan, nan)), 40, 10), 0.1)


def test_a_change_is_told_with_its_intervals() -> None:
    assert CHANGE.sentence == (
        "AUC of mass (test; 40 images of 10 patients): 0.8000 [0.7000, 0.9000] before, 0.7500 [0.6500, 0.8500] after; "
        "change -0.0500 [-0.1500, +0.0500]."
    )
    assert CHANGE.facts["difference"] == {"value": -0.05, "interval": [pytest.approx(-0.15), pytest.approx(0.05)]}


@pytest.mark.slow
def test_a_segmenter_is_judged_by_the_dice_of_images_it_did_not_learn_from(phantoms: Path, tmp_path: Path) -> None:
    made = run(phantoms, tmp_path / "run", encoder_at(tmp_path / "encoder"), image_size=[64, 32])
    source = read_source(made.folder)
    own = Guard(source, made.folder, replicates=40).change(source.module)
    assert own.difference.value == 0
    said = result(made)
    assert own.before.value == pytest.approx(said["value"]), "as the run judged its own test"

    def nothing(images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), len(source.classes), *images.shape[2:])
        logits[:, 0] = 9
        return logits

    change = Guard(source, made.folder, replicates=40).change(nothing)
    assert (change.after.value, change.metric) == (0, "mean Dice")
    copied = Path(shutil.copytree(made.folder / "model", tmp_path / "copied"))
    named = Guard(source, copied, [str(phantoms)], "test", replicates=40).change(nothing)
    assert (named.before.value, named.after.value) == (pytest.approx(own.before.value), 0)
    with pytest.raises(NotMeasured):
        Guard(source, copied).change(nothing)
