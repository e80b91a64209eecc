"""Nested cross-validation, with an approach that does nothing but take down what it was shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benches import bench

from miram.engine.errors import RunFailed
from miram.engine.track import Meter
from miram.finetune.classify.bench import Bench
from miram.finetune.classify.labels import Labelled
from miram.finetune.classify.search import Candidate, Nested, Search, choose, inner_folds

N, PATIENTS = 120, 40


@dataclass
class Noted:
    """Says what is true as clearly as the value is near 0.01, and notes which images it was trained and asked on."""

    bench: Bench
    values: tuple[float, ...] = (0.001, 0.01, 0.1)
    knob: str = "learning rate"
    made: list[tuple[float, np.ndarray[Any, Any], int]] = field(default_factory=list)
    asked: list[np.ndarray[Any, Any]] = field(default_factory=list)
    broken: bool = False

    def make(self, images: Any, value: float, place: Path, seed: int, held: Any = None) -> float:
        self.made.append((value, images, seed))
        return value

    def logits(self, model: float, images: Any) -> Any:
        self.asked.append(images)
        truth = self.bench.labelled.truth[images]
        noise = np.random.default_rng(7).normal(scale=2, size=N)[images]
        clear = 2.0 if model == 0.01 else 0.3
        score = clear * (2 * truth - 1) + noise
        return np.full((len(images), 2), np.nan) if self.broken else np.stack([-score, score], 1) * 3

    def cost(self, model: float) -> Mapping[str, Any]:
        return {"trainable": 1, "head": 1, "adapter_bytes": 4}


def search(phantoms: Path, out: Path, splits: Any = "", truth: Any = None, **finetune: Any) -> Search:
    """120 images of 40 patients, three each, who have one class."""
    made = bench(phantoms, out, **finetune)
    patients = np.repeat(np.arange(PATIENTS), 3)
    truth = np.asarray(patients % 2 if truth is None else truth)
    names = np.array([f"made up/{p}" for p in patients])
    splits = np.broadcast_to(np.asarray(splits), N)
    keys = np.array([f"k{i}" for i in range(N)])
    labelled = Labelled(made.labelled.target, np.arange(N), truth, names, names, keys, splits, {})
    made = replace(made, labelled=labelled)
    return Search(made, Noted(made), Meter("trainings", 100))


def patients_of(search_: Search, images: Any) -> set[str]:
    return set(search_.bench.labelled.patients[images].tolist())


FIT, REST = np.arange(90), np.arange(90, 120)


def run(search_: Search, place: Path, **options: Any) -> Nested:
    return search_.nested(FIT, REST, place, **options)


def test_every_candidate_gets_every_inner_fold_and_the_chosen_one_all_of_it(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path, search={"folds": 3})
    found = run(one, tmp_path / "outer-0")
    approach: Noted = one.approach
    assert [value for value, _, _ in approach.made] == [0.001] * 3 + [0.01] * 3 + [0.1] * 3 + [0.01]
    assert found.value == 0.01
    assert sorted(approach.made[-1][1]) == list(FIT)
    for value in (0.001, 0.01, 0.1):
        held = [asked for (v, _, _), asked in zip(approach.made[:9], approach.asked[:9], strict=True) if v == value]
        assert sorted(np.concatenate(held)) == list(FIT), "an image was not held out exactly once"


def test_no_training_sees_a_patient_that_is_asked_about(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path)
    run(one, tmp_path / "outer-0")
    for (_, known, _), asked in zip(one.approach.made, one.approach.asked, strict=True):
        assert not patients_of(one, known) & patients_of(one, asked)


def test_candidates_and_methods_get_the_same_seeds_and_outer_folds_others(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path)
    run(one, tmp_path / "outer-0")
    run(one, tmp_path / "outer-1")
    seeds = [seed for _, _, seed in one.approach.made]
    assert len(set(seeds[:10])) == len(set(seeds[10:])) == 1
    assert seeds[0] != seeds[-1]
    other = search(phantoms, tmp_path / "b", method="full")
    run(other, tmp_path / "b" / "outer-0")
    assert other.approach.made[0][2] == seeds[0]


def test_what_is_true_of_judged_images_changes_nothing_that_is_chosen(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path)
    found = run(one, tmp_path / "a")
    flipped = one.bench.labelled.truth.copy()
    flipped[REST] = 1 - flipped[REST]
    other = search(phantoms, tmp_path, truth=flipped)
    again = run(other, tmp_path / "b" / "a")
    assert (again.value, again.temperature, again.thresholds) == (found.value, found.temperature, found.thresholds)
    assert again.candidates == found.candidates
    assert not np.array_equal(again.logits, found.logits)


def test_threshold_and_temperature_are_those_of_held_out_images(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path)
    found = run(one, tmp_path / "a")
    target, held = one.bench.labelled.target, np.arange(90)
    logits = one.approach.logits(0.01, held)
    truth = one.bench.labelled.truth[held]

    def loss(t: float) -> float:
        return float(-np.log(target.probabilities(logits, t)[held, truth]).mean())

    grid = np.geomspace(0.1, 20, 4000)
    assert found.temperature == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=0.01)
    positive = target.probabilities(logits, found.temperature)[:, 1]
    decided = positive >= found.thresholds["image"][0]
    youden = decided[truth == 1].mean() - decided[truth == 0].mean()
    best = max((positive >= p)[truth == 1].mean() - (positive >= p)[truth == 0].mean() for p in positive)
    assert youden == pytest.approx(best)


def test_what_was_trained_is_not_trained_again(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path)
    found = run(one, tmp_path / "a")
    one.approach.made.clear()
    again = run(one, tmp_path / "a")
    assert not one.approach.made
    assert np.array_equal(again.logits, found.logits)
    assert (again.value, again.temperature, again.model) == (found.value, found.temperature, None)
    assert len(again.trainings) == 10
    assert run(one, tmp_path / "a", keep=True).model == 0.01
    assert len(one.approach.made) == 1


def test_a_training_that_was_cut_short_is_taken_up(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path)
    run(one, tmp_path / "a")
    one.approach.made.clear()
    (tmp_path / "a" / "inner-1" / "learning-rate-0.1" / "training.json").unlink()
    run(one, tmp_path / "a")
    assert [value for value, _, _ in one.approach.made] == [0.1]


def test_one_fold_holds_a_part_out_and_its_model_is_the_one_that_judges(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path, search={"folds": 1, "holdout": 0.3})
    found = run(one, tmp_path / "a")
    approach: Noted = one.approach
    assert len(approach.made) == 4
    assert len({tuple(sorted(known)) for _, known, _ in approach.made}) == 1
    share = len(patients_of(one, approach.asked[0])) / len(patients_of(one, FIT))
    assert 0.25 < share < 0.4
    assert found.inner.startswith("one held-out part")


def test_the_official_val_patients_choose_where_there_are_some(phantoms: Path, tmp_path: Path) -> None:
    splits = np.array(["train"] * 60 + ["val"] * 30 + ["test"] * 30)
    one = search(phantoms, tmp_path, splits)
    found = run(one, tmp_path / "a")
    assert [sorted(asked) for asked in one.approach.asked[:3]] == [list(range(60, 90))] * 3
    assert sorted(one.approach.made[-1][1]) == list(FIT), "the chosen one is trained on both"
    assert found.inner == "the official val patients"


def test_a_val_of_one_class_or_without_a_test_does_not_choose(phantoms: Path, tmp_path: Path) -> None:
    single = np.array(["train"] * 87 + ["val"] * 3 + ["test"] * 30)
    assert inner_folds(search(phantoms, tmp_path, single).bench, FIT)[1] == "3 inner folds by patient"
    no_test = np.array(["train"] * 60 + ["val"] * 60)
    assert inner_folds(search(phantoms, tmp_path, no_test).bench, FIT)[1] == "3 inner folds by patient"


def test_classes_that_share_their_patients_make_fewer_folds_and_no_fault(phantoms: Path, tmp_path: Path) -> None:
    """Three patients, each with images of several classes: no division keeps all of them in what is trained on."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        truth = rng.integers(0, 4, N)
        truth[:4] = np.arange(4)
        one = search(phantoms, tmp_path, truth=truth)
        target = replace(one.bench.labelled.target, kind="multiclass", classes=tuple("abcd"))
        made = replace(one.bench, labelled=replace(one.bench.labelled, target=target))
        fit = np.arange(3 * (2 + seed % 4))
        pairs, said = inner_folds(made, fit)
        assert said
        for known, held in pairs:
            assert not set(made.labelled.patients[known]) & set(made.labelled.patients[held])


def test_few_patients_make_fewer_folds_and_one_alone_no_choice(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path, search={"folds": 5})
    two_each, single = np.arange(12), np.arange(6)
    assert "2 inner folds by patient, fewer than 5" in inner_folds(one.bench, two_each)[1]
    pairs, why = inner_folds(one.bench, single)
    assert pairs == []
    assert "too few patients" in why
    found = one.nested(single, REST, tmp_path / "a")
    assert (found.value, found.temperature, found.thresholds["patient"]) == (0.01, 1.0, (0.5,))


def test_a_class_of_one_patient_does_not_stop_the_others_from_choosing(phantoms: Path, tmp_path: Path) -> None:
    truth = np.repeat(np.arange(PATIENTS), 3) % 2
    truth[:3] = 2
    one = search(phantoms, tmp_path, truth=truth)
    target = replace(one.bench.labelled.target, kind="multiclass", classes=("a", "b", "c"))
    one = replace(one, bench=replace(one.bench, labelled=replace(one.bench.labelled, target=target)))
    pairs, _ = inner_folds(one.bench, FIT)
    assert len(pairs) == 3
    assert sorted(np.concatenate([held for _, held in pairs])) == list(FIT)


def test_the_best_mean_wins_of_equals_the_mildest_and_without_any_score_the_middle() -> None:
    nan = float("nan")
    assert choose([Candidate(1, (0.5, 0.7)), Candidate(2, (0.9, 0.5)), Candidate(3, (0.6, nan))]) == 1
    assert choose([Candidate(1, (0.5,)), Candidate(2, (0.7,)), Candidate(3, (0.7,))]) == 1
    assert choose([Candidate(1, (nan,)), Candidate(2, (nan,)), Candidate(3, (nan,))]) == 1


def test_logits_that_are_no_numbers_stop_the_run(phantoms: Path, tmp_path: Path) -> None:
    one = search(phantoms, tmp_path)
    one.approach.broken = True
    with pytest.raises(RunFailed, match=r"inner-0.*not finite; lower finetune.search.lrs"):
        run(one, tmp_path / "a")
