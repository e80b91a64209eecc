"""MAE's linear probe: LARS against an update written out by hand, batches, statistics, and sets of any size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_up import MadeUp, figure, judged, section, task
from numpy.typing import NDArray
from torch import nn

from miram.finetune.probes import mae_linear
from miram.finetune.probes.mae_linear import draws, lars, new_probe, predict, train
from miram.finetune.probes.sweep import Views
from miram.finetune.trial import reading

N, D, K = 60, 7, 3


@pytest.fixture
def images() -> tuple[Views, NDArray[np.int64]]:
    """Features far from standard ones, and classes of unequal size."""
    rng = np.random.default_rng(0)
    truth = rng.choice(K, N, p=[0.6, 0.3, 0.1])
    x = (5 + (rng.normal(size=(N, D)) + 2 * np.eye(D)[truth]) * np.geomspace(0.1, 10, D)).astype(np.float32)
    return Views(x[:, None], x), truth


def test_lars_moves_weights_by_a_share_of_their_length_and_the_bias_by_its_gradient() -> None:
    head = nn.Linear(D, K)
    optimizer, rng = lars(head), np.random.default_rng(0)
    weight, bias = head.weight.detach().numpy().copy(), head.bias.detach().numpy().copy()
    moved_weight, moved_bias = np.zeros_like(weight), np.zeros_like(bias)
    for lr in (0.5, 6.4, 2.0, 0.1):
        gradient, of_bias = rng.normal(size=weight.shape), rng.normal(size=bias.shape)
        head.weight.grad, head.bias.grad = (torch.from_numpy(g).float() for g in (gradient, of_bias))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        share = 0.001 * np.sqrt((weight**2).sum()) / np.sqrt((gradient**2).sum())
        moved_weight = 0.9 * moved_weight + share * gradient
        moved_bias = 0.9 * moved_bias + of_bias
        weight, bias = weight - lr * moved_weight, bias - lr * moved_bias
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=1e-5)
    np.testing.assert_allclose(head.bias.detach().numpy(), bias, rtol=1e-5)


def test_a_probe_is_what_the_recipe_written_out_gives(
    images: tuple[Views, NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full batches, so nothing is random but the start: statistics, balanced loss, rates, all in numpy."""
    views, truth = images
    monkeypatch.setattr(mae_linear, "EPOCHS", 20)
    monkeypatch.setattr(mae_linear, "WARMUP", 5)
    probe, x = train(views, truth, np.arange(N), K, seed=3), views.judged.astype(np.float64)
    start = new_probe(D, K, seed=3)[1]
    assert isinstance(start, nn.Linear)
    weight, bias = start.weight.detach().double().numpy().T, np.zeros(K)
    z, answers = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6), np.eye(K)[truth]
    share = 1 / np.bincount(truth)[truth]
    moved_weight, moved_bias = np.zeros_like(weight), np.zeros_like(bias)
    for step in range(20):
        rate = (step + 1) / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 15))
        told = np.exp(z @ weight + bias)
        error = (told / told.sum(1, keepdims=True) - answers) * (share / share.sum())[:, None]
        gradient = z.T @ error
        adapted = 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradient) * gradient
        moved_weight, moved_bias = 0.9 * moved_weight + adapted, 0.9 * moved_bias + error.sum(0)
        weight, bias = weight - 6.4 * rate * moved_weight, bias - 6.4 * rate * moved_bias
    assert isinstance(probe[1], nn.Linear)
    np.testing.assert_allclose(probe[1].weight.detach().numpy().T, weight, atol=1e-4)
    np.testing.assert_allclose(probe[1].bias.detach().numpy(), bias, atol=1e-4)
    kept = 0.9**20
    mean, variance = (1 - kept) * x.mean(0), kept + (1 - kept) * x.var(0, ddof=1)
    told = np.exp((x - mean) / np.sqrt(variance + 1e-6) @ weight + bias)
    np.testing.assert_allclose(predict(probe, views, np.arange(N)), told / told.sum(1, keepdims=True), atol=1e-3)


def test_normalisation_learns_nothing_and_has_seen_no_judged_image(images: tuple[Views, NDArray[np.int64]]) -> None:
    views, truth = images
    fit = np.arange(0, N, 2)
    probe = train(views, truth, fit, K, seed=0)
    assert [name for name, _ in probe.named_parameters()] == ["1.weight", "1.bias"]
    seen, others = views.judged[fit], views.judged[np.setdiff1d(np.arange(N), fit)]
    mean, variance = (np.asarray(getattr(probe[0], name)) for name in ("running_mean", "running_var"))
    np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-3)
    np.testing.assert_allclose(variance, seen.var(0, ddof=1), rtol=1e-3, atol=1e-4)
    assert np.abs(mean - others.mean(0)).max() > 0.05


def test_a_head_starts_small_cut_off_and_without_a_bias() -> None:
    start = new_probe(4000, 5, seed=1)[1]
    assert isinstance(start, nn.Linear)
    assert float(start.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not start.bias.any()
    assert not torch.equal(start.weight, new_probe(4000, 5, seed=2)[1].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "v", "batch", "steps", "size"),
    [
        (100, 1, 16384, 90, 100),  # smaller than a batch: all of it, once
        (100, 4, 16384, 90, 400),  # and in as many views as there are
        (100, 50, 1000, 90, 1000),  # until they fill a batch
        (250, 3, 100, 2 * 90, 100),  # what does not fill one is left out, as published
    ],
)
def test_batches_are_full_and_images_come_alike_often(
    n: int, v: int, batch: int, steps: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mae_linear, "BATCH", batch)
    found = list(draws(n, v, seed=0))
    assert len(found) == steps
    assert {len(images) for images, _ in found} == {len(of) for _, of in found} == {size}
    of_first_epoch = torch.cat([images for images, _ in found[: steps // 90]]).bincount(minlength=n)
    assert of_first_epoch.max() - of_first_epoch.min() <= (1 if n > batch else 0)
    views = torch.cat([of for _, of in found]).bincount(minlength=v)
    assert (views / views.sum()).numpy() == pytest.approx(np.full(v, 1 / v), abs=0.02)


def test_it_beats_chance_where_logistic_regression_does() -> None:
    """Few images, many channels that are far from standard, as an encoder's are."""
    rng, truth = np.random.default_rng(0), (np.arange(120) // 2) % 2
    scale = np.geomspace(0.01, 10, 64)
    features = MadeUp({(-1, "mean"): (3 + scale * (rng.normal(size=(120, 64)) + 0.4 * truth[:, None])).astype("f4")})
    made_up = task(truth, np.arange(120) // 2)
    linear, mae = (figure(made_up, judged(method, features, made_up)) for method in ("linear", "mae_linear"))
    assert linear > 0.8
    assert mae > 0.8


def test_crops_are_trained_on_and_windows_judged() -> None:
    """Windows hold nothing but the answer with its sign turned: who learnt from crops is wrong about every image."""
    rng, truth = np.random.default_rng(0), np.arange(160) // 2 % 2
    answer = 2.0 * truth[:, None] - 1
    crops = (answer[:, None] + 0.3 * rng.normal(size=(160, 3, 5))).astype(np.float32)
    windows = np.repeat(-answer, 5, axis=1).astype(np.float32)
    features = MadeUp({(-1, "cls"): windows}, {(-1, "cls"): crops})
    made_up = task(truth, np.arange(160) // 2)
    assert figure(made_up, judged("mae_linear", features, made_up, crops=3, pool="cls")) < 0.01
    assert figure(made_up, judged("mae_linear", features, made_up, crops=0, pool="cls")) > 0.99


def test_crops_are_read_for_it_alone() -> None:
    assert reading(section(methods=("linear", "mae_linear"), crops=3), seed=0).crops == 3
    assert reading(section(methods=("linear", "knn"), crops=3), seed=0).crops == 0
