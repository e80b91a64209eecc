"""The sweep of heads against torch's own layer, loss, SGD and schedule; and what its choice may not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from made_up import MadeUp, figure, judged, section, task
from numpy.typing import NDArray
from torch.nn import functional as F

from miram.finetune.probes import sweep
from miram.finetune.probes.sweep import Head, Views, draws, standardised, train

N, D, K = 90, 7, 3


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "STEPS", 120)


@pytest.fixture
def images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features far from standard ones, and classes of unequal size."""
    rng = np.random.default_rng(0)
    truth = rng.choice(K, N, p=[0.6, 0.3, 0.1])
    x = rng.normal(size=(N, D)) + 2 * np.eye(D)[truth]
    return (5 + x * np.geomspace(0.1, 10, D)).astype(np.float32), truth


def test_a_head_is_what_torch_makes_of_a_linear_layer(images: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    x, truth = images
    everything, lr = np.arange(N), 0.05
    views, _ = standardised(Views(x[:, None], x), everything, everything)
    found = train(views, torch.from_numpy(truth), K, torch.tensor([lr]), seed=3)[:, 0].double()

    standard = torch.from_numpy((x - x.mean(0, dtype=float)) / x.std(0, dtype=float))
    answers = torch.from_numpy(truth)
    weights = torch.from_numpy(N / (K * np.bincount(truth)))
    layer = torch.nn.Linear(D, K).double()
    start = train(views, answers, K, torch.tensor([0.0]), seed=3)[:, 0].double()
    with torch.no_grad():
        layer.weight.copy_(start[:-1].T)
        layer.bias.copy_(start[-1])
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sweep.STEPS)
    for batch in draws(N, 1, seed=3)[0]:
        optimizer.zero_grad()
        F.cross_entropy(layer(standard[batch]), answers[batch], weights).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(found[:-1], layer.weight.detach().T, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found[-1], layer.bias.detach(), atol=2e-4, rtol=1e-3)


def test_heads_start_small_and_unbiased(images: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    x, truth = np.random.default_rng(0).normal(size=(N, 1, 1000)).astype(np.float32), torch.from_numpy(images[1])
    start = train(F.pad(torch.from_numpy(x), (0, 1), value=1), truth, K, torch.zeros(1), seed=0)
    assert start[:-1].std() == pytest.approx(0.01, rel=0.05)
    assert (start[-1] == 0).all()


def test_a_head_alone_is_the_head_among_others(images: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    x, truth = images
    views = {(-1, "mean"): Views(x[:, None], x), (-2, "cls"): Views(x[:, None, :4], x[:, :4])}
    heads = [Head(layer, pool, lr) for layer, pool in views for lr in (1e-3, 0.01, 0.1)]
    fit, rest = np.arange(60), np.arange(60, N)
    together = sweep.sweep(views, heads, truth, K, fit, rest, seed=1)
    assert np.abs(together[0] - together[1]).max() > 0.01
    for place in (1, 4, 5):
        alone = sweep.sweep(views, [heads[place]], truth, K, fit, rest, seed=1)
        np.testing.assert_allclose(alone[0], together[place], atol=1e-5)


def test_another_seed_gives_another_head(images: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    x, truth = images
    views, head = {(-1, "mean"): Views(x[:, None], x)}, [Head(-1, "mean", 1e-3)]
    one, two = (sweep.sweep(views, head, truth, K, np.arange(60), np.arange(60, N), seed) for seed in (1, 2))
    assert np.abs(one - two).max() > 1e-4


def test_every_image_is_drawn_once_an_epoch_and_its_views_alike_often() -> None:
    order, views = draws(200, 4, seed=0)
    assert order.shape == views.shape == (sweep.STEPS, 128)
    flat = order.flatten()
    for epoch in flat[: len(flat) // 200 * 200].view(-1, 200):
        assert sorted(epoch.tolist()) == list(range(200))
    assert (views.flatten().bincount() / views.numel()).tolist() == pytest.approx([0.25] * 4, abs=0.01)


def layered(
    signal: Callable[[NDArray[np.int64], NDArray[np.int64]], dict[int, NDArray[np.float64]]],
) -> tuple[str, ...]:
    """What is chosen of the layers that a signal of patients and truth makes, in each of four folds."""
    patients = np.repeat(np.arange(60), 4)
    truth = np.random.default_rng(1).permutation(np.arange(60) % 2)[patients]
    features = {(layer, "mean"): x.astype(np.float32) for layer, x in signal(patients, truth).items()}
    layers = tuple(layer for layer, _ in features)
    return judged("sweep", MadeUp(features), task(truth, patients), layers=layers).chosen


def test_the_layer_that_holds_the_answer_is_chosen() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(240, 8))
    chosen = layered(lambda _, truth: {-1: noise, -2: noise + 3 * truth[:, None], -3: -noise})
    assert all("block -2" in what for what in chosen)


def test_the_choice_is_no_leak_between_images_of_a_patient() -> None:
    """Block -1 knows the patient, which is perfect on folds of images and nothing on folds of patients."""
    rng = np.random.default_rng(0)
    fingerprint, noise = rng.normal(size=(60, 100)), rng.normal(size=(240, 8))
    chosen = layered(lambda patients, truth: {-1: fingerprint[patients], -2: noise + 0.5 * truth[:, None]})
    assert all("block -2" in what for what in chosen)


def test_crops_are_trained_on_and_windows_judged() -> None:
    """Windows hold nothing but the answer with its sign turned: who learnt from crops is wrong about every image."""
    rng, truth = np.random.default_rng(0), np.arange(160) // 2 % 2
    answer = 2.0 * truth[:, None] - 1
    crops = (answer[:, None] + 0.3 * rng.normal(size=(160, 3, 5))).astype(np.float32)
    features = MadeUp({(-1, "mean"): np.repeat(-answer, 5, axis=1).astype(np.float32)}, {(-1, "mean"): crops})
    made_up = task(truth, np.arange(160) // 2)
    assert figure(made_up, judged("sweep", features, made_up, crops=3)) < 0.01
    assert figure(made_up, judged("sweep", features, made_up, crops=0)) > 0.99


def test_more_views_of_a_feature_are_worth_more_than_one() -> None:
    """Each crop shows one of ten channels that all hold the answer: a head that draws only the first learns one."""
    rng, truth = np.random.default_rng(0), np.arange(160) // 2 % 2
    whole = rng.normal(size=(160, 10)) + 0.8 * truth[:, None]
    crops = whole[:, None] * np.eye(10)[None]
    features = MadeUp({(-1, "mean"): whole.astype(np.float32) / 10}, {(-1, "mean"): crops.astype(np.float32)})
    one = MadeUp(features.of, {(-1, "mean"): crops[:, :1].astype(np.float32)})
    made_up = task(truth, np.arange(160) // 2)
    many, few = (figure(made_up, judged("sweep", f, made_up, crops=k)) for f, k in ((features, 10), (one, 1)))
    assert many > 0.9
    assert many > few + 0.1


def test_a_class_that_an_inner_fold_lacks_and_a_constant_channel_do_no_harm() -> None:
    x = np.zeros((20, 1, 3), np.float32)
    x[:, 0, 0] = np.arange(20)
    views, _ = standardised(Views(x, x[:, 0]), np.arange(20), np.arange(20))
    weight = train(views, torch.arange(20) // 10, 3, torch.tensor([0.1]), seed=0)
    assert torch.isfinite(weight).all()


def test_heads_are_every_layer_pool_and_rate() -> None:
    settings = section(layers=(-1, -3), pools=("mean", "cls"), lrs=(0.1, 0.2))
    assert sweep.inputs(settings) == [(-1, "mean"), (-1, "cls"), (-3, "mean"), (-3, "cls")]
    assert str(Head(-3, "cls", 0.02)) == "lr 0.02, block -3, cls"
    assert math.isclose(sum(settings.lrs), 0.3)
