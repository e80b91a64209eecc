"""The finetune stage as a user runs it, on phantoms."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benches import TRAIN, encoder
from ranks import on_ranks

from miram.engine.config import dump_yaml
from miram.engine.errors import UserError
from miram.engine.run import Run
from miram.finetune.classify import search
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.classify.locked import read_locked
from miram.finetune.classify.stage import finetune
from miram.pretrain.encoder import card_for, save_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder."""
    out = tmp_path_factory.mktemp("stage")
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    (out / "encoder").mkdir()
    save_encoder(out / "encoder", encoder(), card_for("vit_tiny_patch16_224", (64, 32), options))
    return out


def settings(folder: Path, phantoms: Path, train: dict[str, Any] | None = None, **finetune_: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "out": str(folder / "run"),
        "data": {"shards": str(phantoms), "split": None, "task": finetune_.pop("task", "mass"), "workers": 0},
        "finetune": {
            "encoder": str(folder / "encoder" / "encoder.safetensors"),
            "replicates": 40,
            "explain": 0,
            "search": {"trials": 2, "folds": 2},
            **finetune_,
        },
        "train": {**TRAIN, "betas": list(TRAIN["betas"]), **(train or {})},  # type: ignore[call-overload]
    }
    return FinetuneConfig.model_validate_json(json.dumps(tree), strict=True)


def run(folder: Path, phantoms: Path, out: Path, *arguments: str, **options: Any) -> Run:
    path = out.with_suffix(".yaml")
    path.write_text(dump_yaml(settings(folder, phantoms, **options)))
    return finetune(str(path), [f"--out={out}", *arguments])


def result(run_: Run) -> dict[str, Any]:
    return dict(json.loads((run_.folder / "result.json").read_text()))


def predictions(run_: Run) -> list[dict[str, str]]:
    with (run_.folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def official(folder: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Lora on the official split, with maps."""
    return run(folder, phantoms, tmp_path_factory.mktemp("runs") / "official", explain=2)


def test_the_official_test_is_judged_once_and_the_model_that_judged_it_is_kept(official: Run, phantoms: Path) -> None:
    from miram.data.shards import ShardDataset

    rows, shards = predictions(official), ShardDataset(phantoms)
    test = [row["key"] for row, split in zip(shards.rows, shards.splits, strict=True) if split == "test"]
    assert sorted(row["key"] for row in rows) == sorted(test)
    content = result(official)
    assert content["split"] == "official train and test"
    assert content["n_images"] == len(test)
    locked = read_locked(official.folder)
    keys = {row["key"]: i for i, row in enumerate(shards.rows)}
    found = locked.probabilities(shards, np.array([keys[row["key"]] for row in rows]))
    assert np.abs(found[:, 1] - [float(row["p_1"]) for row in rows]).max() < 1e-5
    decided = locked.decide(found).tolist()
    assert decided == [int(row["decision"]) for row in rows]
    assert len(locked.card.trained_on.of) == 6


def test_what_a_run_leaves_is_what_it_says(official: Run) -> None:
    folder, content = official.folder, result(official)
    assert json.loads((folder / "state.json").read_text())["status"] == "finished"
    for name in ("roc.png", "calibration.png", "explained-1.png", "explained-2.png", "captions.json"):
        assert (folder / "figures" / name).is_file(), name
    tried = list(csv.DictReader((folder / "search.csv").open()))
    assert [float(row["value"]) for row in tried] == [1e-4, 1e-2]
    assert [row["chosen"] for row in tried].count("1") == 1
    cost = content["cost"]
    assert cost["trainings"] == 5
    assert cost["trainable"] == 2 * 4 * (48 + 144)  # rank 4 on two fused qkv
    assert cost["adapter_bytes"] == 4 * (cost["trainable"] + cost["head"])
    assert cost["peak_memory_bytes"] > 0
    assert cost["images_per_s"] > 0
    titles = [table["title"] for table in content["tables"]]
    assert len(titles) >= 3
    assert not list(folder.rglob("checkpoints")), "checkpoints of finished trainings are left"


def test_a_finished_run_is_not_run_again(
    official: Run, folder: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search.Search, "nested", None)
    finetune(str(official.folder.with_suffix(".yaml")), [f"--out={official.folder}"])
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_folds_judge_everybody_and_the_last_model_knows_everybody(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    """Within one split there is no official test: folds of its patients."""
    made = run(folder, phantoms, tmp_path / "cv", "--data.split=train", method="linear", folds=2)
    rows = predictions(made)
    assert len({row["key"] for row in rows}) == len(rows) == 24
    assert {row["fold"] for row in rows} == {"0", "1"}
    by_patient = {row["patient"]: {r["fold"] for r in rows if r["patient"] == row["patient"]} for row in rows}
    assert all(len(folds) == 1 for folds in by_patient.values())
    assert len(read_locked(made.folder).card.trained_on.of) == 6
    assert "within split 'train'" in result(made)["split"]


def test_labels_of_the_test_change_no_decision(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    """The same images under other labels in the test, the same models, thresholds and probabilities."""
    from miram.finetune.classify import stage

    first = run(folder, phantoms, tmp_path / "a", method="bitfit")
    real = stage.read_labels

    def shuffled(*arguments: Any, **options: Any) -> Any:
        labelled = real(*arguments, **options)
        labelled.truth[labelled.splits == "test"] = 1 - labelled.truth[labelled.splits == "test"]
        return labelled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "read_labels", shuffled)
        second = run(folder, phantoms, tmp_path / "b", method="bitfit")
    kept = ("key", "p_0", "p_1", "logit_0", "logit_1", "decision")
    assert [[row[name] for name in kept] for row in predictions(first)] == [
        [row[name] for name in kept] for row in predictions(second)
    ]
    assert result(first)["value"] == pytest.approx(1 - result(second)["value"])


@pytest.mark.parametrize(
    ("task", "options", "outputs"),
    [
        ("density", {"kind": "ordinal"}, 3),
        ("density", {"kind": "multiclass"}, 4),
        ("mass,calc", {}, 2),
        ("density", {"classes": {"fatty": ["a", "b"], "dense": ["*"]}}, 2),
    ],
)
def test_every_kind_of_task_goes_through(
    task: str, options: dict[str, Any], outputs: int, folder: Path, phantoms: Path, tmp_path: Path
) -> None:
    made = run(folder, phantoms, tmp_path / "kind", task=task, method="probe", **options)
    rows = predictions(made)
    assert f"logit_{outputs - 1}" in rows[0]
    assert f"logit_{outputs}" not in rows[0]
    assert result(made)["metric"]
    read_locked(made.folder)


def test_tiles_go_through(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    from miram.data.shards import ShardDataset

    spacing = max(float(value) for value in ShardDataset(phantoms).rows.column("spacing_mm"))
    tiles = {"mm_per_pixel": 1.05 * spacing, "steps": 5, "width": 8}
    made = run(folder, phantoms, tmp_path / "tiles", method="attention_mil", input="tiles", tiles=tiles)
    assert len(predictions(made)) == 24
    assert read_locked(made.folder).card.method == "attention_mil"
    assert list((tmp_path / "features").glob("*.safetensors"))


def test_a_share_of_the_labels_is_a_share_of_the_patients(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    made = run(folder, phantoms, tmp_path / "share", method="probe", fraction=0.3)
    assert len(read_locked(made.folder).card.trained_on.of) == 2
    assert any("labels of 2 patients" in note for note in result(made)["notes"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lorra"}, r"finetune.method: there is no 'lorra'; did you mean 'lora'\?"),
        ({"task": "mas"}, "no label 'mas'"),
        ({"method": "lora", "options": {"rnk": 3}}, "rnk"),
        ({"subgroups": ["vendr"]}, "vendr"),
        ({"classes": ["0", "2"]}, "finetune.classes"),
        ({"encoder": "nowhere"}, "nowhere"),
        ({"folds": 400, "task": "density", "classes": ["a", "b"]}, None),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_there(
    options: dict[str, Any], said: str | None, folder: Path, phantoms: Path, tmp_path: Path
) -> None:
    if said is None:  # an official split does not ask for folds
        assert run(folder, phantoms, tmp_path / "run", method="probe", **options).finished
        return
    with pytest.raises(UserError, match=said):
        run(folder, phantoms, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "train", "said"),
    [
        ({"input": "tiles"}, {}, "attention_mil"),
        ({"method": "attention_mil"}, {}, "finetune.input=tiles"),
        ({"keep": "best"}, {}, "finetune.search.folds=1"),
        ({}, {"blr": 1e-3}, "finetune.search.lrs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    options: dict[str, Any], train: dict[str, Any], said: str, folder: Path, phantoms: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        settings(folder, phantoms, train, **options)


@pytest.mark.parametrize("where", ["write_locked", pytest.param("draw_figures", marks=pytest.mark.slow)])
def test_a_run_that_dies_between_its_model_and_its_figures_goes_on(
    where: str, folder: Path, phantoms: Path, tmp_path: Path
) -> None:
    from miram.finetune.classify import stage

    def die(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    whole = run(folder, phantoms, tmp_path / "whole", method="bitfit")
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, where, die)
            with pytest.raises(KeyboardInterrupt):
                run(folder, phantoms, tmp_path / "dies", method="bitfit")
    again = run(folder, phantoms, tmp_path / "dies", method="bitfit")
    assert predictions(again) == predictions(whole)
    assert read_locked(again.folder).digest == read_locked(whole.folder).digest


def test_several_labels_are_divided_by_patients_whatever_their_strata(
    folder: Path, phantoms: Path, tmp_path: Path
) -> None:
    """Both labels are on enough patients, but hardly any image has the second one alone."""
    from miram.finetune.classify import stage

    real = stage.read_labels

    def nested(*arguments: Any, **options: Any) -> Any:
        labelled = real(*arguments, **options)
        labelled.truth[:, 1] = labelled.truth[:, 0]
        for split in ("train", "test"):
            without = np.flatnonzero((labelled.splits == split) & (labelled.truth[:, 0] == 0))
            labelled.truth[without[:1], 1] = 1
        return labelled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "read_labels", nested)
        assert run(folder, phantoms, tmp_path / "official", task="mass,calc", method="probe").finished
        assert run(folder, phantoms, tmp_path / "cv", "--data.split=train", task="mass,calc", method="probe", folds=2)


def test_train_and_val_that_share_a_patient_are_refused(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    from miram.finetune.classify import stage

    real = stage.read_labels

    def leaking(*arguments: Any, **options: Any) -> Any:
        labelled = real(*arguments, **options)
        labelled.splits[np.flatnonzero(labelled.splits == "train")[0]] = "val"
        return labelled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "read_labels", leaking)
        with pytest.raises(UserError, match="1 patients are in both train and val"):
            run(folder, phantoms, tmp_path / "run")


def test_a_patient_in_train_and_test_is_refused(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    from miram.finetune.classify import stage

    real = stage.read_labels

    def leaking(*arguments: Any, **options: Any) -> Any:
        labelled = real(*arguments, **options)
        train, test = (np.flatnonzero(labelled.splits == split)[0] for split in ("train", "test"))
        labelled.patients[test] = labelled.patients[train]
        return labelled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "read_labels", leaking)
        with pytest.raises(UserError, match="1 patients are in both train and test"):
            run(folder, phantoms, tmp_path / "run")


def test_ranks_of_unequal_speed_end_together(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    """The last rank comes to the kept model when the first has written it."""
    from miram.finetune.classify import stage

    def work() -> float:
        real = stage.Stage.fold

        def late(*arguments: Any, **options: Any) -> Any:
            found = real(*arguments, **options)
            time.sleep(2.0 * int(os.environ["RANK"]))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage.Stage, "fold", late)
            return float(result(run(folder, phantoms, tmp_path / "ranks", method="bitfit"))["value"])

    found = on_ranks(2, work)
    assert isinstance(found[0], float), found
    assert found[0] == found[1]


def test_a_sweep_is_so_many_runs_and_a_table(folder: Path, phantoms: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    made = settings(folder, phantoms, method="lora", final=False)
    sweep = made.sweep.model_copy(update={"methods": ("probe", "linear"), "seeds": (0,), "against": "probe"})
    path.write_text(dump_yaml(made.model_copy(update={"sweep": sweep})))
    found = finetune(str(path), [f"--out={tmp_path / 'sweep'}"], sweeps=True)
    content = result(found)
    assert [row[0] for row in content["tables"][0]["rows"]] == ["probe", "linear"]
    assert len(list((tmp_path / "sweep" / "cells").rglob("result.json"))) == 2
    assert len(list((tmp_path / "sweep" / "features").glob("*.safetensors"))) == 1, "features were computed twice"
