"""The panel of every kind of task: names, one figure against its own function, samples against one by one."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sk

from miram.engine.metrics import Kind, bootstrap_scores, chance, estimates, headline, panel, patient_bootstrap, score
from miram.engine.metrics import panel as package_panel  # the function, not the module of this name
from miram.engine.metrics.calibration import probabilities
from miram.engine.metrics.ranking import auc

KINDS: tuple[Kind, ...] = get_args(Kind)
Array = NDArray[np.float64]
Made = tuple[NDArray[np.int64], Array, NDArray[np.int64]]


def made_up(kind: Kind, m: int = 120, seed: int = 0) -> Made:
    """Truth, probabilities rounded so that they tie, decisions."""
    rng, width = np.random.default_rng(seed), {"binary": 2, "ordinal": 2}.get(kind, 3)
    p = probabilities(kind, rng.normal(size=(m, width))).round(2)
    truth = rng.integers(0, 2, p.shape) if kind == "multilabel" else rng.integers(0, p.shape[1], m)
    return truth, p, (p > 0.4).astype(int) if kind == "multilabel" else p.argmax(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_headline_leads_and_is_the_score(kind: Kind) -> None:
    truth, p, decided = made_up(kind)
    if kind == "ordinal":
        decided = (np.cumsum(p, axis=1)[:, :-1] < 0.5).sum(1)
    figures = panel(kind, truth, p, decided, np.ones((1, 120)))
    if kind != "multiclass":
        assert next(iter(figures)) == headline(kind)
    assert figures[headline(kind)][0] == pytest.approx(score(headline(kind), truth, p))


@pytest.mark.parametrize("kind", KINDS)
def test_areas_are_those_within_folds(kind: Kind) -> None:
    truth, p, decided = made_up(kind)
    fold, once = np.arange(120) % 3, np.ones((1, 120))
    found = panel(kind, truth, p, decided, once, fold)
    columns = truth if kind == "multilabel" else np.eye(p.shape[1], dtype=int)[truth]
    within = [auc(t, s, once, fold)[0] for t, s in zip(columns.T, p.T, strict=True)]
    name = "AUC" if "AUC" in found else "AUC, one against the rest"
    assert found[name][0] == pytest.approx(within[1] if kind == "binary" else np.mean(within))
    assert abs(found[name] - panel(kind, truth, p, decided, once)[name]) > 1e-4
    if headline(kind) == "AUC":
        assert score("AUC", truth, p, groups=fold) == pytest.approx(found[name][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bootstrap_sample_is_the_panel_of_its_repeated_cases(kind: Kind) -> None:
    """Every figure, in every sample, however the samples are cut up for the memory."""
    truth, p, decided = made_up(kind)
    fold = np.arange(120) % 3
    weights = patient_bootstrap(truth, (np.arange(120) // 4).astype(str), 25, seed=0)
    together = panel(kind, truth, p, decided, weights, fold)
    for sample, times in enumerate(weights.astype(int)):
        again = np.repeat(np.arange(120), times)
        alone = panel(kind, truth[again], p[again], decided[again], np.ones((1, len(again))), fold[again])
        assert list(alone) == list(together)
        for name, value in alone.items():
            assert together[name][sample] == pytest.approx(value[0], abs=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_figures_do_not_depend_on_how_many_samples_are_worked_on_at_a_time(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, p, decided = made_up(kind)
    weights = patient_bootstrap(truth, (np.arange(120) // 4).astype(str), 25, seed=0)
    at_once = panel(kind, truth, p, decided, weights)
    monkeypatch.setitem(package_panel.__globals__, "AT_ONCE", 300)
    for name, samples in panel(kind, truth, p, decided, weights).items():
        np.testing.assert_allclose(samples, at_once[name], atol=1e-13)


def test_figures_of_two_classes_are_known_ones_under_their_names() -> None:
    truth, p, decided = made_up("binary")
    figures = {name: value[0] for name, value in panel("binary", truth, p, decided, np.ones((1, 120))).items()}
    expected = {
        "AUC": sk.roc_auc_score(truth, p[:, 1]),
        "AP": sk.average_precision_score(truth, p[:, 1]),
        "pAUC (FPR <= 0.1)": sk.roc_auc_score(truth, p[:, 1], max_fpr=0.1),
        "sensitivity": sk.recall_score(truth, decided),
        "specificity": sk.recall_score(truth, decided, pos_label=0),
        "balanced accuracy": sk.balanced_accuracy_score(truth, decided),
        "accuracy": sk.accuracy_score(truth, decided),
        "F1": sk.f1_score(truth, decided),
        "kappa": sk.cohen_kappa_score(truth, decided),
        "Brier": sk.brier_score_loss(truth, p[:, 1]),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    fpr, tpr, _ = sk.roc_curve(truth, p[:, 1], drop_intermediate=False)
    assert figures["sensitivity at 90 % specificity"] == pytest.approx(tpr[fpr <= 0.1 + 1e-9].max())
    assert figures["sensitivity at 95 % specificity"] == pytest.approx(tpr[fpr <= 0.05 + 1e-9].max())
    assert figures["specificity at 90 % sensitivity"] == pytest.approx(1 - fpr[tpr >= 0.9 - 1e-9].min())


def test_figures_of_several_classes_are_known_ones_under_their_names() -> None:
    truth, p, decided = made_up("ordinal")
    p = p / p.sum(1, keepdims=True)
    figures = {name: value[0] for name, value in panel("ordinal", truth, p, decided, np.ones((1, 120))).items()}
    expected = {
        "quadratic kappa": sk.cohen_kappa_score(truth, decided, weights="quadratic"),
        "linear kappa": sk.cohen_kappa_score(truth, decided, weights="linear"),
        "kappa": sk.cohen_kappa_score(truth, decided),
        "balanced accuracy": sk.balanced_accuracy_score(truth, decided),
        "macro F1": sk.f1_score(truth, decided, average="macro"),
        "AUC, one against the rest": sk.roc_auc_score(truth, p, multi_class="ovr"),
        "log loss": sk.log_loss(truth, p),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert set(panel("multiclass", truth, p, decided, np.ones((1, 120)))) == set(figures) - {
        "quadratic kappa",
        "linear kappa",
    }


def test_figures_of_labels_are_means_over_those_that_have_both_answers() -> None:
    truth, p, decided = made_up("multilabel")
    truth[:, 2] = 0
    figures = {name: value[0] for name, value in panel("multilabel", truth, p, decided, np.ones((1, 120))).items()}
    assert figures["AUC"] == pytest.approx(np.mean([sk.roc_auc_score(truth[:, j], p[:, j]) for j in range(2)]))
    assert figures["AUC"] == pytest.approx(score("AUC", truth, p))
    assert figures["F1"] == pytest.approx(np.mean([sk.f1_score(truth[:, j], decided[:, j]) for j in range(2)]))


def test_the_median_and_not_the_mode_is_judged_in_ordinal_tasks() -> None:
    truth, p = np.array([0, 1, 2]), np.array([[0.6, 0.2, 0.2], [0.4, 0.15, 0.45], [0.1, 0.2, 0.7]])
    assert score("quadratic kappa", truth, p) == 1
    assert bootstrap_scores("quadratic kappa", truth, p, np.ones((2, 3))).tolist() == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_hold_the_figure_and_the_interval_of_its_samples(kind: Kind) -> None:
    truth, p, decided = made_up(kind)
    fold = np.arange(120) % 2
    weights = patient_bootstrap(truth, (np.arange(120) // 3).astype(str), 200, seed=1)
    samples = panel(kind, truth, p, decided, weights, fold)
    for name, estimate in estimates(kind, truth, p, decided, weights, fold).items():
        assert estimate.interval == pytest.approx(np.percentile(samples[name], [2.5, 97.5])), name
        assert estimate.interval[0] <= estimate.value <= estimate.interval[1] or name == "ECE"  # ECE is biased upward


def test_a_group_of_one_class_has_an_accuracy_and_no_auc() -> None:
    truth, p, decided = made_up("binary")
    found = estimates("binary", np.zeros_like(truth), p, decided, np.ones((5, 120)))
    told = {name for name, estimate in found.items() if not np.isnan(estimate.value)}
    assert told == {"specificity", "accuracy", "kappa", "Brier", "log loss", "ECE"}
    assert all(np.isnan(found["AUC"].interval))


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_what_the_most_frequent_class_scores(kind: Kind) -> None:
    truth, p, _ = made_up(kind)
    always = np.broadcast_to(np.eye(p.shape[1])[0], p.shape)
    assert score(headline(kind), truth, always) == pytest.approx(chance(headline(kind), p.shape[1]))
