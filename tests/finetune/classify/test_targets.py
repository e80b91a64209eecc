"""Targets against definitions written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from miram.finetune.classify.targets import Target

BINARY = Target("b", "binary", ("no", "yes"))
SEVERAL = Target("m", "multiclass", ("a", "b", "c"))
ORDINAL = Target("o", "ordinal", ("1", "2", "3", "4"))
LABELS = Target("l", "multilabel", ("mass", "calc", "asymmetry"))
EVERY = (BINARY, SEVERAL, ORDINAL, LABELS)


def logits_of(target: Target, n: int = 40, scale: float = 3.0) -> NDArray[np.float64]:
    return np.random.default_rng(5).normal(0, scale, (n, target.width))


def truth_of(target: Target, n: int = 40) -> NDArray[np.int64]:
    rng, k = np.random.default_rng(6), len(target.classes)
    return rng.integers(0, 2, (n, k)) if target.kind == "multilabel" else rng.integers(0, k, n)


def loss(
    target: Target, logits: NDArray[np.float64], truth: NDArray[np.int64], **options: object
) -> NDArray[np.float64]:
    return target.loss(torch.from_numpy(logits), torch.from_numpy(truth), **options).numpy()  # type: ignore[arg-type]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------------------------------------- losses


def test_a_head_has_an_output_a_class_and_one_less_for_ordered_ones() -> None:
    assert [target.width for target in EVERY] == [2, 3, 3, 3]


@pytest.mark.parametrize("target", [BINARY, SEVERAL])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classes_cost_their_negative_log_softmax(target: Target, smoothing: float) -> None:
    logits, truth = logits_of(target), truth_of(target)
    weights = np.arange(1, len(target.classes) + 1) / 2
    made = loss(target, logits, truth, weights=torch.from_numpy(weights), smoothing=smoothing)
    for row, c, found in zip(logits, truth, made, strict=True):
        surprise = np.log(np.exp(row).sum()) - row
        spread = np.eye(len(row))[c] * (1 - smoothing) + smoothing / len(row)
        assert found == pytest.approx(float((spread * weights * surprise).sum()))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_corn_asks_only_the_questions_that_an_image_has_reached(smoothing: float) -> None:
    logits, truth = logits_of(ORDINAL), truth_of(ORDINAL)
    weights = np.array([0.5, 1.0, 2.0, 4.0])
    made = loss(ORDINAL, logits, truth, weights=torch.from_numpy(weights), smoothing=smoothing)
    for row, c, found in zip(logits, truth, made, strict=True):
        costs = []
        for j, logit in enumerate(row):
            if c >= j:  # not below class j
                above = (1.0 if c > j else 0.0) * (1 - smoothing) + smoothing / 2
                p = sigmoid(logit)
                costs.append(-above * math.log(p) - (1 - above) * math.log(1 - p))
        assert found == pytest.approx(weights[c] * sum(costs) / len(costs))


def test_an_ordinal_output_learns_from_its_conditional_subset_alone() -> None:
    for c in range(4):
        logits = torch.zeros(1, 3, requires_grad=True)
        ORDINAL.loss(logits, torch.tensor([c])).sum().backward()
        learns = logits.grad[0] != 0  # type: ignore[index]
        assert learns.tolist() == [c >= j for j in range(3)]
        assert [math.copysign(1, g) for g in logits.grad[0] if g] == [-1] * c + [1] * (c < 3)  # type: ignore[index]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_cost_the_mean_of_their_binary_cross_entropies(smoothing: float) -> None:
    logits, truth = logits_of(LABELS), truth_of(LABELS)
    weights = np.array([1.0, 5.0, 0.5])
    made = loss(LABELS, logits, truth, weights=torch.from_numpy(weights), smoothing=smoothing)
    for row, labels, found in zip(logits, truth, made, strict=True):
        answers = labels * (1 - smoothing) + smoothing / 2
        costs = [
            -w * y * math.log(sigmoid(x)) - (1 - y) * math.log(1 - sigmoid(x))
            for x, y, w in zip(row, answers, weights, strict=True)
        ]
        assert found == pytest.approx(np.mean(costs))


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.kind)
def test_a_loss_is_finite_for_outputs_that_are_very_sure(target: Target) -> None:
    for sign in (1, -1):
        sure = np.full((40, target.width), sign * 1e4)
        assert np.isfinite(loss(target, sure, truth_of(target))).all()


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.kind)
def test_training_on_the_loss_ends_in_the_frequencies_of_the_classes(target: Target) -> None:
    """A head of biases alone has one optimum: what is frequent is probable. Of ordered classes, too."""
    truth = truth_of(target, 300)
    bias = torch.zeros(target.width, requires_grad=True, dtype=torch.float64)
    fit = torch.optim.LBFGS([bias], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        fit.zero_grad()
        logits = bias.expand(300, -1)
        told = target.loss(logits, torch.from_numpy(truth))
        if target.kind == "ordinal":  # an image's mean over its questions; weighed back to their sum
            told = told * torch.from_numpy(np.minimum(truth, 2) + 1)
        total = told.sum()
        total.backward()
        return total

    fit.step(closure)  # type: ignore[arg-type]
    said = target.probabilities(bias.detach().numpy()[None])[0]
    often = truth.mean(0) if target.kind == "multilabel" else np.bincount(truth, minlength=len(target.classes)) / 300
    np.testing.assert_allclose(said, often, atol=1e-4)


# ---------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_ordinal_probabilities_are_products_of_conditional_ones(temperature: float) -> None:
    logits = logits_of(ORDINAL)
    made = ORDINAL.probabilities(logits, temperature)
    assert made.dtype == np.float64
    for row, found in zip(logits, made, strict=True):
        passed, expected = 1.0, []
        for logit in row:
            above = sigmoid(logit)
            expected.append(passed * (1 - above))
            passed *= above
        hot = np.array([*expected, passed]) ** (1 / temperature)
        assert found == pytest.approx(hot / hot.sum())


def test_ordinal_probabilities_sum_to_one_and_are_rank_consistent() -> None:
    made = ORDINAL.probabilities(logits_of(ORDINAL, 500, scale=20))
    assert (made >= 0).all()
    np.testing.assert_allclose(made.sum(1), 1)
    above = 1 - made.cumsum(1)
    assert (np.diff(above, axis=1) <= 1e-12).all()


@pytest.mark.parametrize("target", [BINARY, SEVERAL])
def test_probabilities_of_classes_are_a_softmax(target: Target) -> None:
    logits = logits_of(target)
    tempered = np.exp(logits / 1.7)
    np.testing.assert_allclose(target.probabilities(logits, 1.7), tempered / tempered.sum(1, keepdims=True))


def test_probabilities_of_labels_are_independent() -> None:
    logits = logits_of(LABELS)
    np.testing.assert_allclose(LABELS.probabilities(logits, 2.0), 1 / (1 + np.exp(-logits / 2.0)))


# ---------------------------------------------------------------------------------------------- decisions


def test_a_threshold_says_yes_from_itself_on() -> None:
    said = np.array([[0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert BINARY.decide(said, (0.3,)).tolist() == [0, 1, 1]


def test_each_label_has_a_threshold_of_its_own() -> None:
    said = np.array([[0.5, 0.5, 0.5], [0.2, 0.9, 0.1]])
    assert LABELS.decide(said, (0.4, 0.6, 0.5)).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_of_several_classes_the_most_probable_is_decided_and_of_ordered_ones_the_median() -> None:
    assert SEVERAL.decide(np.array([[0.4, 0.25, 0.35]]), ()).tolist() == [0]
    spread = np.array(
        [[0.4, 0.05, 0.2, 0.35], [0.6, 0.2, 0.1, 0.1], [0, 0, 0, 1], [0.5, 0, 0, 0.5], [0.1, 0.3, 0.3, 0.3]]
    )
    assert ORDINAL.decide(spread, ()).tolist() == [2, 0, 3, 0, 2]


def test_the_median_is_the_number_of_questions_answered_yes() -> None:
    made = ORDINAL.probabilities(logits_of(ORDINAL, 300))
    yes = (1 - made.cumsum(1)[:, :-1] > 0.5).sum(1)
    np.testing.assert_array_equal(ORDINAL.decide(made, ()), yes)


def test_thresholds_must_fit_the_kind() -> None:
    for target, thresholds in ((BINARY, ()), (SEVERAL, (0.5,)), (ORDINAL, (0.5,)), (LABELS, (0.5,))):
        with pytest.raises(AssertionError):
            target.decide(np.full((1, len(target.classes)), 0.5), thresholds)


# ---------------------------------------------------------------------------------------------- weights


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    truth = np.array([0] * 30 + [1] * 8 + [2] * 2)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=truth)
    np.testing.assert_allclose(SEVERAL.class_weights(truth).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(SEVERAL.class_weights(truth).numpy(), 40 / (3 * np.array([30, 8, 2])), rtol=1e-6)


def test_a_label_weighs_its_negatives_by_its_positives_up_to_a_hundred() -> None:
    truth = np.zeros((1000, 3), np.int64)
    truth[:250, 0], truth[:5, 1] = 1, 1
    assert LABELS.class_weights(truth).tolist() == [3.0, 100.0, 100.0]


def test_a_class_missing_from_a_fold_does_not_break_the_weights() -> None:
    assert torch.isfinite(ORDINAL.class_weights(np.array([0, 1, 1, 3]))).all()


def test_weighted_positives_pull_as_much_as_all_negatives() -> None:
    truth = np.zeros((100, 3), np.int64)
    truth[:4, 0], truth[:50, 1], truth[:20, 2] = 1, 1, 1
    logits = torch.zeros(100, 3, requires_grad=True)
    LABELS.loss(logits, torch.from_numpy(truth), LABELS.class_weights(truth)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(0), torch.zeros(3), atol=1e-5, rtol=0)
