"""predictions.csv: what is written is read, to the last bit."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from made_up_judged import folds_of, judge, labelled, population

from miram.engine.errors import UserError
from miram.engine.metrics import Kind
from miram.finetune.classify.config import ReadoutSection
from miram.finetune.classify.predictions import read_predictions, write_predictions


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal", "multilabel"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: Kind) -> None:
    of, logits = population(kind, 12, 0)
    judged = judge(of, logits, folds_of(of, 3), temperature=1.3)
    write_predictions(tmp_path / "predictions.csv", judged)
    found = read_predictions(tmp_path / "predictions.csv")
    assert found.classes == of.target.classes
    np.testing.assert_array_equal(found.keys, of.keys)
    np.testing.assert_array_equal(found.patients, of.patients)
    np.testing.assert_array_equal(found.breasts, of.breasts)
    np.testing.assert_array_equal(found.fold, judged.fold)
    np.testing.assert_array_equal(found.logits, judged.logits)
    np.testing.assert_array_equal(found.probabilities, judged.probabilities)
    np.testing.assert_array_equal(found.coded(found.truth, kind), of.truth)
    decided = judged.decided(judged.cases("image", ReadoutSection()))
    np.testing.assert_array_equal(found.coded(found.decisions, kind), decided)


def test_labels_of_an_image_are_joined_and_an_image_may_have_none(tmp_path: Path) -> None:
    of = labelled("multilabel", [[1, 0, 1], [0, 0, 0]], ["a", "b"])
    write_predictions(tmp_path / "p.csv", judge(of, [[1.0, 2.0, -1.0], [-1.0, -1.0, -1.0]]))
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["truth"], row["decision"]) for row in rows] == [("mass|nodes", "mass|calc"), ("", "")]
    assert list(rows[0])[:5] == ["key", "patient", "breast", "truth", "fold"]


def test_some_judged_images_of_many_are_named_rightly(tmp_path: Path) -> None:
    of, logits = population("binary", 3, 0)
    judged = judge(of, logits)
    which = np.array([7, 2])
    part = type(judged)(of, which, logits[which], np.zeros(2, int), judged.temperatures, judged.thresholds)
    write_predictions(tmp_path / "p.csv", part)
    found = read_predictions(tmp_path / "p.csv")
    assert found.keys.tolist() == ["key-7", "key-2"]
    assert found.patients.tolist() == ["one/p001", "one/p000"]


@pytest.mark.parametrize(
    "content", ["", "key,patient\n", "a,b\n1,2\n", "key,patient,breast,truth,fold,p_0,logit_0,decision\n1,2\n", "\0"]
)
def test_damage_is_said_in_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=r"p\.csv is damaged or of another version"):
        read_predictions(tmp_path / "p.csv")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p\.csv is not there"):
        read_predictions(tmp_path / "p.csv")


def test_the_task_is_read_back_with_its_own_separator_and_with_another_refused(tmp_path: Path) -> None:
    of, logits = population("multilabel", 12, 0)
    write_predictions(tmp_path / "p.csv", judge(of, logits), ";")
    found = read_predictions(tmp_path / "p.csv")
    back = found.labelled("task", "multilabel", ";")
    assert back.target == of.target
    np.testing.assert_array_equal(back.truth, of.truth)
    np.testing.assert_array_equal(back.breasts, of.breasts)
    with pytest.raises(UserError, match=r"names '.*;.*', and its classes are 'mass', 'calc', 'nodes'"):
        found.labelled("task", "multilabel")


@pytest.mark.parametrize(
    ("rows", "said"),
    [("k,d/1,d/1/L,0,0,nan,0.5,1,0\n", "not finite"), ("k,d/1,b,0,0,1,0,1,0\nl,d/1,b,0,1,1,0,1,0\n", "several folds")],
)
def test_numbers_that_no_run_says_are_damage(tmp_path: Path, rows: str, said: str) -> None:
    (tmp_path / "p.csv").write_text(f"key,patient,breast,truth,fold,p_0,p_1,logit_0,decision\n{rows}")
    with pytest.raises(UserError, match=said):
        read_predictions(tmp_path / "p.csv")
