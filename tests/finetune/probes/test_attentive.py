"""The attentive probe: finds what mean pooling dilutes, cares for no order, repeats itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from miram.finetune.probes.attentive import AttentiveProbe, TokenRows, fit_attentive, padded, whitening

N, D = 36, 12


def needles(n: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
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


def test_padding_changes_nothing() -> None:
    """Tokens of one image alone, and beside a longer image, whatever stands in the padding; gradients too."""
    torch.manual_seed(0)
    probe = AttentiveProbe(D, 3).double()
    torch.nn.init.normal_(probe.head.weight)
    torch.nn.init.normal_(probe.queries)
    probe.mean.normal_()
    probe.whiten.normal_()
    short, long = torch.randn(5, D).double(), torch.randn(40, D).double()
    x, padding = torch.stack([torch.cat([short, 1e3 * torch.ones(35, D)]), long]), torch.zeros(2, 40, dtype=torch.bool)
    padding[0, 5:] = True
    together, alone = probe(x, padding), torch.cat([probe(short[None]), probe(long[None])])
    torch.testing.assert_close(together, alone)
    wanted, found = (torch.autograd.grad(out.square().sum(), list(probe.parameters())) for out in (alone, together))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_is_padded_with_zeros_at_the_end_and_says_where() -> None:
    tokens = [np.full((t, 2), t, np.float32) for t in (3, 1, 2)]
    x, padding = padded(tokens, torch.tensor([2, 0, 1]), torch.device("cpu"))
    assert x[..., 0].tolist() == [[2, 2, 0], [3, 3, 3], [1, 0, 0]]
    assert padding.tolist() == [[False, False, True], [False] * 3, [False, True, True]]


def test_images_of_many_sizes_are_learnt_and_judged_like_those_of_one() -> None:
    """Cutting tokens that hold nothing off the images leaves the answer, and the needle, where it was."""
    (tokens, truth), (others, answer) = needles(400, 0), needles(200, 1)
    rng = np.random.default_rng(0)

    def cut(image: NDArray[np.float32]) -> NDArray[np.float32]:
        keep = rng.random(N) < rng.uniform(0.2, 1)
        keep[image[:, 0].argmax()] = True
        return image[keep]

    ragged, asked = [cut(image) for image in tokens], [cut(image) for image in others]
    assert len({len(image) for image in ragged}) > 20
    found = fit_attentive(ragged, truth, seed=0).predict(asked)
    assert roc_auc_score(answer, found[:, 1]) > 0.9


def test_tokens_are_read_by_the_row_of_the_data_set() -> None:
    class Stored:
        def tokens(self, i: int) -> NDArray[np.float32]:
            return np.full((1, 2), i, np.float32)

    rows = TokenRows(Stored(), np.array([7, 3, 9]))
    assert [rows[i][0, 0] for i in range(len(rows))] == [7, 3, 9]


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


def test_whitening_is_that_of_all_tokens_at_once() -> None:
    """Against numpy on the tokens laid end to end, with a mean a thousand times the deviation."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(5, 5))
    tokens = [(rng.normal(size=(t, 5)) @ mixed + 1000).astype(np.float32) for t in (3, 50, 1, 20, 400)]
    flat = np.concatenate(tokens).astype(np.float64)
    scale = flat.std(0)
    values, vectors = np.linalg.eigh(np.cov(flat / scale, rowvar=False))
    mean, matrix = whitening(tokens)
    np.testing.assert_allclose(mean, flat.mean(0))
    np.testing.assert_allclose(matrix, (vectors / np.sqrt(values + 1e-3)) @ vectors.T / scale[:, None], rtol=1e-3)


def test_whitening_the_queries_and_the_pooled_is_whitening_the_tokens() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(D, 3, queries=2).double()
    for tensor in (probe.head.weight.data, probe.queries.data, probe.mean, probe.whiten):
        tensor.normal_()
    x = torch.randn(4, N, D).double()
    white = (x - probe.mean) @ probe.whiten
    pooled = torch.nn.functional.scaled_dot_product_attention(probe.queries.expand(4, 2, D), white, white)
    torch.testing.assert_close(probe(x), probe.head(pooled.flatten(1)))
