"""A locked model on another set: figures of its locked numbers, differences to its own test, nobody it knows."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lockables import lock, write_encoder
from sklearn.metrics import roc_auc_score

from miram.data.phantom import PhantomSettings
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.engine import command
from miram.engine.errors import UserError
from miram.engine.report import write_report
from miram.finetune.change import combined, own_test
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.classify.locked import read_locked
from miram.finetune.evaluate import configured, evaluate, usage

QUICK = ["--replicates=60", "--explain=1"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "site"
    make_phantoms(out, 14, PhantomSettings(size=96, seed=11), workers=1)
    return out


@pytest.fixture(scope="module")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose own test is that of `phantoms`."""
    folder = tmp_path_factory.mktemp("evaluate")
    lock(folder / "run", phantoms, write_encoder(folder / "encoder"), thresholds=dict.fromkeys(LEVELS, (0.84,)))
    evaluate(str(folder / "run"), [f"--data.shards={phantoms}", "--data.split=test", f"--out={folder / 'own'}", *QUICK])
    for name in ("result.json", "predictions.csv"):
        shutil.copy(folder / "own" / name, folder / "run" / name)
    return folder / "run"


LEVELS = ("image", "breast", "patient")


@pytest.fixture(scope="module")
def evaluated(run: Path, other: Path) -> Path:
    return evaluate(str(run), [f"--data.shards={other}", *QUICK]).folder


def test_figures_are_those_of_the_locked_numbers(run: Path, other: Path, evaluated: Path) -> None:
    assert evaluated == run / "evaluations" / "site"
    locked, shards = read_locked(run), ShardDataset(other)
    p = locked.probabilities(shards, np.arange(len(shards)))[:, 1]
    truth = np.array(shards.rows.column("label_mass"), int)
    result = json.loads((evaluated / "result.json").read_text())
    assert result["value"] == pytest.approx(roc_auc_score(truth, p))
    assert (result["n_images"], result["n_patients"], result["model"]) == (56, 14, locked.digest)
    figures = {row[0]: row[1] for row in result["tables"][0]["rows"]}
    assert figures["sensitivity"]["value"] == pytest.approx((p[truth == 1] >= 0.84).mean())
    rows = list(csv.DictReader((evaluated / "predictions.csv").open()))
    assert np.allclose(sorted(float(row["p_1"]) for row in rows), np.sort(p))


def test_the_difference_is_here_minus_own_test_and_its_interval_that_of_independent_samples(
    run: Path, evaluated: Path
) -> None:
    own, here = (json.loads((folder / "result.json").read_text()) for folder in (run, evaluated))
    by_level = {row["name"]: row for row in here["differences"]}
    for level in LEVELS:
        name = f"by {level}"
        before, now = (next(row for row in one["rows"] if row["name"] == name) for one in (own, here))
        gap = by_level[f"{name}: here - own test"]
        assert gap["value"] == pytest.approx(now["value"] - before["value"])
        assert gap["interval"][0] < gap["value"] < gap["interval"][1]
        widths = [one["interval"][1] - one["interval"][0] for one in (before, now, gap)]
        assert max(widths[:2]) < widths[2] < 1.3 * sum(widths[:2])
    table = next(table for table in here["tables"] if table["title"].startswith("Against the run's own test"))
    row = next(row for row in table["rows"] if row[0] == "specificity")
    assert row[3]["value"] == pytest.approx(row[2]["value"] - row[1]["value"])


def test_subgroups_stand_beside_those_of_the_own_test(run: Path, evaluated: Path) -> None:
    own, here = (json.loads((folder / "result.json").read_text()) for folder in (run, evaluated))
    tables = [{table["title"]: table for table in one["tables"]} for one in (own, here)]
    title = next(title for title in tables[1] if title.startswith("By view"))
    before, now = (one[title] for one in tables)
    assert now["columns"][-2:] == ["AUC, own test", "here - own test"]
    auc = now["columns"].index("AUC")
    for old, new in zip(before["rows"], now["rows"], strict=True):
        assert new[-2] == old[auc]
        assert new[-1]["value"] == pytest.approx(new[auc]["value"] - old[auc]["value"])


def test_intervals_combine_as_those_of_independent_normal_estimates() -> None:
    low, high = combined(0.8, [0.8 - 1.96 * 0.03, 0.8 + 1.96 * 0.03], 0.9, [0.9 - 1.96 * 0.04, 0.9 + 1.96 * 0.04])
    assert (low, high) == pytest.approx((-0.1 - 1.96 * 0.05, -0.1 + 1.96 * 0.05))
    low, high = combined(0.8, [0.7, 0.85], 0.9, [0.85, 0.92])
    assert low == pytest.approx(-0.1 - np.hypot(0.1, 0.02))
    assert high == pytest.approx(-0.1 + np.hypot(0.05, 0.05))


def test_patients_of_the_training_are_refused_and_a_split_that_was_not_used_is_not(run: Path, phantoms: Path) -> None:
    for split in ("train", "null"):
        with pytest.raises(UserError, match=r"trained on 6 of the (6|12) patients.*data set it was trained on"):
            evaluate(str(run), [f"--data.shards={phantoms}", f"--data.split={split}"])
    assert not (run / "evaluations" / "phantoms").exists()


def test_known_patients_in_a_set_that_was_made_again_are_refused_too(run: Path, phantoms: Path, tmp_path: Path) -> None:
    again = shutil.copytree(phantoms, tmp_path / "again")
    manifest = json.loads((again / "manifest.json").read_text())
    (again / "manifest.json").write_text(json.dumps(manifest | {"records": "0" * 16}))
    with pytest.raises(UserError, match=r"trained on 6 of the 12 patients.*shares patients"):
        evaluate(str(run), [f"--data.shards={again}"])


def test_a_finished_evaluation_is_left_alone_and_another_model_needs_another_folder(
    run: Path, evaluated: Path, other: Path, phantoms: Path, tmp_path: Path
) -> None:
    before = (evaluated / "result.json").stat().st_mtime_ns
    evaluate(str(run), [f"--data.shards={other}", *QUICK])
    assert (evaluated / "result.json").stat().st_mtime_ns == before
    copy = shutil.copytree(evaluated, tmp_path / "copy")
    lock(tmp_path / "run", phantoms, run.with_name("encoder"), temperature=3.0)
    config = (copy / "config.yaml").read_text().replace(str(run), str(tmp_path / "run"))
    (copy / "config.yaml").write_text(config)
    with pytest.raises(UserError, match="model changed"):
        evaluate(str(tmp_path / "run"), [f"--data.shards={other}", f"--out={copy}", *QUICK])


def test_the_report_shows_it(evaluated: Path, tmp_path: Path) -> None:
    page = write_report([evaluated], tmp_path / "report.html").read_text()
    assert "here - own test" in page
    captions = json.loads((evaluated / "figures" / "captions.json").read_text())
    assert {"roc.png", "explained-1.png"} <= set(captions)
    assert all((evaluated / "figures" / name).stat().st_size > 3000 for name in captions if name != "schema")
    assert json.loads((evaluated / "state.json").read_text())["status"] == "finished"


def test_labels_that_the_model_does_not_know_are_left_out_and_counted(
    phantoms: Path, other: Path, run: Path, tmp_path: Path
) -> None:
    lock(tmp_path / "run", phantoms, run.with_name("encoder"), task="density", classes=("a", "d"))
    folder = evaluate(str(tmp_path / "run"), [f"--data.shards={other}", "--explain=0", "--replicates=20"]).folder
    result = json.loads((folder / "result.json").read_text())
    densities = ShardDataset(other).rows.column("label_density")
    assert result["classes"] == {name: densities.count(name) for name in "ad"}
    told = f"'b' ({densities.count('b')}), 'c' ({densities.count('c')})"
    assert any(told in note for note in result["notes"])
    assert result["differences"] == []
    assert any("predictions.csv is not there" in note for note in result["notes"])
    assert str(tmp_path) not in (folder / "result.json").read_text()


def test_a_task_of_another_name_and_what_is_not_there(run: Path, other: Path) -> None:
    with pytest.raises(UserError, match="no label 'cancer'"):
        evaluate(str(run), [f"--data.shards={other}", "--data.task=cancer"])
    with pytest.raises(UserError, match=r"model knows \(0, 1\); name another label with data\.task"):
        evaluate(str(run), [f"--data.shards={other}", "--data.task=density"])
    with pytest.raises(UserError, match="not binary, as the model's"):
        evaluate(str(run), [f"--data.shards={other}", "--data.task=mass,calc"])
    with pytest.raises(UserError, match=r"--data\.shards"):
        evaluate(str(run), [])
    with pytest.raises(UserError, match="dats is not a known key"):
        evaluate(str(run), [f"--dats={other}"])
    with pytest.raises(UserError, match=r"data\.shard is not a known key; did you mean 'data\.shards'"):
        evaluate(str(run), [f"--data.shard={other}"])
    with pytest.raises(UserError, match=r"^subgroups: the data has no column or label 'nothing'"):
        evaluate(str(run), [f"--data.shards={other}", "--subgroups=[nothing]"])
    with pytest.raises(UserError, match=r"write a list, as --subgroups=\[site\]"):
        evaluate(str(run), [f"--data.shards={other}", "--subgroups=site"])
    with pytest.raises(UserError, match="the run is named first"):
        evaluate(str(run), [f"--data.shards={other}", "--run=elsewhere"])
    folder = configured(str(run), [f"--data.shards={other}", "--data.task=calc", "--data.split=test"]).out
    assert folder == str(run / "evaluations" / "site-test-calc")


def test_the_folder_of_the_model_stands_for_its_run_and_a_copy_of_it_needs_another_place(
    run: Path, other: Path, tmp_path: Path
) -> None:
    arguments = [f"--data.shards={other}"]
    assert configured(str(run / "model"), arguments) == configured(str(run), arguments)
    copy = shutil.copytree(run / "model", tmp_path / "model")
    with pytest.raises(UserError, match="without its run: name a folder for the evaluation with --out"):
        evaluate(str(copy), arguments)
    assert configured(str(copy), [*arguments, "--out=there"]).out == "there"


def test_the_help_lists_what_is_used() -> None:
    listed = [line.split()[0] for line in usage().splitlines() if line.startswith("  --")]
    data = ["--data.shards", "--data.split", "--data.split_file", "--data.fold", "--data.task"]
    assert [key for key in listed if key.startswith("--data")] == data
    assert "--run" not in listed
    assert "--out  str | null  [null]" in usage()


def test_no_meaning_of_a_key_begins_at_the_margin() -> None:
    _, told = command.usage("miram finetune", FinetuneConfig).split("keys (items")
    assert [line for line in told.splitlines()[1:] if not line.startswith("  ")] == []


def test_on_the_own_test_differences_are_zero_and_have_no_interval(run: Path, phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    evaluate(str(run), [f"--data.shards={phantoms}", "--data.split=test", f"--out={out}", "--explain=0", QUICK[0]])
    result = json.loads((out / "result.json").read_text())
    assert [(row["value"], row["interval"]) for row in result["differences"]] == [(0, None)] * 3
    gaps = [row[-1] for table in result["tables"] if table["columns"][-1] == "here - own test" for row in table["rows"]]
    assert {(gap["value"], gap["interval"]) for gap in gaps if gap} == {(0, None)}
    assert any("patients of this set are in the run's own test" in note for note in result["notes"])


def test_a_label_of_another_name_is_taken_as_what_the_model_predicts(run: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "calc"
    evaluate(str(run), [f"--data.shards={other}", "--data.task=calc", f"--out={out}", "--explain=0", QUICK[0]])
    result = json.loads((out / "result.json").read_text())
    locked, shards = read_locked(run), ShardDataset(other)
    truth = np.array(shards.rows.column("label_calc"), int)
    p = locked.probabilities(shards, np.arange(len(shards)))[:, 1]
    assert (result["task"], result["value"]) == ("mass", pytest.approx(roc_auc_score(truth, p)))
    assert "The label 'calc' of these images was taken as 'mass'." in result["notes"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("p_1,", "p_malignant,", "predictions.csv is of the classes '0', 'malignant', and the model of '0', '1'"),
        ("decision\n", "decision\n" * 2, "damaged"),
        (None, None, "holds 5 images, and result.json is of 24"),
        (",0,0.", ",7,0.", "a patient is in several folds"),
    ],
)
def test_a_touched_run_is_no_comparison(run: Path, tmp_path: Path, old: str | None, new: str, said: str) -> None:
    for name in ("result.json", "predictions.csv"):
        shutil.copy(run / name, tmp_path / name)
    path = tmp_path / "predictions.csv"
    text = path.read_text()
    path.write_text("".join(text.splitlines(True)[:6]) if old is None else text.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        own_test(tmp_path, read_locked(run).card)


def test_a_result_without_tables_leaves_the_differences(run: Path, other: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    content = json.loads((copy / "result.json").read_text())
    del content["tables"], content["metric"]
    (copy / "result.json").write_text(json.dumps(content))
    folder = evaluate(str(copy), [f"--data.shards={other}", "--explain=0", QUICK[0]]).folder
    result = json.loads((folder / "result.json").read_text())
    assert len(result["differences"]) == 3
    assert not any("own test" in column for table in result["tables"] for column in table["columns"])
