"""The probe against answers known beforehand, and against leaks it must not fall for."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from made_up import section, task

from miram.data.shards import ShardDataset
from miram.engine.config import load
from miram.engine.errors import UserError
from miram.engine.metrics import score
from miram.finetune.config import ProbeConfig
from miram.finetune.probe import probe, tally
from miram.finetune.probes import PROBES, sweep
from miram.finetune.task import Judgement, Task, choose, fold_scores, grouped_folds, outer_folds, read_task
from miram.finetune.trial import Trial, short, suited
from miram.pretrain.encoder import EncoderCard, build_encoder, card_for, save_encoder


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "STEPS", 30)


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
    with pytest.raises(UserError, match=r"'class 1' has 2 patients, fewer than 5"):
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


def within_folds(truth: np.ndarray, p: np.ndarray, fold: np.ndarray) -> float:
    """Share of ordered pairs of images of one fold, counted one by one."""
    pairs = [(i, j) for i, j in product(np.flatnonzero(truth), np.flatnonzero(truth == 0)) if fold[i] == fold[j]]
    return float(np.mean([(p[i] > p[j]) + 0.5 * (p[i] == p[j]) for i, j in pairs]))


@dataclass
class OneProbe:
    """Stands in for a probe and says what it is told to."""

    judgement: Judgement

    def __call__(self, *_: object) -> Judgement:
        return self.judgement


def test_probes_of_folds_on_different_scales_are_not_compared(
    phantoms: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figure, bootstrap samples and differences: each fold is ranked perfectly, all folds together are not."""
    settings = ["--data.task=mass", "--data.split=test", "--probe.folds=2", "--probe.inner_folds=2"]
    rest = ["--probe.controls=1", "--probe.replicates=50", f"--data.shards={phantoms}", f"--probe.encoder={encoder}"]
    trial = Trial.of(load(ProbeConfig, "probe/demo", [*settings, *rest, f"--out={tmp_path / 'run'}"]))
    images = np.concatenate([held for _, held in trial.splits])
    fold = np.repeat([0, 1], [len(held) for _, held in trial.splits])
    p = (1 + trial.task.truth[images] + 2 * fold) / 5
    judgement = Judgement(images, np.stack([1 - p, p], 1), fold, ("", ""))
    assert score("AUC", trial.task.truth[images], judgement.probabilities) < 0.9
    monkeypatch.setitem(PROBES, "linear", OneProbe(judgement))
    run = probe("probe/demo", [*settings, *rest, "--probe.methods=[linear]", f"--out={tmp_path / 'run'}"])
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["value"], result["interval"]) == (1, [1, 1])
    assert result["differences"][0]["interval"] == [0, 0]
    assert any("within folds only" in note and "A ROC curve pools the folds" in note for note in result["notes"])


def test_predictions_are_all_there_and_give_the_figure(probed: Path) -> None:
    with (probed / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    truth = np.array([int(row["truth"]) for row in rows])
    probabilities = np.array([[float(row["p_0"]), float(row["p_1"])] for row in rows])
    result = json.loads((probed / "result.json").read_text())
    fold = np.array([int(row["fold"]) for row in rows])
    assert score("AUC", truth, probabilities, groups=fold) == pytest.approx(result["value"], abs=1e-3)
    assert within_folds(truth, probabilities[:, 1], fold) == pytest.approx(result["value"], abs=1e-3)
    assert len({row["key"] for row in rows}) == 24
    assert (probed / "figures" / "probe.png").stat().st_size > 5000


def test_a_finished_probe_is_left_alone(probed: Path, phantoms: Path, encoder: Path) -> None:
    before = (probed / "result.json").stat().st_mtime_ns
    settings = [f"--data.shards={phantoms}", f"--probe.encoder={encoder}", "--data.task=mass", "--data.split=test"]
    rest = ["--probe.controls=2", "--probe.folds=2", "--probe.inner_folds=2", "--probe.replicates=50"]
    probe("probe/demo", [*settings, *rest, f"--out={probed}"])
    assert (probed / "result.json").stat().st_mtime_ns == before


def test_an_encoder_that_is_not_there_is_named(phantoms: Path, tmp_path: Path) -> None:
    settings = [
        f"--data.shards={phantoms}",
        "--data.task=mass",
        "--probe.folds=2",
        "--probe.inner_folds=2",
        "--probe.encoder=nowhere",
    ]
    with pytest.raises(UserError, match="nowhere"):
        probe("probe/demo", [*settings, f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_what_an_encoder_has_not_is_found_before_a_run_is_begun(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    settings = [f"--data.shards={phantoms}", "--data.task=mass", "--probe.folds=2", "--probe.inner_folds=2"]
    settings += [f"--probe.encoder={encoder}", "--probe.methods=[sweep]", "--probe.layers=[-2]"]
    with pytest.raises(UserError, match=rf"encoder {encoder}: layer -2 is not there"):
        probe("probe/demo", [*settings, f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_class_that_no_fold_can_be_fitted_on_is_refused() -> None:
    """Three classes of at least two patients each, which scikit-learn still cannot share out over two folds."""
    patients = np.repeat(np.arange(5), [4, 3, 4, 2, 1])
    truth = np.array([1, 0, 0, 1, 1, 2, 1, 0, 0, 0, 0, 2, 2, 1])
    three = replace(task(truth, patients), classes=("a", "b", "c"))
    with pytest.raises(UserError, match="a class is missing from what a fold is fitted on"):
        list(grouped_folds(truth, patients, 2, 0, three))


def test_a_fold_of_a_single_class_has_no_auc_of_its_own() -> None:
    made_up = task(np.array([0, 0, 0, 1]), np.arange(4))
    p = np.array([0.1, 0.2, 0.3, 0.9])
    judgement = Judgement(np.arange(4), np.stack([1 - p, p], 1), np.array([0, 0, 1, 1]), ("", ""))
    assert fold_scores(made_up, judgement) == [1.0]


def test_an_encoder_that_does_not_say_what_it_saw_is_not_said_to_have_seen_nothing(full: Path) -> None:
    notes = json.loads((full / "result.json").read_text())["notes"]
    assert sum("is not known: the encoder does not say" in note for note in notes) == 3
    assert not any("saw none" in note for note in notes)


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


# ---------------------------------------------------------------------------------------------- many at once


@pytest.fixture(scope="module")
def full(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four methods, an encoder beside that is a copy of the first, another without a class token, one control."""
    folder = tmp_path_factory.mktemp("full")
    for path in encoder.iterdir():
        (folder / "copy").mkdir(exist_ok=True)
        (folder / "copy" / path.name).write_bytes(path.read_bytes())
    options = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    }
    card = card_for("vit_tiny_patch16_224", (32, 32), options)
    torch.manual_seed(3)
    (folder / "no_token").mkdir()
    save_encoder(folder / "no_token", build_encoder(card), card)
    settings = [f"--data.shards={phantoms}", "--data.task=mass", f"--out={folder / 'run'}"]
    settings += [f"--probe.encoder={encoder}", f"--probe.beside=[{folder / 'copy'}, {folder / 'no_token'}]"]
    settings += ["--probe.methods=[linear, sweep, knn, attentive]", "--probe.layers=[-1]", "--probe.pools=[mean, cls]"]
    settings += ["--probe.crops=2", "--probe.controls=1", "--probe.folds=2", "--probe.inner_folds=2"]
    probe("probe/full", [*settings, "--probe.replicates=50", "--probe.lrs=[0.001, 0.1]"])
    return folder / "run"


def test_every_method_of_every_encoder_is_a_row_and_stands_against_the_first(full: Path) -> None:
    result = json.loads((full / "result.json").read_text())
    encoders = ["pretrained encoder", "copy", "no_token", "random 1 weights"]
    methods = ["linear", "sweep", "knn", "attentive"]
    assert [row["name"] for row in result["rows"]] == [f"{m}: {e}" for m in methods for e in encoders] + [
        "majority class"
    ]
    against = ["copy", "no_token", "random 1"]
    assert [row["name"] for row in result["differences"]] == [
        f"{m}: pretrained - {e}" for m in methods for e in against
    ]
    assert (result["value"], result["interval"]) == (result["rows"][0]["value"], result["rows"][0]["interval"])
    values = {row["name"]: row["value"] for row in result["rows"]}
    for row in result["differences"]:
        method, _, other = row["name"].partition(": pretrained - ")
        other = "random 1 weights" if other == "random 1" else other
        expected = values[f"{method}: pretrained encoder"] - values[f"{method}: {other}"]
        assert row["value"] == pytest.approx(expected)


def test_the_same_encoder_beside_itself_differs_by_exactly_nothing(full: Path) -> None:
    """Also in every bootstrap sample: two encoders are compared on the same patients."""
    result = json.loads((full / "result.json").read_text())
    of_copy = [row for row in result["differences"] if row["name"].endswith("- copy")]
    assert len(of_copy) == 4
    assert all(row["value"] == 0 and row["interval"] == [0, 0] for row in of_copy)
    others = [row["interval"] for row in result["differences"] if row["name"].endswith("- no_token")]
    assert any(low < high for low, high in others)


def test_a_share_is_of_the_first_encoders_figure_in_every_bootstrap_sample(full: Path) -> None:
    result = json.loads((full / "result.json").read_text())
    values = {row["name"]: row["value"] for row in result["rows"]}
    assert [table["title"] for table in result["tables"]] == [
        f"{method}: share of the first encoder's figure" for method in ("linear", "sweep", "knn", "attentive")
    ]
    for table in result["tables"]:
        method = table["title"].partition(":")[0]
        first, copy, other, untrained = table["rows"]
        assert untrained[:2] == ["mean of 1 random", first[1]]
        assert untrained[3]["value"] == pytest.approx(values[f"{method}: random 1 weights"] / first[2]["value"])
        assert [row[0] for row in (first, copy, other)] == ["pretrained", "copy", "no_token"]
        assert copy[3] == copy[4] == {"value": 1, "interval": [1, 1]}
        assert first[1] == copy[1] != other[1]
        one, beside = values[f"{method}: pretrained encoder"], values[f"{method}: no_token"]
        assert other[3]["value"] == pytest.approx(beside / one)
        assert other[4]["value"] == pytest.approx((beside - 0.5) / (one - 0.5))


def test_predictions_of_every_method_give_its_figure(full: Path) -> None:
    result = json.loads((full / "result.json").read_text())
    values = {row["name"]: row["value"] for row in result["rows"]}
    files = {"linear": "predictions.csv"} | {m: f"predictions_{m}.csv" for m in ("sweep", "knn", "attentive")}
    for method, name in files.items():
        with (full / name).open() as file:
            rows = list(csv.DictReader(file))
        truth = np.array([int(row["truth"]) for row in rows])
        probabilities = np.array([[float(row["p_0"]), float(row["p_1"])] for row in rows])
        found = within_folds(truth, probabilities[:, 1], np.array([int(row["fold"]) for row in rows]))
        assert found == pytest.approx(values[f"{method}: pretrained encoder"], abs=0.02), method


def test_the_result_names_each_encoder_and_what_became_of_its_keys(full: Path, encoder: Path) -> None:
    result = json.loads((full / "result.json").read_text())
    assert [e["name"] for e in result["encoders"]] == ["pretrained", "copy", "no_token"]
    assert result["encoders"][0]["encoder"] == str(encoder)
    assert all("none missing" in e["keys"][-1] for e in result["encoders"])
    assert any("That of" not in note and "kept" not in note for note in result["notes"])
    assert sum("length of training of attentive" in note for note in result["notes"]) == 1


def test_an_encoder_beside_that_changed_is_not_called_finished(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    rest = ["--probe.controls=0", "--probe.folds=2", "--probe.inner_folds=2", "--probe.replicates=10"]
    settings = [f"--data.shards={phantoms}", f"--probe.encoder={encoder}", "--data.task=mass", *rest]
    settings += [f"--probe.beside=[{tmp_path / 'other'}]", f"--out={tmp_path / 'run'}"]
    (tmp_path / "other").mkdir()
    for seed in (0, 1):
        torch.manual_seed(seed)
        card = card_for("vit_tiny_patch16_224", (32, 32), {"depth": 1, "embed_dim": 32, "num_heads": 2})
        save_encoder(tmp_path / "other", build_encoder(card), card)
        if seed:
            with pytest.raises(UserError, match="other changed"):
                probe("probe/demo", settings)
        else:
            probe("probe/demo", settings)


def test_names_in_tables_are_as_short_as_they_can_be_and_never_alike(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c/pretrained"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/run/encoder.safetensors").touch()
    runs = [str(tmp_path / "a/run/encoder.safetensors"), "timm:vit_small_patch16_224"]
    assert short(runs, {"pretrained"}) == ["run", "timm:vit_small_patch16_224"]
    assert short([runs[0], str(tmp_path / "b/run")], {"pretrained"}) == ["a/run", "b/run"]
    assert short([str(tmp_path / "c/pretrained")], {"pretrained"}) == ["c/pretrained"]
    assert short([], {"pretrained"}) == []
    assert short(["random"], {"pretrained", "random"}) == ["beside 1: random"]


def test_choices_are_counted() -> None:
    assert tally(["C 1"]) == "C 1"
    assert tally(["C 1", "C 10", "C 10"]) == "C 10 in 2 of 3; C 1 in 1"


def test_the_best_candidate_of_inner_folds_is_chosen_and_of_equals_the_first() -> None:
    made_up = task(np.arange(80) // 2 % 2, np.arange(80) // 2)
    fit = np.arange(60)

    def candidates(known: np.ndarray, held: np.ndarray) -> np.ndarray:
        assert not set(made_up.patients[known]) & set(made_up.patients[held])
        assert set(known) | set(held) == set(fit)
        right = np.eye(2)[made_up.truth[held]]
        return np.stack([1 - right, right, right])

    assert choose(made_up, fit, 3, 0, candidates) == 1


def test_an_encoder_without_a_class_token_is_swept_without_it() -> None:
    wanted = section(pools=("cls", "mean"))
    with_token, without = (
        timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=1, **options)
        for options in ({}, {"class_token": False, "global_pool": "avg"})
    )
    assert suited(wanted, with_token).pools == ("cls", "mean")
    assert suited(wanted, without).pools == ("mean",)


@pytest.mark.parametrize(
    "setting", ["--probe.methods=[linear, linear]", "--probe.methods=[]", "--probe.layers=[0]", "--probe.crops=-1"]
)
def test_settings_that_cannot_be_are_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=setting.split("=")[0]):
        probe("probe/demo", [setting, f"--out={tmp_path / 'run'}"])
