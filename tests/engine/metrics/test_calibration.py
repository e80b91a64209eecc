"""Probabilities against torch, temperatures recovered from labels drawn at a known one, calibration by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sk

from miram.engine.metrics import Kind
from miram.engine.metrics.calibration import brier, ece, fit_temperature, log_loss, probabilities

Array = NDArray[np.float64]
KINDS: tuple[Kind, ...] = get_args(Kind)
WIDTH: dict[Kind, int] = {"binary": 2, "multiclass": 4, "ordinal": 3, "multilabel": 3}


def drawn(kind: Kind, p: Array, seed: int = 0) -> NDArray[np.int64]:
    """Truth at random by the probabilities."""
    rng = np.random.default_rng(seed)
    if kind == "multilabel":
        return (rng.random(p.shape) < p).astype(int)
    return (rng.random((len(p), 1)) > np.cumsum(p, axis=1)[:, :-1]).sum(1)


def test_probabilities_are_softmax_and_sigmoids() -> None:
    z = np.random.default_rng(0).normal(scale=3, size=(50, 4))
    tensor = torch.from_numpy(z) / 1.7
    np.testing.assert_allclose(probabilities("multiclass", z, 1.7), tensor.softmax(1), atol=1e-14)
    np.testing.assert_allclose(probabilities("binary", z[:, :2], 1.7), tensor[:, :2].softmax(1), atol=1e-14)
    np.testing.assert_allclose(probabilities("multilabel", z, 1.7), tensor.sigmoid(), atol=1e-14)


def test_ordinal_probabilities_are_differences_of_cumulative_products() -> None:
    z = np.random.default_rng(0).normal(scale=3, size=(50, 3))
    above = torch.from_numpy(z).sigmoid().cumprod(1).numpy()  # P(y > 0), P(y > 1), P(y > 2)
    bounds = np.concatenate([np.ones((50, 1)), above, np.zeros((50, 1))], axis=1)
    classes = -np.diff(bounds, axis=1)
    np.testing.assert_allclose(probabilities("ordinal", z), classes, atol=1e-14)
    hot = classes ** (1 / 1.7)
    np.testing.assert_allclose(probabilities("ordinal", z, 1.7), hot / hot.sum(1, keepdims=True), atol=1e-12)


def test_a_great_temperature_makes_all_answers_alike() -> None:
    """On an ordered scale, too: nothing sinks towards the lowest class."""
    for kind in KINDS:
        z = np.random.default_rng(9).normal(scale=3, size=(50, WIDTH[kind]))
        p = probabilities(kind, z, 1e6)
        np.testing.assert_allclose(p, 0.5 if kind == "multilabel" else 1 / p.shape[1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_neither_overflow_nor_lose_a_row_s_sum(kind: Kind) -> None:
    z = np.random.default_rng(1).choice([-1e4, -800.0, 0, 800, 1e4], size=(200, WIDTH[kind])).astype(np.float32)
    with np.errstate(over="raise", invalid="raise"):
        p = probabilities(kind, z)
    assert p.dtype == np.float64
    assert ((p >= 0) & (p <= 1)).all()
    if kind != "multilabel":
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [0.01, 0.5, 1.0, 3.0])
def test_a_known_temperature_is_found_again(kind: Kind, known: float) -> None:
    """Truth is drawn at logits / T; 20,000 cases leave an error of about 1 %."""
    if kind == "ordinal" and known < 0.1:
        pytest.skip("its logits have a scale of their own, which 0.01 makes certainties of")
    spread = 1.5 if kind == "ordinal" else 1.5 * known
    z = np.random.default_rng(2).normal(scale=spread, size=(20_000, WIDTH[kind])).astype(np.float32)
    truth = drawn(kind, probabilities(kind, z, known))
    assert fit_temperature(kind, z, truth) == pytest.approx(known, rel=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_temperature_has_a_smaller_log_loss(kind: Kind) -> None:
    z = np.random.default_rng(3).normal(scale=2, size=(60, WIDTH[kind]))
    truth = drawn(kind, probabilities(kind, z, 2.5))
    found, once = fit_temperature(kind, z, truth), np.ones((1, 60))
    best = log_loss(kind, truth, probabilities(kind, z, found), once)
    for other in found * np.array([0.3, 0.9, 0.99, 1.01, 1.1, 3]):
        assert log_loss(kind, truth, probabilities(kind, z, other), once) > best


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_mends_the_calibration_of_overconfident_logits(kind: Kind) -> None:
    z = np.random.default_rng(4).normal(scale=4, size=(4000, WIDTH[kind]))
    truth, once = drawn(kind, probabilities(kind, z, 4)), np.ones((1, 4000))
    before, after = (ece(kind, truth, probabilities(kind, z, t), once)[0] for t in (1, fit_temperature(kind, z, truth)))
    assert after < 0.04 < 0.1 < before


def test_where_no_temperature_can_be_told_it_is_one() -> None:
    z = np.random.default_rng(5).normal(size=(30, 2))
    assert fit_temperature("binary", z, np.zeros(30, int)) == 1  # one class
    assert fit_temperature("binary", np.ones((30, 2)), np.arange(30) % 2) == 1  # logits say nothing
    assert fit_temperature("binary", z, z.argmax(1)) == 1  # every case is right: the smaller T, the better
    assert fit_temperature("multilabel", z, (z > 0).astype(int)) == 1
    assert fit_temperature("ordinal", z, probabilities("ordinal", z).argmax(1)) == 1
    assert fit_temperature("binary", np.empty((0, 2)), np.empty(0, int)) == 1


def test_logits_that_say_the_contrary_are_all_but_silenced() -> None:
    z = np.random.default_rng(6).normal(size=(200, 2))
    found = fit_temperature("binary", z, z.argmin(1))
    assert np.abs(probabilities("binary", z, found) - 0.5).max() < 0.02


def test_temperature_does_not_change_who_is_most_probable() -> None:
    z = np.random.default_rng(7).normal(size=(100, 4))
    ranked = probabilities("multiclass", z).argmax(1)
    assert (probabilities("multiclass", z, 7).argmax(1) == ranked).all()


# ---------------------------------------------------------------------------------------------- errors


def cases(kind: Kind, m: int = 80) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """Truth, probabilities, and how often each case occurs."""
    rng = np.random.default_rng(8)
    p = probabilities(kind, rng.normal(size=(m, WIDTH[kind])))
    return drawn(kind, p), p, rng.integers(0, 4, m)


@pytest.mark.parametrize("kind", KINDS)
def test_brier_and_log_loss_are_those_of_scikit_learn_on_repeated_cases(kind: Kind) -> None:
    truth, p, times = cases(kind)
    again, p_again = np.repeat(truth, times, axis=0), np.repeat(p, times, axis=0)
    columns = range(p.shape[1])
    if kind == "binary":
        expected = sk.brier_score_loss(again, p_again[:, 1]), sk.log_loss(again, p_again)
    elif kind == "multilabel":
        expected = (
            np.mean([sk.brier_score_loss(again[:, j], p_again[:, j]) for j in columns]),
            np.mean([sk.log_loss(again[:, j], p_again[:, j]) for j in columns]),
        )
    else:
        expected = (
            sk.brier_score_loss(again, p_again, labels=columns, scale_by_half=False),
            sk.log_loss(again, p_again, labels=columns),
        )
    weights = times[None].astype(float)
    assert (brier(kind, truth, p, weights)[0], log_loss(kind, truth, p, weights)[0]) == pytest.approx(expected)
    once = np.ones((1, len(again)))
    assert (brier(kind, again, p_again, once)[0], log_loss(kind, again, p_again, once)[0]) == pytest.approx(expected)


def ece_by_hand(said: list[float], so: list[bool], n_bins: int) -> float:
    """Case by case into bins [i / n, (i + 1) / n), the last closed."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for p, right in zip(said, so, strict=True):
        bins.setdefault(min(int(p * n_bins + 1e-9), n_bins - 1), []).append((p, right))
    gaps = [len(b) * abs(np.mean([p for p, _ in b]) - np.mean([r for _, r in b])) for b in bins.values()]
    return sum(gaps) / len(said)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30).filter(
        lambda rows: any(times for _, _, times in rows)
    )
)
def test_ece_of_two_classes_is_that_of_the_positive_one_bin_by_bin(rows: list[tuple[int, bool, int]]) -> None:
    """Probabilities in sixtieths: many lie on the edge of a bin, 0 and 1 among them."""
    p, truth, times = (np.array(column) for column in zip(*rows, strict=True))
    two = np.stack([1 - p / 60, p / 60], axis=1)
    expected = ece_by_hand(np.repeat(p / 60, times).tolist(), np.repeat(truth, times).tolist(), 15)
    assert ece("binary", truth.astype(int), two, times[None].astype(float))[0] == pytest.approx(expected, abs=1e-12)


def test_ece_of_four_cases_on_paper() -> None:
    """Two bins: 0.2 and 0.4 with one positive, |0.3 - 0.5|; 0.7 and 0.9 with two, |0.8 - 1|."""
    p, truth = np.array([0.2, 0.4, 0.7, 0.9]), np.array([0, 1, 1, 1])
    assert ece("binary", truth, np.stack([1 - p, p], 1), np.ones((1, 4)), n_bins=2)[0] == pytest.approx(0.2)


def test_ece_of_several_classes_is_that_of_the_most_probable() -> None:
    truth, p, times = cases("multiclass")
    said, right = np.repeat(p.max(1), times).tolist(), np.repeat(p.argmax(1) == truth, times).tolist()
    found = ece("multiclass", truth, p, times[None].astype(float))[0]
    assert found == pytest.approx(ece_by_hand(said, right, 15))


def test_ece_of_labels_is_their_mean() -> None:
    truth, p, _ = cases("multilabel")
    each = [ece_by_hand(p[:, j].tolist(), truth[:, j].astype(bool).tolist(), 15) for j in range(3)]
    assert ece("multilabel", truth, p, np.ones((1, 80)))[0] == pytest.approx(np.mean(each))


def test_a_certain_error_costs_much_but_not_infinitely_much() -> None:
    found = log_loss("binary", np.array([1]), np.array([[1.0, 0.0]]), np.ones((1, 1)))[0]
    assert 30 < found < 40
