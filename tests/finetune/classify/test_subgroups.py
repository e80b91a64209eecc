"""Subgroup tables: against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_up_judged import binary_logits, judge, labelled, population, rows, section

from miram.data.table import Rows
from miram.engine.errors import UserError
from miram.finetune.classify.judged import Judged
from miram.finetune.classify.judging import figures_of
from miram.finetune.classify.subgroups import age_group, check_subgroups, groupings, in_order


def tables(judged: Judged, index: Rows, **settings: Any) -> dict[str, dict[str, Any]]:
    found = figures_of(judged, index, section(**settings), 0)["tables"]
    return {table["title"]: table for table in found if table["title"].startswith("By ")}


def values(row: list[Any]) -> list[Any]:
    return [cell["value"] if isinstance(cell, dict) else cell for cell in row]


def test_a_table_by_view_is_the_one_worked_out_by_hand() -> None:
    """CC: 3 of 4 pairs in order, 1 of 2 found, 2 of 2 passed. MLO: one class. No view: one pair, the wrong way."""
    truth = [1, 1, 0, 0, 1, 1, 0, 1]
    scores = [0.9, 0.3, 0.4, 0.1, 0.8, 0.2, 0.7, 0.6]
    views = ["CC", "CC", "CC", "CC", "MLO", "MLO", "", ""]
    of = labelled("binary", truth, ["a", "b", "c", "d", "e", "e", "f", "g"])
    found = tables(judge(of, binary_logits(scores)), rows(8, view=views))["By view (images)"]
    assert found["columns"] == ["view", "cases", "task = 1", "patients", "AUC", "sensitivity", "specificity"]
    assert [values(row) for row in found["rows"]] == [
        ["CC", 4, 2, 4, 0.75, 0.5, 1.0],
        ["MLO", 2, 2, 1, "cannot be computed", 0.5, "cannot be computed"],
        ["not stated", 2, 1, 2, 0.0, 1.0, 0.0],
    ]


def test_what_does_not_divide_is_no_table_nor_is_the_task_itself() -> None:
    of = labelled("binary", [0, 1, 0, 1], ["a", "b", "c", "d"])
    of = type(of)(type(of.target)("density", "binary", ("0", "1")), *list(vars(of).values())[1:])
    index = rows(
        4, view=["CC"] * 4, laterality=["", "L", "", ""], label_density=["0", "1", "0", "1"], site=["1", "2"] * 2
    )
    assert list(tables(judge(of, binary_logits([0.1, 0.9, 0.3, 0.6])), index)) == ["By site (images)"]


def test_a_column_divides_the_coarsest_level_on_which_images_agree() -> None:
    of, logits = population("binary", 6, 0)
    columns = {
        "view": ["CC", "MLO"] * 12,
        "laterality": ["L", "L", "R", "R"] * 6,
        "label_age": np.repeat(["40", "50", "60", "40", "71", "39"], 4).tolist(),
    }
    titles = list(tables(judge(of, logits), rows(24, **columns), headline="patient"))
    assert titles == ["By view (images)", "By laterality (breasts)", "By age (patients)"]
    assert list(tables(judge(of, logits), rows(24, **columns), headline="image"))[-1] == "By age (images)"


def test_columns_that_are_named_are_reported_whether_label_or_column() -> None:
    of, logits = population("binary", 4, 0)
    index = rows(16, bits=["8", "16"] * 8, label_implant=["0", "1"] * 8)
    found = tables(judge(of, logits), index, subgroups=("bits", "implant"))
    assert list(found) == ["By bits (images)", "By implant (images)"]
    assert [row[0] for row in found["By bits (images)"]["rows"]] == ["8", "16"]


def test_a_name_that_the_data_lacks_is_refused_before_training_and_passed_over_afterwards() -> None:
    of, logits = population("binary", 4, 0)
    index = rows(16, label_implant=["0", "1"] * 8)
    with pytest.raises(UserError, match="no column or label 'implants'; did you mean 'implant'"):
        check_subgroups(index, ("implants",))
    check_subgroups(index, ("implant",))
    assert tables(judge(of, logits), index, subgroups=("implants",)) == {}


def test_rows_of_the_index_are_those_of_the_labelled_images() -> None:
    """The labelled images are the rows 1 and 3 of the index."""
    index = rows(4, site=["x", "1", "x", "2"])
    assert groupings(index, np.array([1, 3]), (), "task")["site"].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("age", "group"),
    [
        ("39", "< 40"),
        ("40", "40-49"),
        ("047Y", "40-49"),
        ("50-59", "50-59"),
        ("69.5", "60-69"),
        ("80+", ">= 70"),
        ("old", "old"),
    ],
)
def test_ages_and_decades_fall_into_bins(age: str, group: str) -> None:
    assert age_group(age) == group


def test_groups_stand_in_the_order_of_their_numbers_and_only_the_largest_are_shown() -> None:
    ages = np.array([">= 70", "not stated", "40-49", "< 40", "60-69"])
    assert in_order(ages) == (["< 40", "40-49", "60-69", ">= 70", "not stated"], 0)
    assert in_order(np.array(["10", "9", "1"]))[0] == ["1", "9", "10"]
    names, more = in_order(np.repeat([f"{i}" for i in range(30)], np.arange(1, 31)))
    assert (names, more) == ([f"{i}" for i in range(10, 30)], 10)


def test_a_group_s_interval_is_of_its_own_patients() -> None:
    """In the second group every patient is decided rightly: nothing can vary there, whatever the others do."""
    of, logits = population("binary", 40, 2)
    second = np.repeat(np.arange(40) % 2 == 1, 4)
    sure = np.where(second[:, None], 9.0 * (np.eye(2)[of.truth] * 2 - 1), logits)
    index = rows(160, site=np.where(second, "2", "1").tolist())
    first, exact = tables(judge(of, sure), index)["By site (images)"]["rows"]
    assert exact[4] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert first[4]["interval"][1] - first[4]["interval"][0] > 0.05


@pytest.mark.parametrize("kind", ["multiclass", "ordinal", "multilabel"])
def test_other_kinds_are_reported_by_their_leading_figure(kind: Any) -> None:
    of, logits = population(kind, 20, 0)
    [found] = tables(judge(of, logits), rows(80, view=["CC", "MLO"] * 40)).values()
    name = {"multiclass": "balanced accuracy", "ordinal": "quadratic kappa", "multilabel": "AUC"}[kind]
    assert found["columns"] == ["view", "cases", "patients", name]
    assert all(0 < row[3]["value"] < 1 for row in found["rows"])


def test_a_group_of_one_class_has_no_balanced_accuracy() -> None:
    of, logits = population("multiclass", 20, 0)
    index = rows(80, site=np.where(of.truth == 0, "1", "2").tolist())
    one, two = tables(judge(of, logits), index)["By site (images)"]["rows"]
    assert one[3] == "cannot be computed"
    assert two[3]["value"] > 0
