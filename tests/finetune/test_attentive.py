"""The attentive probe: finds what mean pooling dilutes, cares for no order, repeats itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from miram.finetune.attentive import AttentiveProbe, Tokens, fit_attentive, whitening

N, D = 36, 12


def needles(n: int, seed: int) -> tuple[Tokens, NDArray[np.int64]]:
    """One token of each image, anywhere, carries a mark in channel 0 and the label in channel 1; the rest is noise."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(n, N, D)).astype(np.float32)
    truth, place = rng.integers(2, size=n), rng.integers(N, size=n)
    tokens[np.arange(n), place, 0] = 6
    tokens[np.arange(n), place, 1] = 2.0 * (2 * truth - 1)
    return tokens, truth


def test_it_reads_a_label_that_one_token_anywhere_carries_where_mean_pooling_cannot() -> None:
    (tokens, truth), (others, answer) = needles(600, 0), needles(600, 1)
    linear = LogisticRegression().fit(tokens.mean(1), truth).predict_proba(others.mean(1))[:, 1]
    attentive = fit_attentive(tokens, truth, seed=0).predict(others)
    assert roc_auc_score(answer, linear) < 0.75
    assert roc_auc_score(answer, attentive[:, 1]) > 0.95


def test_the_order_of_tokens_does_not_matter() -> None:
    tokens, truth = needles(128, 0)
    probe, order = fit_attentive(tokens, truth, seed=0, epochs=3), np.random.default_rng(2).permutation(N)
    np.testing.assert_allclose(probe.predict(tokens), probe.predict(tokens[:, order]), atol=1e-5)


def test_a_seed_gives_the_same_probe_whatever_was_drawn_before_and_leaves_the_generator_alone() -> None:
    tokens, truth = needles(128, 0)
    first = fit_attentive(tokens, truth, seed=5, epochs=2).predict(tokens)
    torch.rand(7)
    before = torch.get_rng_state()
    again = fit_attentive(tokens, truth, seed=5, epochs=2).predict(tokens)
    np.testing.assert_array_equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert (fit_attentive(tokens, truth, seed=6, epochs=2).predict(tokens) != first).any()


def test_equal_queries_pool_as_torch_attention_does() -> None:
    probe = AttentiveProbe(D, 3, queries=2)
    torch.nn.init.normal_(probe.head.weight)
    x = torch.randn(4, N, D)
    pooled = torch.nn.functional.scaled_dot_product_attention(probe.queries.expand(4, 2, D), x, x)
    torch.testing.assert_close(probe(x), probe.head(pooled.flatten(1)))


def test_scale_and_shift_of_channels_do_not_matter_and_probabilities_sum_to_one() -> None:
    tokens, truth = needles(256, 0)
    stretch, shift = np.geomspace(0.01, 100, D).astype(np.float32), np.linspace(-3, 3, D).astype(np.float32)
    plain = fit_attentive(tokens, truth, seed=0, epochs=3).predict(tokens)
    moved = tokens * stretch + shift * stretch
    np.testing.assert_allclose(plain, fit_attentive(moved, truth, seed=0, epochs=3).predict(moved), atol=1e-3)
    np.testing.assert_allclose(plain.sum(1), 1, atol=1e-6)


def test_three_classes_of_unequal_size_are_weighed_alike() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [300, 30, 30])
    tokens = rng.normal(size=(360, 4, 6)).astype(np.float32)
    tokens[:, :, :3] += 1.0 * np.eye(3, dtype=np.float32)[truth][:, None]
    found = fit_attentive(tokens, truth, seed=0).predict(tokens).argmax(1)
    assert all((found[truth == k] == k).mean() > 0.7 for k in range(3))


@pytest.mark.parametrize("truth", [[0, 0, 0, 0], [0, 2, 0, 2], [0, 1]])
def test_labels_that_do_not_fit_are_refused(truth: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        fit_attentive(np.zeros((4, 3, 2), np.float32), np.array(truth), seed=0)


def test_whitened_channels_have_unit_variance_and_no_correlation() -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(50, 40, 5)) @ rng.normal(size=(5, 5)) + 3).astype(np.float32)
    mean, matrix = whitening(tokens)
    found = (tokens.reshape(-1, 5) - mean) @ matrix
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(found, rowvar=False), np.eye(5), atol=0.1)
