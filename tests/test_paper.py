"""The paper's experiment: its presets, its phantom lesions, the flow at its smallest, and the table's arithmetic."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from miram.data.archive import SourceOptions
from miram.data.divide import make_split
from miram.data.ingest import ingest
from miram.data.phantom import PhantomSettings
from miram.data.phantom_cbis import make_lesions, write_archive
from miram.data.shards import ShardDataset
from miram.data.sources import read_archive
from miram.data.sources.phantom import KEY
from miram.engine.config import load, presets, read_tree
from miram.engine.errors import Preempted, RunFailed, UserError
from miram.engine.signals import StopSignals
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.classify.predictions import Predictions
from miram.paper import stage as module
from miram.paper.config import PaperConfig
from miram.paper.stage import Experiment, arguments_of, paper
from miram.paper.table import Told, standing

OURS = [name for name in presets() if name.startswith("paper/")]
LESIONS = PhantomSettings(size=240, seed=5, mass_rate=0.9, calc_rate=0.9)
SMALL = [
    "--seeds=[0, 1]",
    "--replicates=50",
    "--data.workers=0",
    "--every.pretrain.train.steps=2",
    "--every.pretrain.train.batch_size=8",
    "--every.pretrain.model.encoder_options={patch_size: 8, depth: 1, embed_dim: 32, num_heads: 2}",
    "--every.finetune.train.steps=2",
    "--every.finetune.train.batch_size=8",
    "--every.finetune.finetune.replicates=20",
    "--finetune={authors: {preset: paper/authors}}",
    "--published={mae: {accuracy: 0.589, source: the paper}}",
]
TWO = "--pretrain={mae: {preset: pretrain/mae, set: {model.scales: [{scale: 1, depth: 1, width: 32, heads: 2}]}}, \
moco_v3: {preset: pretrain/moco_v3, set: {moco: {dim: 8, hidden: 16}, model.checkpointing: false}}}"


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom lesions of 20 patients, as shards, with the archive beside them."""
    shards = tmp_path_factory.mktemp("paper") / "lesions"
    make_lesions(shards, 20, LESIONS, workers=1)
    return shards


def asked(lesions: Path, out: Path, *more: str) -> list[str]:
    return [f"--data.shards={lesions}", f"--out={out}", *SMALL, TWO, *more]


# ------------------------------------------------------------------------------------------ presets


def test_there_are_presets() -> None:
    assert {"paper/cbis", "paper/cbis_112", "paper/tiny", "paper/authors", "paper/ours"} <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_every_key_of_every_preset_is_one_of_its_stage(name: str) -> None:
    if "pretrain" in read_tree(name):
        Experiment(load(PaperConfig, name), StopSignals()).refuse_keys()
    else:
        load(FinetuneConfig, name)


def test_the_real_rows_differ_in_their_objective_and_their_fine_decoder_alone() -> None:
    experiment = Experiment(load(PaperConfig, "paper/cbis"), StopSignals())
    found = {
        n: load(module.PretrainConfig, *experiment.pretraining(n))
        for n in experiment.settings.pretrain
        if n != "scratch"
    }
    assert {n: [s.attention for s in c.model.scales] for n, c in found.items() if n != "moco_v3"} == {
        "mae": ["softmax"],
        **{f"miram_{a}": ["softmax", a] for a in ("nystrom", "performer", "linformer")},
    }
    assert {(c.train.epochs, c.train.batch_size, c.model.image_size, c.model.encoder) for c in found.values()} == {
        (500, 256, 224, "vit_base_patch16_224")
    }
    assert {c.data.split for c in found.values()} == {"train"}


def test_keys_under_a_section_are_opened_up_and_those_with_dots_are_values() -> None:
    every = {"train": {"steps": 3, "betas": [0.9, 0.95]}}
    own = {"model.scales.1.options": {"num_features": 8}, "train.steps": None, "model": {"scales": {"0": {"depth": 1}}}}
    assert arguments_of(every, own) == [
        "--train.steps=3",
        "--train.betas=[0.9, 0.95]",
        '--model.scales.1.options={"num_features": 8}',
        "--train.steps=null",
        "--model.scales.0.depth=1",
    ]


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        (
            "--pretrain.mae.presett=x",
            r"pretrain\.mae\.presett is not a known key; did you mean 'pretrain\.mae\.preset'",
        ),
        ("--pretrain.mae.set.train.stepps=3", r"pretrain\.mae: --train\.stepps is not a known key"),
        ("--every.finetune.finetune.methd=x", r"finetune\.authors: --finetune\.methd is not a known key"),
        ("--against=simclr", "against: 'simclr' is no row"),
        ("--pretrain.mae.encoder=random", "give a preset, with keys to set, or an encoder"),
        ("--seeds=[1, 1]", "each once"),
    ],
)
def test_what_is_mistyped_is_named_before_anything_is_made(argument: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        paper("paper/tiny", [f"--data.shards={tmp_path / 's'}", f"--out={tmp_path / 'o'}", argument])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ phantom lesions


def test_phantom_lesions_are_read_as_cbis_ddsm_is(lesions: Path) -> None:
    tables = sorted(lesions.with_name("lesions.archive").glob("*_case_description_*_set.csv"))
    rows = [row for table in tables for row in csv.DictReader(table.open())]
    shards = ShardDataset(lesions, None)
    assert len(tables) == 4
    assert len(shards) == len(rows) == len({row["ROI mask file path"] for row in rows})
    both = set(zip(shards.labels("four_class"), shards.splits, strict=True))
    assert both == {
        (f"{p}_{k}", s) for p in ("BENIGN", "MALIGNANT") for k in ("MASS", "CALC") for s in ("train", "test")
    }
    assert {row["patient_id"] for row in rows if row["pathology"] == "MALIGNANT" and row["abnormality type"] == "mass"}
    assert all(a == b for a, b in zip(*(shards.rows.column(side) for side in ("height", "width")), strict=True))


def test_patients_in_both_official_tables_are_tested_and_never_trained_on(lesions: Path) -> None:
    parts = defaultdict(set)
    for table in lesions.with_name("lesions.archive").glob("*.csv"):
        parts["train" in table.name] |= {row["patient_id"] for row in csv.DictReader(table.open())}
    assert parts[True] & parts[False]
    shards = ShardDataset(lesions, None)
    sides = defaultdict(set)
    for patient, split in zip(shards.rows.column("patient"), shards.splits, strict=True):
        sides[split].add(patient)
    assert not sides["train"] & sides["test"]


def test_data_that_leaks_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    write_archive(tmp_path / "archive", 12, LESIONS)
    archive = read_archive("cbis-ddsm", tmp_path / "archive", SourceOptions(level="roi"))
    ingest(archive, tmp_path / "leaking", KEY, 1)
    with pytest.raises(UserError, match="--disjoint"):
        paper("paper/tiny", asked(tmp_path / "leaking", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_pretraining_on_test_patients_is_refused(lesions: Path, tmp_path: Path) -> None:
    shards = ShardDataset(lesions, None)
    make_split(shards.rows, seed=3).write(tmp_path / "other.json", shards.population)
    with pytest.raises(UserError, match=r"pretrain\.mae: [0-9]+ patients of it are test patients"):
        paper(
            "paper/tiny",
            asked(lesions, tmp_path / "out", f"--every.pretrain.data.split_file={tmp_path / 'other.json'}"),
        )
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ the flow


@pytest.fixture(scope="module")
def done(lesions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pretrainings, one recipe, two seeds, two steps each; stopped once on the way."""
    out = tmp_path_factory.mktemp("done") / "run"
    signals = StopSignals()
    signals.received = "SIGTERM"
    with pytest.raises(Preempted):
        paper("paper/tiny", asked(lesions, out), signals=signals)
    assert json.loads((out / "state.json").read_text())["status"] == "preempted"
    paper("paper/tiny", asked(lesions, out))
    return out


def test_accuracy_is_the_mean_over_seeds_of_what_scikit_learn_counts(done: Path) -> None:
    result = json.loads((done / "result.json").read_text())
    counted = {}
    for name in ("mae", "moco_v3"):
        files = [done / "finetune" / name / "authors" / f"seed-{seed}" / "predictions.csv" for seed in (0, 1)]
        said = [list(csv.DictReader(file.open())) for file in files]
        counted[name] = np.mean([accuracy_score([r["truth"] for r in f], [r["decision"] for r in f]) for f in said])
    rows = {row["name"]: row["value"] for row in result["rows"]}
    assert {name: rows[name] for name in counted} == pytest.approx(counted)
    assert result["differences"][0]["value"] == pytest.approx(counted["moco_v3"] - counted["mae"])
    truth = [r["truth"] for r in said[0]]
    assert rows["majority class"] == max(truth.count(c) for c in truth) / len(truth)
    assert result["n_images"] == len(truth)


def test_the_table_stands_beside_what_was_published(done: Path) -> None:
    result = json.loads((done / "result.json").read_text())
    table = result["tables"][0]
    assert [row[-1] for row in table["rows"]] == [0.589, None]
    assert any("60.8 %" in note for note in result["notes"])
    assert any("phantoms" in note for note in result["notes"])
    rows = list(csv.DictReader((done / "table.csv").open()))
    assert [(row["recipe"], row["pretraining"], row["seeds"]) for row in rows] == [
        ("authors", "mae", "0 1"),
        ("authors", "moco_v3", "0 1"),
    ]
    assert rows[0]["ahead of mae"] == ""
    page = (done / "report.html").read_text()
    for name in ("the experiment", "pretrain mae", "finetune moco_v3 authors seed-0"):
        assert name in page


def test_what_fails_is_named_and_nothing_that_is_finished_is_run_again(
    lesions: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.pretrain

    def fails(preset: str, *rest: object, **options: object) -> object:
        if "third" in str(rest):
            raise RunFailed("the loss is nan")
        return real(preset, *rest, **options)  # type: ignore[arg-type]

    before = {path: path.stat().st_mtime_ns for path in done.glob("*/**/metrics.jsonl")}
    monkeypatch.setattr(module, "pretrain", fails)
    with pytest.raises(RunFailed, match=r"pretrain\.third: the loss is nan"):
        paper("paper/tiny", asked(lesions, done, "--pretrain.third={preset: pretrain/moco_v3, set: {moco.dim: 8}}"))
    assert before == {path: path.stat().st_mtime_ns for path in done.glob("*/**/metrics.jsonl")}
    result = json.loads((done / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["mae", "moco_v3", "majority class"]
    assert "Failed: pretrain.third: the loss is nan" in result["notes"]


@pytest.mark.slow
def test_another_seed_is_added_to_a_finished_experiment(lesions: Path, done: Path) -> None:
    paper("paper/tiny", asked(lesions, done, "--seeds=[0, 1, 2]"))
    assert (done / "finetune" / "mae" / "authors" / "seed-2" / "result.json").exists()


def test_the_folder_of_another_stage_is_left_alone(lesions: Path, done: Path) -> None:
    before = (done / "pretrain" / "mae" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="another configuration"):
        paper("paper/tiny", asked(lesions, done / "pretrain" / "mae"))
    assert (done / "pretrain" / "mae" / "config.yaml").read_bytes() == before


# ------------------------------------------------------------------------------------------ arithmetic


def made_up(right: list[bool], patients: list[str]) -> Told:
    truth = np.array(["a", "b"] * (len(right) // 2))
    decided = np.where(right, truth, np.where(truth == "a", "b", "a"))
    p = (decided == "b").astype(float)
    both, names = np.stack([1 - p, p], 1), np.array(patients)
    fold = np.zeros(len(right), np.int64)
    said = Predictions(names, names, names, truth, decided, fold, ("a", "b"), both, both)
    return Told(said, {"kind": "binary", "task": "made up"})


def test_differences_are_paired_and_patients_go_together() -> None:
    tree = ["--pretrain={mae: {encoder: random}, same: {encoder: random}, other: {encoder: random}}", "--published={}"]
    settings = load(PaperConfig, "paper/tiny", [*tree, "--seeds=[0, 1]", "--replicates=400"])
    rng = np.random.default_rng(0)
    right = (rng.random(80) < 0.7).tolist()
    alone, pairs = [f"d/{i}" for i in range(80)], [f"d/{i // 8}" for i in range(80)]
    blocks = np.repeat(rng.random(10) < 0.5, 8).tolist()

    def rows(right: list[bool], patients: list[str]) -> dict[str, object]:
        one, other = made_up(right, patients), made_up((~np.array(right)).tolist(), patients)
        told = {(n, "ours", s): other if n == "other" else one for n in ("mae", "same", "other") for s in (0, 1)}
        return {row.name: row for row in standing(settings, told)["ours"]}

    found = rows(right, alone)
    assert found["mae"].ahead is None
    assert (found["same"].ahead.value, *found["same"].ahead.interval) == (0, 0, 0)
    assert found["other"].ahead.value == pytest.approx(1 - 2 * np.mean(right))
    width = lambda row: np.subtract(*row.figures["accuracy"].interval[::-1])  # noqa: E731
    normal = 2 * 1.96 * np.sqrt(np.mean(right) * (1 - np.mean(right)) / 80)
    assert width(found["mae"]) == pytest.approx(normal, rel=0.2)
    assert width(rows(blocks, pairs)["mae"]) > 2 * width(rows(blocks, alone)["mae"])
