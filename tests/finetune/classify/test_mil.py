"""Attention over tiles: closed forms, order and padding, what it finds that a mean cannot, and its file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from miram.engine.errors import RunFailed, UserError
from miram.finetune.classify.config import FinetuneSection
from miram.finetune.classify.labels import Labelled
from miram.finetune.classify.mil import (
    RATES,
    Bags,
    GatedAttention,
    MilModel,
    attention,
    draws,
    fit,
    logits,
    moments,
    strata_of,
)
from miram.finetune.classify.targets import Target
from miram.finetune.probes.attentive import padded


@dataclass(frozen=True)
class Made:
    """Tiles of made-up images."""

    of: list[NDArray[np.float32]]

    @property
    def dim(self) -> int:
        return self.of[0].shape[1]

    def tiles(self, i: int) -> NDArray[np.float32]:
        return self.of[i]


def net(dim: int = 12, width: int = 8, outputs: int = 3) -> GatedAttention:
    torch.manual_seed(0)
    made = GatedAttention(dim, width, outputs)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor is made.deviation else torch.randn_like(tensor))
    return made.eval()


def labelled(
    truth: Any, breasts: Any = None, kind: Any = "binary", classes: tuple[str, ...] = ("no", "yes")
) -> Labelled:
    """Two images a breast, unless said otherwise; rows of the data set in reverse order."""
    n = len(truth)
    breasts = np.arange(n) // 2 if breasts is None else np.asarray(breasts)
    names = np.char.add("b", np.char.zfill(breasts.astype(str), 4))
    keys = np.char.add("k", np.arange(n).astype(str))
    rows = np.arange(n)[::-1].copy()
    return Labelled(Target("t", kind, classes), rows, np.asarray(truth), names, names, keys, np.full(n, ""), {})


def settings(balance: str = "weights", smoothing: float = 0.0, **tiles: Any) -> FinetuneSection:
    plain = {"encoder": "random", "method": "linear", "input": "tiles", "balance": balance, "smoothing": smoothing}
    return FinetuneSection.model_validate({**plain, "tiles": {"width": 16, **tiles}})


def findings(n: int, dim: int, seed: int, shift: float = 5.0, tiles: int = 30) -> tuple[Made, NDArray[np.int64]]:
    """Images of a few tiles of noise; in half of them one tile is shifted along one direction."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    direction = np.random.default_rng(99).normal(size=dim)
    images = []
    for label in truth:
        x = rng.normal(size=(tiles + int(rng.integers(-5, 6)), dim))
        x[rng.integers(len(x))] += label * shift * direction / np.linalg.norm(direction)
        images.append((3 + 0.5 * x).astype(np.float32))
    return Made(images[::-1]), truth


# ---------------------------------------------------------------------------------------------- the formula


def test_it_is_the_papers_formula() -> None:
    model, x = net(), np.random.default_rng(0).normal(size=(7, 12))
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    z = (x - w["mean"]) / w["deviation"]
    gate = 1 / (1 + np.exp(-(z @ w["gate.weight"].T + w["gate.bias"])))
    score = np.tanh(z @ w["content.weight"].T + w["content.bias"]) * gate @ w["score.weight"][0]
    weight = np.exp(score) / np.exp(score).sum()
    said, attended = model(torch.from_numpy(x).float())
    np.testing.assert_allclose(attended.detach(), weight, rtol=1e-4)
    np.testing.assert_allclose(said.detach(), weight @ z @ w["head.weight"].T + w["head.bias"], rtol=1e-4, atol=1e-5)


def test_a_bag_of_one_tile_is_the_linear_head_on_it() -> None:
    model, x = net(), torch.randn(1, 12)
    said, attended = model(x)
    torch.testing.assert_close(said, model.head((x[0] - model.mean) / model.deviation))
    assert attended.tolist() == [1.0]


def test_attention_sums_to_one_and_the_order_of_tiles_does_not_matter() -> None:
    model, x, order = net(), torch.randn(5000, 12), torch.randperm(5000)
    said, attended = model(x)
    again, moved = model(x[order])
    assert attended.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(moved, attended[order])
    torch.testing.assert_close(again, said, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing() -> None:
    model, rng = net(), np.random.default_rng(0)
    bags = [rng.normal(size=(t, 12)).astype(np.float32) for t in (1, 3, 40, 2500)]
    tiles, padding = padded(bags, torch.arange(4), torch.device("cpu"))
    tiles[padding] = 1e6  # whatever is there
    said, attended = model(tiles, padding)
    assert (attended[padding] == 0).all()
    torch.testing.assert_close(attended.sum(1), torch.ones(4))
    for i, bag in enumerate(bags):
        alone, weights = model(torch.from_numpy(bag))
        torch.testing.assert_close(said[i], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(attended[i, : len(bag)], weights, rtol=1e-4, atol=1e-7)


def test_tiles_are_standardised_by_all_tiles_of_the_training_bags() -> None:
    made, truth = findings(12, 6, seed=0)
    for image in made.of:
        image[:, 5] = 7.0
    task = labelled(truth)
    images = np.array([0, 1, 4, 5, 8, 9])
    model = fit(made, task, images, settings(steps=1), 1e-3, 0)
    seen = np.concatenate([made.of[row] for row in task.rows[images]])
    np.testing.assert_allclose(model.net.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.net.deviation[:5], seen.std(0)[:5], rtol=1e-4)
    assert model.net.deviation[5] == 1  # a feature that never changes
    mean, deviation = moments(Bags(made, [task.rows[images]]))
    np.testing.assert_allclose(mean, seen.mean(0, dtype=np.float64), rtol=1e-12)
    assert deviation.shape == (6,)


# ---------------------------------------------------------------------------------------------- what it learns


@pytest.mark.parametrize("lr", RATES)
def test_one_tile_that_carries_the_class_is_found_and_a_mean_does_not_find_it(lr: float) -> None:
    """At both ends of the advised learning rates."""
    train, truth = findings(300, 32, seed=1)
    test, asked = findings(300, 32, seed=2)
    task, other = (labelled(t, breasts=np.arange(300)) for t in (truth, asked))
    model = fit(train, task, np.arange(300), settings(width=128), lr, 0)
    said = logits(model, test, other, np.arange(300))
    pooled = [np.stack([made.of[row].mean(0) for row in task.rows]) for made in (train, test)]
    mean = LogisticRegression(C=1.0, max_iter=1000).fit((pooled[0] - 3) * 10, truth)
    by_mean = roc_auc_score(asked, mean.decision_function((pooled[1] - 3) * 10))
    by_attention = roc_auc_score(asked, said[:, 1] - said[:, 0])
    assert by_attention > 0.93
    assert by_attention > by_mean + 0.12


def test_the_tile_with_the_finding_gets_the_attention() -> None:
    train, truth = findings(300, 32, seed=1)
    task = labelled(truth, breasts=np.arange(300))
    model = fit(train, task, np.arange(300), settings(), 3e-3, 0)
    direction = np.random.default_rng(99).normal(size=32)
    hits = [
        attention(model, train, task, i).argmax() == (train.of[task.rows[i]] @ direction).argmax()
        for i in np.flatnonzero(truth)
    ]
    assert np.mean(hits) > 0.9


def test_the_same_call_gives_the_same_bits_and_another_seed_does_not() -> None:
    made, truth = findings(40, 8, seed=0)
    task, before = labelled(truth, breasts=np.arange(40)), torch.get_rng_state()
    for balance in ("weights", "sampler"):
        said = [
            logits(fit(made, task, np.arange(40), settings(balance, steps=20), 3e-3, seed), made, task, np.arange(40))
            for seed in (0, 0, 1)
        ]
        assert np.array_equal(said[0], said[1])
        assert not np.allclose(said[0], said[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_images_named_are_learnt_from() -> None:
    made, truth = findings(40, 8, seed=0)
    task, half = labelled(truth), np.arange(20)
    blind = Made([np.full_like(tiles, np.nan) if i < 20 else tiles for i, tiles in enumerate(made.of)])
    for balance in ("weights", "sampler", "none"):
        found = [fit(m, task, half, settings(balance, steps=5), 3e-3, 0) for m in (made, blind)]
        for a, b in zip(*(m.net.state_dict().values() for m in found), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("balance", ["weights", "sampler", "none"])
def test_a_rare_class_counts_as_much_as_it_is_told_to(balance: str) -> None:
    """Nothing to see in the tiles: what is said is the share of the class that training saw."""
    rng = np.random.default_rng(0)
    made = Made([rng.normal(size=(4, 3)).astype(np.float32) for _ in range(200)])
    truth = (np.arange(200) % 10 == 0).astype(np.int64)
    task = labelled(truth, breasts=np.arange(200))
    model = fit(made, task, np.arange(200), settings(balance, weight_decay=1.0, steps=200), 2e-2, 0)
    said = logits(model, made, task, np.arange(200))
    share = torch.from_numpy(said).softmax(1)[:, 1].mean().item()
    assert share == pytest.approx(0.1 if balance == "none" else 0.5, abs=0.07)


def test_smoothing_keeps_logits_small() -> None:
    made, truth = findings(60, 8, seed=0, shift=20.0, tiles=10)
    task = labelled(truth, breasts=np.arange(60))
    spread = [
        np.abs(
            logits(fit(made, task, np.arange(60), settings(smoothing=s, steps=100), 1e-2, 0), made, task, np.arange(60))
        ).max()
        for s in (0.0, 0.3)
    ]
    assert spread[1] < 0.7 * spread[0]


@pytest.mark.parametrize(
    ("kind", "truth", "classes"),
    [
        ("ordinal", [0, 1, 2, 1] * 10, ("a", "b", "c")),
        ("multiclass", [0, 1, 2, 1] * 10, ("a", "b", "c")),
        ("multilabel", [[0, 1], [1, 1], [0, 0], [1, 0]] * 10, ("a", "b")),
    ],
)
@pytest.mark.parametrize("balance", ["weights", "sampler", "none"])
def test_every_kind_of_task_is_learnt(kind: str, truth: Any, classes: tuple[str, ...], balance: str) -> None:
    """Tiles that say the truth outright."""
    answer = np.array(truth)
    task = labelled(answer, breasts=np.arange(40), kind=kind, classes=classes)
    marks = answer @ np.eye(2, 4) if kind == "multilabel" else np.eye(4)[answer]
    rng = np.random.default_rng(0)
    made = Made([(mark + 0.1 * rng.normal(size=(5, 4))).astype(np.float32) for mark in marks][::-1])
    model = fit(made, task, np.arange(40), settings(balance, dropout=0.0, steps=150), 3e-2, 0)
    said = logits(model, made, task, np.arange(40))
    assert said.dtype == np.float64
    assert said.shape == (40, task.target.width)
    thresholds = (0.5, 0.5) if kind == "multilabel" else ()
    decided = task.target.decide(task.target.probabilities(said), thresholds)
    assert (decided == answer).mean() > 0.95


def test_a_rate_that_destroys_the_weights_is_said() -> None:
    made, truth = findings(20, 8, seed=0)
    huge = Made([tiles * np.float32(1e30) for tiles in made.of])
    with pytest.raises(RunFailed, match=r"diverged at learning rate 1e\+30"):
        fit(huge, labelled(truth), np.arange(20), settings(steps=20), 1e30, 0)


# ---------------------------------------------------------------------------------------------- bags


def test_a_breast_is_all_tiles_of_all_its_images() -> None:
    made, truth = findings(20, 12, seed=0)
    task, model = labelled(truth), MilModel(net(outputs=2), "breast")
    said = logits(model, made, task, np.array([5, 4, 0]))
    expected, weights = model.judge(np.concatenate([made.of[row] for row in task.rows[[4, 5]]]))
    np.testing.assert_array_equal(said[0], said[1])
    np.testing.assert_allclose(said[0], expected)
    np.testing.assert_array_equal(logits(model, made, task, np.array([4])), said[1:2])
    views = [attention(model, made, task, i) for i in (4, 5)]
    np.testing.assert_array_equal(np.concatenate(views), weights)
    assert [len(view) for view in views] == [len(made.of[row]) for row in task.rows[[4, 5]]]
    alone = replace(model, bag="image")
    np.testing.assert_allclose(logits(alone, made, task, np.array([5]))[0], alone.judge(made.of[task.rows[5]])[0])
    assert attention(alone, made, task, 5).sum() == pytest.approx(1)


def test_a_breast_is_trained_as_its_worst_view_and_not_at_all_where_classes_disagree() -> None:
    rng = np.random.default_rng(0)
    made = Made([rng.normal(size=(3, 4)).astype(np.float32) for _ in range(8)])
    plain = settings(steps=30)
    one_view = fit(made, labelled([0, 0, 1, 0, 0, 1, 0, 0]), np.arange(8), plain, 1e-2, 0)
    both_views = fit(made, labelled([0, 0, 1, 1, 1, 1, 0, 0]), np.arange(8), plain, 1e-2, 0)
    classes = ("a", "b", "c")
    split = fit(
        made, labelled([0, 0, 1, 2, 1, 1, 2, 2], kind="multiclass", classes=classes), np.arange(8), plain, 1e-2, 0
    )
    without = labelled([0, 0, 0, 0, 1, 1, 2, 2], kind="multiclass", classes=classes)
    left = fit(made, without, np.array([0, 1, 4, 5, 6, 7]), plain, 1e-2, 0)
    for a, b in ((one_view, both_views), (split, left)):
        for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y)


def test_bags_come_in_turn_or_each_class_equally_often() -> None:
    source = draws(10, 4, None, seed=0)
    seen = np.concatenate([next(source) for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert len(next(draws(3, 16, None, seed=0))) == 3
    strata = np.array([0] * 95 + [1] * 4 + [7])
    rare = draws(100, 50, strata, seed=0)
    counts = np.unique(strata[np.concatenate([next(rare) for _ in range(60)])], return_counts=True)[1]
    np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.03)
    several = np.array([[1, 0], [1, 1], [1, 0], [0, 0]])
    assert len(set(strata_of(several).tolist())) == 3
    assert strata_of(several)[0] == strata_of(several)[2]


# ---------------------------------------------------------------------------------------------- the file


def test_a_model_that_was_written_says_the_same_and_has_the_same_bytes(tmp_path: Path) -> None:
    model, x = MilModel(net(), "image"), np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32)
    model.write(tmp_path / "a.safetensors")
    again = MilModel.read(tmp_path / "a.safetensors")
    again.write(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert again.bag == "image"
    for first, second in zip(model.judge(x), again.judge(x), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "other", "key", "shape", "nan", "bag", "schema"])
def test_what_is_no_such_model_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "mil.safetensors"
    MilModel(net(), "breast").write(path)
    tensors, told = load_file(path), '{"schema": "miram.mil/1", "bag": "breast"}'
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "text":
        path.write_text("no model")
    else:
        if damage == "key":
            del tensors["gate.bias"]
        elif damage == "shape":
            tensors["gate.weight"] = tensors["gate.weight"][:-1].contiguous()
        elif damage == "nan":
            tensors["head.bias"][0] = torch.nan
        told = {"bag": told.replace("breast", "patient"), "schema": told.replace("/1", "/2"), "other": "[1]"}.get(
            damage, told
        )
        save_file(tensors, path, {"miram": told})
    with pytest.raises(UserError, match=r"mil\.safetensors cannot be read as attention over tiles"):
        MilModel.read(path)
