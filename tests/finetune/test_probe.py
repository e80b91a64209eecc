"""The probe against answers known beforehand, and against leaks it must not fall for."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from miram.data.shards import ShardDataset
from miram.data.views import windows
from miram.engine.errors import UserError
from miram.engine.metrics import score
from miram.finetune.features import cached_features, digest, extract
from miram.finetune.linear import Judgement, Task, judge, outer_folds, read_task
from miram.finetune.probe import probe
from miram.pretrain.encoder import EncoderCard, build_encoder, card_for, normalisation, save_encoder

GRID = (0.01, 1.0)


def task(truth: NDArray[np.int64], patients: NDArray[np.int64], splits: str = "") -> Task:
    names = patients.astype(str)
    everything = np.arange(len(truth))
    return Task("made up", ("no", "yes"), everything, truth, names, np.full(len(truth), splits))


def judged(features: NDArray[np.float64], made_up: Task, folds: int = 4) -> Judgement:
    splits, _ = outer_folds(made_up, folds, seed=0)
    return judge(features.astype(np.float32), made_up, splits, GRID, inner=2, seed=0)


def auc(made_up: Task, judgement: Judgement) -> float:
    return score("AUC", made_up.truth[judgement.images], judgement.probabilities)


def test_features_that_hold_the_answer_give_the_answer() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 4)
    truth = (np.arange(160) // 2) % 2
    features = rng.normal(size=(160, 5)) + 4 * truth[:, None]
    assert auc(task(truth, patients), judged(features, task(truth, patients))) > 0.99


def test_features_that_only_know_the_patient_are_worth_nothing() -> None:
    """Every patient has one class and a fingerprint: a probe that saw a patient's other images would be perfect."""
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(60), 4)
    truth = rng.permutation(np.arange(60) % 2)[patients]
    fingerprint = rng.normal(size=(60, 120))[patients]
    made_up = task(truth, patients)
    assert abs(auc(made_up, judged(fingerprint, made_up)) - 0.5) < 0.15
    leaking = task(truth, np.arange(240))
    assert auc(leaking, judged(fingerprint, leaking)) > 0.95


def test_every_image_is_judged_once_and_never_by_a_probe_that_saw_its_patient() -> None:
    rng = np.random.default_rng(2)
    patients = rng.integers(0, 30, 200)
    made_up = task(rng.integers(0, 2, 200), patients)
    splits, name = outer_folds(made_up, 5, seed=3)
    assert name == "5 folds by patient"
    assert sorted(np.concatenate([rest for _, rest in splits])) == list(range(200))
    for fit, rest in splits:
        assert not set(patients[fit]) & set(patients[rest])


def test_an_official_split_is_used_and_its_test_patients_judged_once() -> None:
    truth, patients = np.arange(40) % 2, np.arange(40)
    splits = np.array(["train"] * 30 + ["test"] * 10)
    made_up = Task("made up", ("no", "yes"), np.arange(40), truth, patients.astype(str), splits)
    ((fit, rest),), name = outer_folds(made_up, 5, seed=0)
    assert name == "official train and test"
    assert (list(fit), list(rest)) == (list(range(30)), list(range(30, 40)))


def test_fewer_patients_than_folds_are_refused_by_the_class_that_lacks_them() -> None:
    truth, patients = np.array([0] * 20 + [1] * 20), np.array([*range(20), *([20, 21] * 10)])
    with pytest.raises(UserError, match=r"'yes' has 2 patients, fewer than 5"):
        outer_folds(task(truth, patients), 5, seed=0)


def test_task_names_what_there_is(phantoms: Path) -> None:
    shards = ShardDataset(phantoms)
    density = read_task(shards, "density")
    assert density.classes == ("a", "b", "c", "d")
    assert density.metric == "balanced accuracy"
    assert read_task(shards, "mass").metric == "AUC"
    with pytest.raises(UserError, match="calc, density, mass"):
        read_task(shards, "densty")
    with pytest.raises(UserError, match=r"data\.task is not set"):
        read_task(shards, None)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    card = card_for("vit_tiny_patch16_224", (32, 32), {"depth": 1, "embed_dim": 32, "num_heads": 2})
    card = EncoderCard(architecture=card.architecture, kwargs=card.kwargs, mean=(0.3,), std=(0.2,))
    torch.manual_seed(0)
    save_encoder(folder, build_encoder(card), card)
    return folder


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_feature_is_the_mean_over_windows_of_the_pooled_tokens(phantoms: Path, encoder: Path, pool: str) -> None:
    from miram import load_encoder

    vit, shards = load_encoder(encoder), ShardDataset(phantoms)
    found = extract(vit, shards, pool, batch_size=7, name="test")
    for i in (0, 5, 47):
        tokens = vit.forward_features(windows(shards[i], (32, 32), normalisation(vit)))
        pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
        np.testing.assert_allclose(found[i], pooled.mean(0).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_cached_features_are_those_of_this_encoder_and_no_other(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    from miram import load_encoder

    vit, shards = load_encoder(encoder), ShardDataset(phantoms)
    first = cached_features(vit, shards, "mean", 16, tmp_path, "test")
    assert np.array_equal(cached_features(vit, shards, "mean", 16, tmp_path, "test"), first)
    before = digest(vit, shards, "mean")
    assert digest(vit, shards, "cls") != before
    assert digest(vit, ShardDataset(phantoms, "train"), "mean") != before
    with torch.no_grad():
        vit.norm.bias += 1e-3
    assert digest(vit, shards, "mean") != before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def probed(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "run"
    settings = [f"--data.shards={phantoms}", f"--probe.encoder={encoder}", "--data.task=mass", "--data.split=null"]
    rest = ["--probe.controls=2", "--probe.folds=2", "--probe.inner_folds=2", "--probe.replicates=50"]
    probe("probe/demo", [*settings, *rest, "--data.split=test", f"--out={out}"])
    return out


def test_the_result_says_what_was_measured_on_whom(probed: Path) -> None:
    result = json.loads((probed / "result.json").read_text())
    assert (result["metric"], result["task"], result["n_images"], result["n_patients"]) == ("AUC", "mass", 24, 6)
    assert "test" in result["split"]
    assert sum(result["classes"].values()) == 24
    names = [row["name"] for row in result["rows"]]
    assert names == ["pretrained encoder", "random 1 weights", "random 2 weights", "mean of 2 random", "majority class"]
    assert result["rows"][-1]["value"] == 0.5
    mean = np.mean([row["value"] for row in result["rows"][1:3]])
    assert result["rows"][3]["value"] == pytest.approx(mean)
    assert result["differences"][0]["value"] == pytest.approx(result["value"] - mean)
    for row in result["rows"][:-1]:
        assert row["interval"][0] <= row["value"] <= row["interval"][1]


def test_predictions_are_all_there_and_give_the_figure(probed: Path) -> None:
    with (probed / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    truth = np.array([int(row["truth"]) for row in rows])
    probabilities = np.array([[float(row["p_0"]), float(row["p_1"])] for row in rows])
    result = json.loads((probed / "result.json").read_text())
    assert score("AUC", truth, probabilities) == pytest.approx(result["value"], abs=1e-3)
    assert len({row["key"] for row in rows}) == 24
    assert (probed / "figures" / "probe.png").stat().st_size > 5000


def test_a_finished_probe_is_left_alone(probed: Path, phantoms: Path, encoder: Path) -> None:
    before = (probed / "result.json").stat().st_mtime_ns
    settings = [f"--data.shards={phantoms}", f"--probe.encoder={encoder}", "--data.task=mass", "--data.split=test"]
    rest = ["--probe.controls=2", "--probe.folds=2", "--probe.inner_folds=2", "--probe.replicates=50"]
    probe("probe/demo", [*settings, *rest, f"--out={probed}"])
    assert (probed / "result.json").stat().st_mtime_ns == before


def test_an_encoder_that_is_not_there_is_named(phantoms: Path, tmp_path: Path) -> None:
    settings = [f"--data.shards={phantoms}", "--data.task=mass", "--probe.folds=2", "--probe.encoder=nowhere"]
    with pytest.raises(UserError, match="nowhere"):
        probe("probe/demo", [*settings, f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_an_official_split_that_shares_patients_is_refused() -> None:
    truth, patients = np.arange(40) % 2, np.arange(40) // 2
    splits = np.array(["train", "test"] * 20)
    made_up = Task("made up", ("no", "yes"), np.arange(40), truth, patients.astype(str), splits)
    with pytest.raises(UserError, match="20 patients are in both train and test"):
        outer_folds(made_up, 5, seed=0)


def test_an_official_split_that_lacks_a_class_is_refused() -> None:
    truth, patients = np.array([0, 1] * 10 + [1] * 10), np.arange(30)
    splits = np.array(["train"] * 20 + ["test"] * 10)
    made_up = Task("made up", ("no", "yes"), np.arange(30), truth, patients.astype(str), splits)
    with pytest.raises(UserError, match="no image of class no is in split 'test'"):
        outer_folds(made_up, 5, seed=0)


def test_the_notes_count_the_images_that_pretraining_saw(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    from miram.data.index import read_manifest

    manifest = read_manifest(phantoms)
    card = card_for("vit_tiny_patch16_224", (32, 32), {"depth": 1, "embed_dim": 32, "num_heads": 2})
    seen = {"data": [{k: manifest[k] for k in ("dataset", "records")}], "split": "train"}
    save_encoder(tmp_path, build_encoder(card), replace(card, provenance=seen))
    rest = ["--probe.controls=0", "--probe.folds=2", "--probe.inner_folds=2", "--probe.replicates=10"]
    for split, said in (("train", "saw 24 of the 24"), ("test", "saw none of")):
        settings = [
            f"--data.shards={phantoms}",
            f"--probe.encoder={tmp_path}",
            "--data.task=mass",
            f"--data.split={split}",
        ]
        run = probe("probe/demo", [*settings, *rest, f"--out={tmp_path / split}"])
        assert said in json.loads((run.folder / "result.json").read_text())["notes"][0]


def test_a_probe_of_an_encoder_that_was_trained_again_is_not_called_finished(
    phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    rest = ["--probe.controls=0", "--probe.folds=2", "--probe.inner_folds=2", "--probe.replicates=10"]
    settings = [f"--data.shards={phantoms}", f"--probe.encoder={tmp_path}", "--data.task=mass", *rest]
    for seed, fails in ((0, False), (1, True)):
        torch.manual_seed(seed)
        card = card_for("vit_tiny_patch16_224", (32, 32), {"depth": 1, "embed_dim": 32, "num_heads": 2})
        save_encoder(tmp_path, build_encoder(card), card)
        if fails:
            with pytest.raises(UserError, match="the encoder changed"):
                probe("probe/demo", [*settings, f"--out={tmp_path / 'run'}"])
        else:
            probe("probe/demo", [*settings, f"--out={tmp_path / 'run'}"])
