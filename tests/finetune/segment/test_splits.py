"""Who learns, who chooses, who is judged."""

from __future__ import annotations

import numpy as np
import pytest

from miram.engine.errors import UserError
from miram.finetune.segment.splits import inner, outer
from miram.finetune.task import Task


def task(patients: int, positive: int, splits: dict[int, str] | None = None) -> Task:
    """Four images a patient; the first `positive` patients have a finding on one of them."""
    who = np.repeat([f"set/p{i:02}" for i in range(patients)], 4)
    truth = np.array([int(i % 4 == 0 and i // 4 < positive) for i in range(4 * patients)])
    of = np.repeat([(splits or {}).get(i, "") for i in range(patients)], 4)
    return Task("lesions", ("without", "with"), np.arange(4 * patients), truth, who, of)


def test_folds_keep_patients_whole_and_all_are_judged_once_with_findings_everywhere() -> None:
    asked = task(20, 8)
    splits, name = outer(asked, 4, seed=3)
    assert name == "4 folds by patient"
    assert sorted(np.concatenate([rest for _, rest in splits])) == list(range(80))
    for fit, rest in splits:
        assert not {*asked.patients[fit]} & {*asked.patients[rest]}
        assert asked.truth[fit].any()
        assert asked.truth[rest].sum() == 2


def test_data_in_which_every_image_has_a_finding_is_folded_too() -> None:
    asked = task(6, 6)
    asked = Task(asked.name, asked.classes, asked.chosen, np.ones(24, np.int64), asked.patients, asked.splits)
    assert len(outer(asked, 3, seed=0)[0]) == 3


def test_fewer_patients_with_findings_than_folds_are_refused() -> None:
    with pytest.raises(UserError, match=r"findings of 3 patients, fewer than 4 folds; lower segment\.folds"):
        outer(task(20, 3), 4, seed=0)


def test_the_official_split_is_taken_and_its_val_chooses() -> None:
    asked = task(12, 12, {i: ("train", "train", "val", "test")[i % 4] for i in range(12)})
    [(fit, rest)], name = outer(asked, 5, seed=0)
    assert name == "official train and test"
    assert {*asked.splits[fit]} == {"train"}
    assert {*asked.splits[rest]} == {"test"}
    both = np.flatnonzero(asked.splits != "test")
    known, held, how = inner(asked, both, 0.2, seed=0)
    assert how == "the official val patients"
    assert {*asked.splits[known]} == {"train"}
    assert {*asked.splits[held]} == {"val"}


def test_an_official_test_without_a_finding_is_refused() -> None:
    with pytest.raises(UserError, match="no image of split 'test'"):
        outer(task(8, 4, {i: "train" if i < 6 else "test" for i in range(8)}), 5, seed=0)


def test_held_out_patients_choose_and_do_not_learn() -> None:
    asked = task(20, 10)
    fit = np.arange(60)
    known, held, how = inner(asked, fit, 0.2, seed=1)
    assert sorted([*known, *held]) == fit.tolist()
    assert not {*asked.patients[known]} & {*asked.patients[held]}
    assert len(held) == 12
    assert asked.truth[held].any()
    assert how == "12 held-out images"


def test_nobody_is_held_out_where_nothing_is_chosen_or_nobody_can_be_spared() -> None:
    asked, fit = task(20, 10), np.arange(40)
    assert len(inner(asked, fit, None, seed=0)[1]) == 0
    known, held, how = inner(task(20, 1), fit, 0.2, seed=0)
    assert len(known) == 40
    assert len(held) == 0
    assert how == "too few patients to hold some out"
