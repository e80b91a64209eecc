"""A simulated federation from the command's arguments to the model, and who may judge whom in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benches import bench, encoder
from sklearn.metrics import roc_auc_score

from miram.engine.errors import UserError
from miram.engine.run import Run
from miram.finetune.classify.labels import read_labels
from miram.finetune.classify.locked import read_locked
from miram.finetune.federate.config import FederateConfig, FederateSection
from miram.finetune.federate.parties import divide, named, short, sites_of
from miram.finetune.federate.stage import federate
from miram.finetune.federate.trial import Trial
from miram.pretrain.encoder import EncoderCard, save_encoder

KWARGS = {"in_chans": 1, "num_classes": 0, "img_size": [64, 32], "depth": 2, "embed_dim": 48, "num_heads": 4}


@pytest.fixture(scope="module")
def arguments(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of two sites, two rounds of two steps."""
    folder = tmp_path_factory.mktemp("federate")
    save_encoder(folder, encoder(), EncoderCard(architecture="vit_tiny_patch16_224", kwargs=KWARGS))
    return [
        f"--data.shards={phantoms}",
        "--data.split=null",
        "--data.task=mass",
        '--finetune.classes=["0", "1"]',
        f"--finetune.encoder={folder}",
        "--finetune.headline=image",
        "--finetune.replicates=50",
        "--finetune.start=zero",
        "--train.steps=2",
        "--train.batch_size=8",
        "--federate.sites=2",
        "--federate.rounds=2",
    ]


@pytest.fixture(scope="module")
def run(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    federate("federate/demo", [*arguments, f"--out={out}"])
    return out


def read(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def test_the_result_compares_three_ways_of_learning_site_by_site(run: Path) -> None:
    result = read(run)
    assert [row["name"] for row in result["rows"]] == [
        f"{of}, mean of sites" for of in ("federated", "local", "centralised")
    ]
    sites, crossed, rounds = result["tables"]
    assert [row[0] for row in sites["rows"]] == ["site-1", "site-2", "mean of sites"]
    for column in (4, 5, 6):
        values = [row[column]["value"] for row in sites["rows"]]
        assert values[2] == pytest.approx(np.mean(values[:2]))
    gaps = [row["value"] for row in result["differences"]]
    mean = [row["value"] for row in result["rows"]]
    assert gaps == pytest.approx([mean[0] - mean[1], mean[0] - mean[2]])
    assert [row[0] for row in crossed["rows"]] == ["federated", "local-site-1", "local-site-2", "centralised"]
    assert [row[0] for row in rounds["rows"]] == [0, 1, 2]
    assert all(row[4] > 0 for row in rounds["rows"])
    assert sum(1 for _ in (run / "metrics.jsonl").open()) == 2


def test_the_kept_model_says_what_was_judged(run: Path, phantoms: Path, arguments: list[str]) -> None:
    locked, settings = read_locked(run), bench(phantoms, run.parent / "b", classes=("0", "1"))
    parts = divide(settings.labelled, settings.shards, FederateSection(sites=2), 0)
    crossed = read(run)["tables"][1]["rows"][0][1:]
    for part, cell in zip(parts.values(), crossed, strict=True):
        said = locked.probabilities(settings.shards, settings.labelled.rows[part.test])[:, 1]
        assert roc_auc_score(settings.labelled.truth[part.test], said) == pytest.approx(cell["value"], abs=1e-6)
    learnt = {patient.rpartition("/")[2] for part in parts.values() for patient in settings.labelled.patients[part.fit]}
    assert set(locked.card.trained_on.of) == learnt


def test_the_same_command_says_that_it_is_finished(
    run: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    federate("federate/demo", [*arguments, f"--out={run}"])
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_with_one_site_and_all_images_federated_local_and_centralised_are_one(
    arguments: list[str], tmp_path: Path
) -> None:
    federate("federate/demo", [*arguments, f"--out={tmp_path / 'one'}", "--federate.sites=1"])
    result = read(tmp_path / "one")
    assert [row["name"] for row in result["rows"]] == ["federated, mean of sites", "local, mean of sites"]
    assert result["differences"][0]["value"] == 0
    assert result["differences"][0]["interval"] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--finetune.method=full"], "full is not federated"),
        (["--finetune.method=vpt_deep", "--federate.average=residual"], "no low rank"),
        (["--federate.sites=50"], "fewer than 50"),
        (["--federate.by=densty", "--federate.sites=null"], "did you mean 'density'"),
        (["--federate.by=view", "--federate.sites=null"], "no such column"),
        (["--train.blr=1e-3"], "federate.lr"),
        (["--train.ema=0.9"], "train.ema"),
        (["--train.trackers=[wandb]"], "train.trackers"),
        (["--train.micro_batch=3"], "no multiple"),
        (["--train.batch_size=64", "--train.micro_batch=64"], "do not fill a batch of 64"),
        (["--federate.holdout=0.7"], "federate.holdout"),
        (["--federate.base=nothing"], "federate.base"),
        ([f"--federate.base={'a' * 64}"], "another encoder's"),
        (["--finetune.search.trials=5"], "finetune.search"),
        (["--federate.by=shards", "--federate.sites=null"], "of one site"),
        (["--finetune.keep=best", "--finetune.search.folds=1"], "finetune.keep"),
    ],
)
def test_what_cannot_be_federated_is_said_before_anything_is_written(
    changes: list[str], said: str, arguments: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        federate("federate/demo", [*arguments, f"--out={tmp_path / 'run'}", *changes])
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- who has what


def test_no_patient_is_at_two_sites_or_on_two_sides(phantoms: Path, tmp_path: Path) -> None:
    made = bench(phantoms, tmp_path, classes=("0", "1"))
    parts = divide(made.labelled, made.shards, FederateSection(sites=3), seed=1)
    groups = [set(made.labelled.patients[images]) for part in parts.values() for images in (part.fit, part.test)]
    assert all(groups)
    assert not any(one & other for i, one in enumerate(groups) for other in groups[:i])
    assert sum(len(part.fit) + len(part.test) for part in parts.values()) == len(made.labelled.rows)


def test_data_without_splits_holds_a_share_of_each_sites_patients_out(phantoms: Path, tmp_path: Path) -> None:
    made = bench(phantoms, tmp_path, classes=("0", "1"))
    object.__setattr__(made.labelled, "splits", np.full(len(made.labelled.rows), ""))
    parts = divide(made.labelled, made.shards, FederateSection(sites=2, holdout=0.34), seed=1)
    for part in parts.values():
        fit, test = (set(made.labelled.patients[images]) for images in (part.fit, part.test))
        assert not fit & test
        assert 0.15 < len(test) / len(fit | test) < 0.5
        assert len(np.unique(made.labelled.truth[part.fit])) == 2


def test_a_label_that_cuts_patients_in_two_makes_no_sites(phantoms: Path, tmp_path: Path) -> None:
    made = bench(phantoms, tmp_path, classes=("0", "1"))
    labelled = read_labels(made.shards, "density")
    assert len(set(sites_of(labelled, made.shards, FederateSection(by="density"), 0))) > 1
    side = [label for label in made.shards.tasks if label not in ("density",)]
    with pytest.raises(UserError, match="patients are at several sites"):
        divide(labelled, made.shards, FederateSection(by=side[0]), 0)


def test_data_sets_in_folders_of_one_name_are_two_sites() -> None:
    roots = ["/a/north/shards", "/b/south/shards/"]
    assert short(roots) == {roots[0]: "north/shards", roots[1]: "south/shards"}
    assert short(["/a/x", "/b/y"]) == {"/a/x": "x", "/b/y": "y"}
    assert named(list(short(roots).values())).tolist() == ["north-shards", "south-shards"]


def test_the_share_held_out_is_told_as_it_is(run: Path, phantoms: Path, tmp_path: Path) -> None:
    assert read(run)["split"] == "official train and test"
    made = bench(phantoms, tmp_path, classes=("0", "1"), method="lora_qkv")
    object.__setattr__(made.labelled, "splits", np.full(len(made.labelled.rows), ""))
    section = FederateSection(sites=2, holdout=0.4)
    parts = divide(made.labelled, made.shards, section, seed=1)
    held = len(np.unique(made.labelled.patients[np.concatenate([part.test for part in parts.values()])]))
    given = {name: getattr(made.settings, name) for name in ("data", "finetune", "train")}
    trial = Trial(FederateConfig(federate=section, **given), made, parts, Run(tmp_path, "federate"))
    assert trial.split == f"{held} of 12 patients held out, of every site some"
    some = {name: replace(part, official=name == "site-1") for name, part in parts.items()}
    assert replace(trial, parts=some).split.startswith("official where there is one; at 1 sites ")


def test_with_epochs_models_are_compared_by_passes(run: Path, arguments: list[str], tmp_path: Path) -> None:
    assert "as many steps as" in read(run)["tables"][0]["note"]
    rest = [argument for argument in arguments if "train.steps" not in argument]
    federate("federate/demo", [*rest, "--train.epochs=1", "--federate.rounds=1", f"--out={tmp_path / 'run'}"])
    assert "as many passes over its images as" in read(tmp_path / "run")["tables"][0]["note"]


def test_names_that_would_be_the_same_are_refused() -> None:
    assert named(["Site A", "site_b"]).tolist() == ["site-a", "site_b"]
    with pytest.raises(UserError, match="would both be called"):
        named(["Site A", "site-a"])


def test_a_teacher_is_not_federated(phantoms: Path) -> None:
    tree = {
        "data": {"shards": str(phantoms)},
        "finetune": {"encoder": "random", "method": "lora", "teacher": {"run": "x"}},
        "train": {"steps": 1},
    }
    with pytest.raises(ValueError, match="sites do not distil"):
        FederateConfig.model_validate(tree)
