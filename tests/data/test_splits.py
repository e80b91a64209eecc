"""Splits: whole patients, even classes, nested parts, files that cannot lie."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.model_selection import StratifiedKFold

from miram.data.divide import describe, make_split, patient_classes, shortages
from miram.data.splits import (
    Split,
    check,
    patient_of,
    read_split,
    refuse_shared_patients,
    select_official,
    split_values,
)
from miram.engine.errors import UserError

Row = dict[str, str]
Change = Callable[[dict[str, Any]], object]


def image(patient: str, label: str = "", split: str = "", dataset: str = "a") -> Row:
    return {"key": "k", "dataset": dataset, "patient": patient, "split": split, "label_risk": label}


def cohort(counts: dict[str, int], images: int = 2) -> list[Row]:
    """So many patients of each class, each with so many images."""
    return [image(f"{label}{i:04d}", label) for label, n in counts.items() for i in range(n) for _ in range(images)]


@st.composite
def cohorts(draw: st.DrawFn) -> list[Row]:
    """2 to 40 patients of one or two data sets with 1 to 4 images, each with any label or none, and official splits."""
    labels, splits = st.sampled_from(["", "low", "high", "rare"]), st.sampled_from(["", "train", "test"])
    patients = draw(
        st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 99)), min_size=2, max_size=40, unique=True)
    )
    rows = []
    for dataset, number in patients:
        for label, split in draw(st.lists(st.tuples(labels, splits), min_size=1, max_size=4)):
            rows.append(image(f"p{number}", label, split, dataset))
    return rows


@settings(max_examples=150, deadline=None)
@given(
    cohorts(), st.integers(0, 3), st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([(0, 0.0), (0, 0.2), (2, 0.0)]),
    st.sampled_from([(), (0.1, 0.25), (0.5, 0.1, 0.9)]), st.randoms(),
)  # fmt: skip
def test_every_patient_is_on_one_side_whatever_the_cohort(
    rows: list[Row], seed: int, test: float, held_out: tuple[int, float], fractions: tuple[float, ...], random: object
) -> None:
    folds, val = held_out
    try:
        split = make_split(rows, task="risk", seed=seed, test=test, folds=folds, val=val, fractions=fractions)
    except UserError:  # a fold more than patients to train on
        assert folds
        return
    everyone = {patient_of(row) for row in rows}
    assert sorted(p for part in split.splits.values() for p in part) == sorted(everyone)
    train = split.splits["train"]
    assert train
    if folds:
        assert sorted(p for fold in split.folds for p in fold) == sorted(train)
        assert max(map(len, split.folds)) - min(map(len, split.folds)) <= 1
    parts = [set(split.fractions[f"{f:g}"]) for f in sorted(fractions)] + [set(train)]
    assert all(smaller <= larger for smaller, larger in pairwise(parts))
    classes = patient_classes(rows, "risk")
    kinds = {(p[0], classes[p]) for p in train}
    assert all({(p[0], classes[p]) for p in part} == kinds for part in parts), "a class is missing from a fraction"
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = make_split(shuffled, task="risk", seed=seed, test=test, folds=folds, val=val, fractions=fractions)
    assert again == split


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.sampled_from([0, 2]))
def test_selected_rows_are_those_of_brute_force(rows: list[Row], folds: int) -> None:
    try:
        split = make_split(rows, task="risk", test=0.3, folds=folds, fractions=(0.4,))
    except UserError:
        return
    for name in ("train", "train-0.4", "val", "test"):
        for fold in (None, *range(folds)):
            if name == "val" and fold is None:
                continue
            listed = {"train": split.splits["train"], "train-0.4": split.fractions["0.4"], "test": split.splits["test"]}
            inside = split.folds[fold] if fold is not None else ()
            wanted = [
                i
                for i, row in enumerate(rows)
                if (patient_of(row) in inside if name == "val" else patient_of(row) in listed[name])
                and (name in ("val", "test") or patient_of(row) not in inside)
            ]
            if wanted:
                assert split.select(rows, name, fold) == wanted
            else:
                with pytest.raises(UserError, match="no image"):
                    split.select(rows, name, fold)
    assert split.select(rows, None) == list(range(len(rows)))


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_as_even_as_those_of_scikit_learn(folds: int) -> None:
    rows = cohort({"low": 53, "high": 17, "rare": 6})
    classes = patient_classes(rows, "risk")
    ours = make_split(rows, task="risk", test=0, folds=folds).folds
    truth = np.array(list(classes.values()))
    theirs = [truth[part] for _, part in StratifiedKFold(folds).split(truth, truth)]
    for label in ("low", "high", "rare"):
        assert sorted(sum(classes[p] == label for p in fold) for fold in ours) == sorted(
            int((part == label).sum()) for part in theirs
        )


def test_each_class_gives_its_part() -> None:
    rows = cohort({"low": 80, "high": 20, "": 40})
    split = make_split(rows, task="risk", test=0.25, val=0.25, fractions=(0.1, 0.5))
    classes = patient_classes(rows, "risk")
    counts = {name: Counter(classes[p] for p in patients) for name, patients in split.groups()}
    assert counts["test"] == counts["val"] == {"low": 20, "high": 5, "": 10}
    assert counts["train"] == {"low": 40, "high": 10, "": 20}
    assert counts["train-0.1"] == {"low": 4, "high": 1, "": 2}
    assert counts["train-0.5"] == {"low": 20, "high": 5, "": 10}


def test_another_seed_draws_other_patients_and_a_new_patient_moves_few() -> None:
    rows = cohort({"low": 100})
    first = set(make_split(rows, seed=1).splits["test"])
    assert first != set(make_split(rows, seed=2).splits["test"])
    grown = set(make_split([*rows, image("zz", "low")], seed=1).splits["test"])
    assert len(first ^ grown) <= 2, "an order that follows from each patient alone hardly changes"


def test_a_patient_with_several_labels_counts_as_the_rarest() -> None:
    rows = [*cohort({"benign": 5}), image("x", "benign"), image("x", "malignant"), image("x", ""), image("y", "")]
    classes = patient_classes(rows, "risk")
    assert (classes["a/x"], classes["a/y"], classes["a/benign0000"]) == ("malignant", "", "benign")


def test_a_class_of_one_patient_is_trained_on_and_told() -> None:
    rows = cohort({"low": 20, "single": 1})
    split = make_split(rows, task="risk", test=0.2, folds=2)
    assert "a/single0000" in split.splits["train"]
    (line,) = shortages(split, rows)
    assert line.startswith("class single of risk has 1 patient: none in test, fold ")
    assert not shortages(
        make_split(cohort({"low": 20, "high": 20}), task="risk", folds=2), cohort({"low": 20, "high": 20})
    )


def test_the_official_test_is_kept_and_takes_patients_of_both_sides() -> None:
    rows = [image(f"p{i}", "low", "test" if i < 5 else "train") for i in range(20)]
    rows += [image("p7", "low", "test"), image("p19", "low", "train")]
    split = make_split(rows, task="risk", keep_official=True, folds=3)
    assert set(split.splits["test"]) == {f"a/p{i}" for i in (0, 1, 2, 3, 4, 7)}
    assert len(split.splits["train"]) == 14
    with pytest.raises(UserError, match="data says '', 'trian'"):
        make_split([image("p"), image("q", split="trian")], keep_official=True)


def test_equal_patient_names_of_two_data_sets_are_two_patients() -> None:
    rows = [image(str(i), "low", dataset=d) for i in range(10) for d in "ab"]
    assert sum(map(len, make_split(rows, test=0.5).splits.values())) == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "risks"}, "did you mean 'risk'"),
        ({"test": 1.0}, "less than 1"),
        ({"test": 0.6, "val": 0.4}, "less than 1"),
        ({"folds": 1}, "2 or more"),
        ({"folds": 2, "val": 0.1}, "one of them"),
        ({"folds": 99}, "too few for 99 folds"),
        ({"fractions": (1.5,)}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_split(cohort({"low": 10, "high": 10}), **options)  # type: ignore[arg-type]


def test_rows_without_a_patient_are_refused() -> None:
    with pytest.raises(UserError, match="without a patient"):
        make_split([image("", "low"), image("p", "low")])


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[Row], Split]:
    rows = cohort({"low": 30, "high": 10})
    split = make_split(rows, task="risk", seed=4, test=0.2, folds=4, fractions=(0.1, 0.25))
    split.write(tmp_path / "split.json", "digest of the data")
    return tmp_path / "split.json", rows, split


def test_a_file_reads_back_and_is_plain_json(written: tuple[Path, list[Row], Split]) -> None:
    path, rows, split = written
    content = json.loads(path.read_text())
    assert list(content) == ["schema", "data", "task", "seed", "splits", "folds", "fractions"]
    assert content["splits"]["test"] == list(split.splits["test"])
    again = read_split(path)
    check(again, "digest of the data", rows)
    assert (again.data, again.splits, again.folds, again.fractions) == (
        "digest of the data", split.splits, split.folds, split.fractions,
    )  # fmt: skip
    assert again.names() == ["train", "val", "test", "train-0.1", "train-0.25"]
    assert Counter(again.sides(rows, 1)) == {"train": 48, "val": 16, "test": 16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["splits"]["test"].append(c["splits"]["train"][0]), "listed more than once in splits"),
        (lambda c: c["splits"]["test"].append(c["splits"]["test"][0]), "listed more than once in splits"),
        (lambda c: c["folds"][0].append(c["folds"][1][0]), "listed more than once in folds"),
        (lambda c: c["folds"][0].pop(), "not the patients of train"),
        (lambda c: c["folds"][0].append(c["splits"]["test"][0]), "not the patients of train"),
        (lambda c: c["fractions"]["0.1"].append(c["splits"]["test"][0]), "not in the next larger part"),
        (lambda c: c["splits"].update({"tset": c["splits"].pop("test")}), "train, tset"),
        (lambda c: c.pop("folds"), "folds"),
        (lambda c: c["fractions"].update({"a": 3}), "fractions.a"),
        (lambda c: c["splits"].update({"train": [3]}), "splits.train"),
        (lambda c: c.update({"schema": "other"}), "miram.split/1"),
    ],
)
def test_an_edited_file_is_refused(written: tuple[Path, list[Row], Split], change: Change, words: str) -> None:
    content = json.loads(written[0].read_text())
    change(content)
    written[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_split(written[0])


def test_a_file_of_other_data_is_refused(written: tuple[Path, list[Row], Split]) -> None:
    path, rows, _ = written
    split = read_split(path)
    with pytest.raises(UserError, match="made for other data"):
        check(split, "another digest", rows)
    with pytest.raises(UserError, match=r"1 patient \(a/new\) is in the data, but in none"):
        check(split, "digest of the data", [*rows, image("new")])
    gone = [row for row in rows if patient_of(row) not in split.splits["test"]]
    with pytest.raises(UserError, match=r"8 patients \(.*, …\) are not in the data"):
        check(split, "digest of the data", gone)


def test_a_wrong_name_or_fold_is_refused(written: tuple[Path, list[Row], Split]) -> None:
    _, rows, split = written
    for name, fold, words in (
        ("trian", None, "did you mean 'train'"),
        ("val", None, "data.fold"),
        ("train", 4, "4 folds"),
    ):
        with pytest.raises(UserError, match=words):
            split.select(rows, name, fold)


def test_patients_in_two_official_splits_are_refused() -> None:
    rows = [image(f"p{i}", split=split) for i in range(5) for split in ("train", "test")] + [image("q", split="train")]
    with pytest.raises(
        UserError, match=r"5 patients \(a/p0, a/p1, a/p2, …\).*\(test and train\).*data split"
    ) as caught:
        refuse_shared_patients(rows, "shards/x")
    assert "a/p3" not in str(caught.value)
    refuse_shared_patients([image("p", split="train"), image("p"), image("p", split="test", dataset="b")], "shards/x")


def test_a_misspelt_official_split_is_refused_not_emptied() -> None:
    rows = [image("p", split="train"), image("q", split="test"), image("r"), image("s", dataset="b")]
    assert split_values(rows) == {"": 2, "test": 1, "train": 1}
    assert select_official(rows, "train", "x") == [0, 3], "without a split beside rows that have one: on no side"
    assert select_official(rows, None, "x") == [0, 1, 2, 3]
    assert select_official([image("r")], "train", "x") == [0]
    with pytest.raises(UserError, match="did you mean 'train'"):
        select_official(rows, "trian", "x")


def test_the_table_counts_patients_images_and_classes() -> None:
    rows = cohort({"low": 8, "high": 4}, images=3)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(describe(make_split(rows, task="risk", test=0.25, folds=3), rows))
    lines = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    cells = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines}
    assert cells["train"] == ["9", "27", "3", "6"]
    assert cells["test"] == ["3", "9", "1", "2"]
    assert cells["fold 0"] == ["3", "9", "1", "2"]
