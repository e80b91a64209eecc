"""Monitors against closed forms, timm's own attention, brute force, and a training that must not notice them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from scipy.stats import entropy, ortho_group
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from miram.data.shards import ShardDataset
from miram.data.stream import ViewDataset, collate
from miram.engine.config import dump_yaml
from miram.engine.errors import UserError
from miram.engine.launch import make_accelerator
from miram.engine.loop import Trainer
from miram.engine.objective import Batch, Objective
from miram.engine.report import write_report
from miram.engine.run import Run, read_metrics
from miram.finetune.features import Reading, cached_features
from miram.pretrain.build import build_objective, build_views, encoder_card
from miram.pretrain.config import PretrainConfig, ScaleSection
from miram.pretrain.encoder import build_encoder, card_for
from miram.pretrain.miram import Miram
from miram.pretrain.monitors import Monitors
from miram.pretrain.monitors import probes as monitor_probes
from miram.pretrain.monitors.album import spread
from miram.pretrain.monitors.attention_maps import attention_maps, has_maps
from miram.pretrain.monitors.drawing import pixels_of
from miram.pretrain.monitors.pictures import caption, reconstructions
from miram.pretrain.monitors.probes import Labelled, fold_of, nearest_neighbours
from miram.pretrain.monitors.rankme import rankme

NARROW = {"depth": 1, "width": 16, "heads": 2}
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}

# ---------------------------------------------------------------------------------------------- RankMe


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_orthonormal_features_use_every_dimension(dim: int) -> None:
    features = np.linalg.qr(np.random.default_rng(0).normal(size=(100, dim)))[0]
    assert rankme(features) == pytest.approx(dim, rel=1e-3)


def test_features_of_rank_one_use_one_dimension() -> None:
    features = np.outer(np.arange(1, 51), np.arange(1, 21)).astype(np.float32)
    assert rankme(features) == pytest.approx(1, rel=1e-3)


def test_collapsed_features_are_a_finite_figure() -> None:
    assert rankme(np.zeros((50, 20), np.float32)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("spectrum", [[1.0, 1.0, 0.0, 0.0], [8.0, 4.0, 2.0, 1.0], [1e3, 1.0, 1e-1, 1e-9]])
def test_rankme_is_the_entropy_of_a_spectrum_that_is_known(spectrum: list[float]) -> None:
    rows = ortho_group.rvs(30, random_state=1)[:, :4]
    features = rows @ np.diag(spectrum) @ ortho_group.rvs(4, random_state=2)
    assert rankme(features) == pytest.approx(np.exp(entropy(spectrum)), rel=1e-4)
    assert rankme(1e-3 * features) == pytest.approx(rankme(features), rel=1e-6)


# ---------------------------------------------------------------------------------------------- attention maps


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    built = VisionTransformer(**{"img_size": (32, 48), "in_chans": 1, "num_classes": 0, **TINY, **options})
    for p in built.parameters():
        nn.init.normal_(p, std=0.3)
    return built.eval()


def maps_of_timm(model: VisionTransformer, images: Tensor) -> Tensor:
    """(B, H, N, N) of the last block, out of timm's own unfused path."""
    attention, caught = model.blocks[-1].attn, []
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    model.forward_features(images)
    hook.remove()
    attention.fused_attn = True
    return caught[0]


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"reg_tokens": 3}, {"norm_layer": nn.LayerNorm, "pre_norm": True}]
)
@torch.no_grad()
def test_map_of_the_class_token_is_that_of_timm(options: dict[str, Any]) -> None:
    model, images = vit(**options), torch.randn(3, 1, 32, 48)
    expected = maps_of_timm(model, images)[:, :, 0, model.num_prefix_tokens :]
    found = attention_maps(model, images)
    assert found.shape == (3, 2, 6)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_map_without_a_class_token_is_that_of_the_mean_query() -> None:
    model, images = vit(class_token=False, global_pool="avg", reg_tokens=2), torch.randn(3, 1, 32, 48)
    tokens: list[Tensor] = []
    hook = model.blocks[-1].norm1.register_forward_hook(lambda *given: tokens.append(given[2]))
    found = attention_maps(model, images)
    hook.remove()
    attention = model.blocks[-1].attn
    for b in range(3):
        Q, K, _ = (tokens[0][b].double() @ attention.qkv.weight.double().T + attention.qkv.bias.double()).split(32, -1)
        for h in range(2):
            head = slice(16 * h, 16 * h + 16)
            expected = torch.softmax(K[:, head] @ Q[2:, head].mean(0) / 4, 0)[2:]
            torch.testing.assert_close(found[b, h], expected.float())


def test_attention_that_is_no_plain_softmax_gets_no_map() -> None:
    assert has_maps(vit())
    assert not has_maps(vit(attn_layer="diff"))
    assert not has_maps(vit(block_fn=ParallelScalingBlock))
    assert not has_maps(vit(block_fn=DiffParallelScalingBlock))


def test_looking_leaves_no_hook() -> None:
    model = vit()
    attention_maps(model, torch.randn(1, 1, 32, 48))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------- reconstructions


def scale(s: int, **options: Any) -> ScaleSection:
    rest = NARROW if options.get("tokens") != "shared" else {}
    return ScaleSection(scale=s, **rest, **options)


def miram(*scales: ScaleSection, size: tuple[int, int] = (64, 32), channels: int = 1, **options: Any) -> Miram:
    torch.manual_seed(0)
    card = card_for("vit_tiny_patch16_224", size, {"in_chans": channels, **TINY, "patch_size": 8})
    return Miram(build_encoder(card), scales, **options).eval()


def batch_for(model: Miram, n: int = 3) -> Batch:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.rand(n, *shape, generator=draw) for name, shape in model.inputs.items()}


def of_scale(found: dict[str, Tensor], s: int) -> SimpleNamespace:
    """The columns of a scale."""
    titles = {"prediction": "prediction", "filled": "filled in", "truth": "truth"}
    return SimpleNamespace(scale=s, **{name: found[f"{title}, scale {s}"] for name, title in titles.items()})


VARIANTS: list[tuple[list[ScaleSection], dict[str, Any]]] = [
    ([scale(1)], {}),
    ([scale(1), scale(2)], {"norm_pix": False}),
    ([scale(1), scale(2, loss_on="all"), scale(4)], {}),
    ([scale(2)], {"size": (32, 48)}),
    ([scale(1), scale(2, tokens="shared")], {}),
    ([scale(1), scale(4, tokens="shared", loss_on="all")], {"norm_pix": False}),
    ([scale(1), scale(2)], {"mask_unit": 2}),
    ([scale(1), scale(2, decode_fraction=0.5)], {}),
    ([scale(1), scale(2)], {"target": "upsampled"}),
    ([scale(1), scale(2)], {"channels": 3}),
]


def hidden_pixels(model: Miram, batch: Batch, s: int) -> Tensor:
    """(B, s*H, s*W) where the patch that a pixel belongs to was hidden."""
    _, mask = model.masks(batch)
    coarse = mask.reshape(-1, *model.grid)
    return coarse.repeat_interleave(8 * s, 1).repeat_interleave(8 * s, 2)


@pytest.mark.parametrize(("scales", "options"), VARIANTS)
@torch.no_grad()
def test_a_perfect_model_fills_in_the_truth(
    scales: list[ScaleSection], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = miram(*scales, **options)
    batch = batch_for(model)
    perfect = [model.patches(section, model.target_image(section, batch)) for section in scales]
    monkeypatch.setattr(model, "reconstruct", lambda *_: perfect)
    found = reconstructions(model, batch)
    assert len(found) == 1 + 3 * len(scales)
    for at in (of_scale(found, section.scale) for section in scales):
        assert at.truth.shape[-2:] == tuple(at.scale * side for side in batch["view/1"].shape[-2:])
        torch.testing.assert_close(at.filled, at.truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scales", "options"), VARIANTS)
@torch.no_grad()
def test_only_gaps_are_filled_and_only_what_was_seen_is_shown_as_seen(
    scales: list[ScaleSection], options: dict[str, Any]
) -> None:
    model = miram(*scales, **options)
    batch = batch_for(model)
    found = reconstructions(model, batch)
    seen = found["input"]
    hidden = hidden_pixels(model, batch, 1)[:, None].expand_as(seen)
    assert torch.equal(seen.isnan(), hidden)
    assert torch.equal(seen[~hidden], batch["view/1"][~hidden])
    for section in scales:
        at = of_scale(found, section.scale)
        hidden = hidden_pixels(model, batch, section.scale)[:, None].expand_as(at.truth)
        assert torch.equal(at.filled[~hidden], at.truth[~hidden])
        assert torch.equal(at.filled[hidden], at.prediction[hidden])
        assert not torch.allclose(at.filled[hidden], at.truth[hidden], atol=1e-2)
        assert torch.equal(at.prediction.isnan(), ~hidden if section.loss_on == "masked" else torch.zeros_like(hidden))


@torch.no_grad()
def test_pictures_change_with_nothing_that_was_hidden() -> None:
    """The prediction of a model that predicts grey levels never depends on hidden pixels."""
    model = miram(scale(1), scale(2), norm_pix=False)
    batch = batch_for(model)
    other = dict(batch)
    for s in (1, 2):
        hidden = hidden_pixels(model, batch, s)[:, None]
        other[f"view/{s}"] = torch.where(hidden, torch.rand_like(batch[f"view/{s}"]), batch[f"view/{s}"])
    found, changed = reconstructions(model, batch), reconstructions(model, other)
    for title in ("input", "prediction, scale 1", "prediction, scale 2"):
        assert torch.equal(found[title].nan_to_num(), changed[title].nan_to_num())


@torch.no_grad()
def test_a_model_that_predicts_nothing_shows_what_is_borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero predicted: with normalised patches their true mean stands there, without them zero."""
    for norm_pix in (True, False):
        model = miram(scale(2), norm_pix=norm_pix)
        batch = batch_for(model)
        zero = torch.zeros_like(model.patches(model.scales[0], batch["view/2"]))
        monkeypatch.setattr(model, "reconstruct", lambda *_, zero=zero: [zero])
        at, hidden = of_scale(reconstructions(model, batch), 2), hidden_pixels(model, batch, 2)[:, None]
        means = nn.functional.avg_pool2d(at.truth, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
        expected = means if norm_pix else torch.zeros_like(means)
        torch.testing.assert_close(at.filled[hidden], expected[hidden])


def test_caption_says_what_is_borrowed_and_what_is_enlarged() -> None:
    assert "borrows from the truth" in caption(miram(scale(1)))
    assert "borrow" not in caption(miram(scale(1), norm_pix=False))
    assert "holds no finer detail" in caption(miram(scale(1), scale(2), target="upsampled"))
    assert "holds no finer detail" not in caption(miram(scale(1), scale(2)))


def test_hidden_pixels_are_drawn_transparent_in_colour_and_as_no_number_in_grey() -> None:
    image = torch.tensor([[[1.0, torch.nan, 4.0]]])
    np.testing.assert_allclose(pixels_of(image, (0.0, 2.0)), [[0.5, np.nan, 1.0]])
    np.testing.assert_allclose(pixels_of(image.expand(3, 1, 3), (0.0, 2.0))[0, :, 3], [1, 0, 1])


# ---------------------------------------------------------------------------------------------- probes


def labelled(truth: np.ndarray, patients: np.ndarray) -> Labelled:
    return Labelled("made up", list(range(len(truth))), truth, patients.astype(str))


def test_features_that_hold_the_answer_give_it_to_both_probes() -> None:
    rng, truth = np.random.default_rng(0), np.arange(120) // 2 % 3
    features = rng.normal(size=(120, 6)).astype(np.float32)
    features[:, :3] += 8 * np.eye(3, dtype=np.float32)[truth]
    figures = labelled(truth, np.arange(120) // 4)(features, list(range(120)))
    assert figures == {"probe/made up": pytest.approx(1, abs=0.03), "knn/made up": pytest.approx(1, abs=0.03)}


def test_features_that_only_know_the_patient_are_worth_nothing() -> None:
    """Every patient has one class and a fingerprint: whoever saw a patient's other images would be perfect."""
    rng, patients = np.random.default_rng(1), np.repeat(np.arange(60), 4)
    truth = rng.permutation(np.arange(60) % 2)[patients]
    features = rng.normal(size=(60, 120))[patients].astype(np.float32)
    for value in labelled(truth, patients)(features, list(range(240))).values():
        assert abs(value - 0.5) < 0.2
    for value in labelled(truth, np.arange(240))(features, list(range(240))).values():
        assert value > 0.95


def test_the_auc_of_a_look_compares_no_images_across_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fold is ranked perfectly, each on a scale of its own."""

    def predict(_: object, features: np.ndarray, truth: np.ndarray, *, cv: list[Any], method: str) -> np.ndarray:
        p = (truth + 2 * fold_of(cv, len(truth))) / 10
        return np.stack([1 - p, p], axis=1)

    monkeypatch.setattr(monitor_probes, "cross_val_predict", predict)
    truth, features = np.arange(60) % 2, np.zeros((60, 2), np.float32)
    assert labelled(truth, np.arange(60))(features, list(range(60))) == {"probe/made up": 1, "knn/made up": 1}


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_images_that_cannot_be_read_never_stop_a_look(lost: int) -> None:
    """Three of the rarer class, a patient each: without one of them there are no three folds."""
    truth = np.repeat([0, 1], [20, 3])
    features = np.random.default_rng(0).normal(size=(23, 8)).astype(np.float32)
    judge = labelled(truth, np.arange(23))
    assert set(judge(features, list(range(23)))) == {"probe/made up", "knn/made up"}
    read = list(range(23 - lost))
    assert judge(features[read], read) == {}


def test_folds_are_as_many_as_the_patients_that_were_read_allow() -> None:
    """Of four patients one is lost, which leaves three folds and no warning of a class with fewer members."""
    truth, read = np.repeat([0, 1], [20, 4]), list(range(23))
    features = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(labelled(truth, np.arange(24))(features[read], read)) == {"probe/made up", "knn/made up"}


def test_neighbours_vote_as_in_dino() -> None:
    """Weights exp(cosine / 0.07) of the 20 nearest, written out."""
    rng = np.random.default_rng(2)
    known, asked, truth = rng.normal(size=(50, 8)), rng.normal(size=(9, 8)), rng.integers(0, 3, 50)
    found = nearest_neighbours(50).fit(known, truth).predict_proba(asked)
    for row, expected in zip(asked, found, strict=True):
        cosines = known @ row / np.linalg.norm(known, axis=1) / np.linalg.norm(row)
        nearest = np.argsort(-cosines)[:20]
        votes = np.array([np.exp(cosines[nearest] / 0.07)[truth[nearest] == k].sum() for k in range(3)])
        np.testing.assert_allclose(votes / votes.sum(), expected, atol=1e-9)


def test_chosen_images_are_spread_over_the_data() -> None:
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(0, 5) == []


# ---------------------------------------------------------------------------------------------- the whole


def settings(shards: Path, **sections: Any) -> PretrainConfig:
    model = {
        "encoder": "vit_tiny_patch16_224",
        "image_size": 32,
        "scales": [{"scale": 1, **NARROW}, {"scale": 2, **NARROW}],
    }
    options = {**TINY, "proj_drop_rate": 0.3, "drop_path_rate": 0.3}  # so that mode and random numbers matter
    monitor = {"images": 24, "pictures": 1, "split": None, **sections.pop("monitor", {})}
    train = {"steps": 5, "batch_size": 4, "precision": "fp32", "log_every": 1, "warmup_steps": 0, "blr": 0.1}
    data = {"shards": str(shards), "split": None, "workers": 0}
    whole = {"data": data, "model": {**model, "encoder_options": options}, "monitor": monitor, "train": train}
    return PretrainConfig(**whole)


def parts(configured: PretrainConfig) -> tuple[Miram, ViewDataset]:
    shards = ShardDataset(configured.data.shards, configured.data.split)
    card = encoder_card(configured, shards)
    model, _ = build_objective(configured, card)
    return model, ViewDataset(shards, build_views(configured, card, model))


class Rows:
    """The same few images, step after step."""

    batches_per_epoch = 12

    def __init__(self, data: ViewDataset):
        self.data = data

    def skipped(self) -> int:
        return 0

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Iterator[Batch]:
        for step in count(start):
            batch = collate([self.data[(4 * step + i) % len(self.data), 0] for i in range(4)])
            yield {name: value for name, value in batch.items() if name != "damaged"}


def trained(configured: PretrainConfig, folder: Path, monitored: bool) -> Trainer:
    AcceleratorState._reset_state(True)
    model, data = parts(configured)
    run = Run(folder, "pretrain")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(configured))
    monitor = Monitors(configured, model, data, run) if monitored else None
    trainer = Trainer(run, model, Rows(data), configured.train, 3, make_accelerator(), monitor)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def watched(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    configured = settings(phantoms, monitor={"every": 1, "task": "mass"})
    return trained(configured, tmp_path_factory.mktemp("monitors") / "watched", True)


def test_a_training_watched_at_every_step_learns_the_same_bytes(
    watched: Trainer, phantoms: Path, tmp_path: Path
) -> None:
    alone = trained(settings(phantoms), tmp_path / "alone", False)
    pairs = zip(watched.objective.state_dict().items(), alone.objective.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    a, b = (read_metrics(t.run.folder / "metrics.jsonl") for t in (watched, alone))
    assert [(line["loss"], line["grad_norm"]) for line in a] == [(line["loss"], line["grad_norm"]) for line in b]


def test_every_look_is_in_the_log_and_the_newest_pictures_are_in_the_report(watched: Trainer, tmp_path: Path) -> None:
    folder = watched.run.folder
    lines = read_metrics(folder / "metrics.jsonl")
    assert all(1 <= line["rankme"] <= 32 for line in lines)
    assert all(0 <= line[name] <= 1 for line in lines for name in ("probe/mass", "knn/mass"))
    assert len({line["rankme"] for line in lines}) == 5
    assert sorted(path.name for path in (folder / "figures").glob("*.png")) == ["attention.png", "reconstructions.png"]
    kept = sorted(path.name for path in (folder / "figures" / "steps").iterdir())
    assert kept == [f"{name}-{step:08d}.png" for name in ("attention", "reconstructions") for step in (1, 2, 4)]
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "borrows from the truth" in page
    assert all(name in page for name in ("rankme", "probe/mass", "knn/mass"))


def test_a_look_leaves_mode_random_numbers_gradients_and_weights_as_they_were(phantoms: Path, tmp_path: Path) -> None:
    configured = settings(phantoms, monitor={"task": "mass"})
    model, data = parts(configured)
    model.train()
    model.encoder.blocks[0].eval()  # as a frozen part may be
    before, weights = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    monitor = Monitors(configured, model, data, Run(tmp_path, "pretrain"))
    drawn, numpy_drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = monitor(1), monitor(2)
    assert first == second
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (np.random.get_state()[1] == numpy_drawn).all()
    assert [m.training for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_features_are_those_of_the_probe(phantoms: Path, tmp_path: Path) -> None:
    configured = settings(phantoms, monitor={"images": 1000})
    model, data = parts(configured)
    monitor = Monitors(configured, model, data, Run(tmp_path, "pretrain"))
    model.eval()
    with torch.no_grad():
        found = monitor.album.features()
    assert found.shape == (48, 32)
    features = cached_features(model.encoder, data.shards, Reading(), 5, tmp_path, "test")
    np.testing.assert_allclose(found, features.pooled(-1, "mean"), atol=1e-5)


def test_images_are_read_once(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured = settings(phantoms, monitor={"images": 7})
    model, data = parts(configured)
    monitor = Monitors(configured, model, data, Run(tmp_path, "pretrain"))
    read: list[int] = []
    original = ShardDataset._read
    monkeypatch.setattr(ShardDataset, "_read", lambda self, i: read.append(i) or original(self, i))
    monitor(1)
    assert len(read) == 7 + 1
    monitor(2)
    assert len(read) == 7 + 1


def test_a_damaged_image_is_named_and_left_out(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = settings(phantoms, monitor={"images": 48, "task": "mass"})
    model, data = parts(configured)
    monitor = Monitors(configured, model, data, Run(tmp_path, "pretrain"))
    original = ShardDataset.__getitem__

    def broken(self: ShardDataset, i: int) -> Any:
        if i == 5:
            raise UserError("sample 5 is damaged")
        return original(self, i)

    monkeypatch.setattr(ShardDataset, "__getitem__", broken)
    assert set(monitor(1)) == {"rankme", "probe/mass", "knn/mass"}
    assert 5 not in monitor.album.read
    assert len(monitor.album.read) == 47
    assert capsys.readouterr().err.count("left out: sample 5 is damaged") == 1


def test_weights_that_are_no_numbers_are_left_to_the_trainer(phantoms: Path, tmp_path: Path) -> None:
    configured = settings(phantoms)
    model, data = parts(configured)
    nn.init.constant_(model.encoder.norm.weight, torch.nan)
    assert Monitors(configured, model, data, Run(tmp_path, "pretrain"))(1) == {}


@pytest.mark.parametrize(
    ("monitor", "said"),
    [
        ({"task": "nosuch"}, r"monitor\.task: the data has no label 'nosuch'; it can be: calc, density, mass"),
        ({"task": "density", "images": 4}, r"monitor\.task=density: of the 4 images .* of 1 patient, fewer than 3"),
        ({"task": "mass", "images": 1}, r"monitor\.task=mass: of the 1 images looked at every one is '.'"),
        ({"shards": "nosuch"}, r"^monitor\.shards: the data folder nosuch is not there"),
        ({"split": "val"}, r"^monitor\.split: .* has no split 'val'[^(]*$"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_the_training(
    monitor: dict[str, Any], said: str, phantoms: Path, tmp_path: Path
) -> None:
    configured = settings(phantoms, monitor=monitor)
    model, data = parts(configured)
    with pytest.raises(UserError, match=said):
        Monitors(configured, model, data, Run(tmp_path, "pretrain"))


def test_of_another_data_set_every_split_is_offered(phantoms: Path, tmp_path: Path) -> None:
    """Of training's own, null means what training uses, so that the hint would be wrong there."""
    configured = settings(phantoms, monitor={"shards": str(phantoms), "split": "val"})
    model, data = parts(configured)
    with pytest.raises(UserError, match=r"^monitor\.shards: .* has no split 'val'.*\(monitor\.split=null takes all\)$"):
        Monitors(configured, model, data, Run(tmp_path, "pretrain"))


def test_that_no_maps_are_drawn_is_said_once(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = settings(phantoms)
    model, data = parts(configured)
    monkeypatch.setattr("miram.pretrain.monitors.has_maps", lambda vit: False)
    monitor = Monitors(configured, model, data, Run(tmp_path, "pretrain"))
    monitor(1), monitor(2)
    assert capsys.readouterr().err.count("no attention maps are drawn of an encoder with Attention") == 1
    assert not (tmp_path / "figures" / "attention.png").exists()


def test_probes_may_look_at_another_split_or_another_data_set(phantoms: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(phantoms, tmp_path / "copy")
    for monitor, root, split in (
        ({"split": "test"}, phantoms, {"test"}),
        ({"shards": str(copy), "split": "train"}, copy, {"train"}),
        ({"shards": str(copy)}, copy, {"train", "test"}),
        ({}, phantoms, {"train", "test"}),
    ):
        configured = settings(phantoms, monitor=monitor)
        model, data = parts(configured)
        shards = Monitors(configured, model, data, Run(tmp_path, "pretrain")).album.shards
        assert shards.roots == [str(root)]
        assert set(shards.splits) == split


class Pairs(Objective):
    """Whatever compares two views."""

    loss_names, loss_weights = ("pair",), (1.0,)

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        self.encoder = encoder


def test_pairs_of_views_are_shown_where_views_are_compared(phantoms: Path, tmp_path: Path) -> None:
    configured = settings(phantoms)
    model, data = parts(configured)

    def two(sample: Any, epoch: int) -> dict[str, Tensor]:
        views = build_views(configured, encoder_card(configured, data.shards), model)(sample, epoch)
        return {"key": views["key"], "view/a": views["view/1"], "view/b": views["view/1"].flip(-1)}

    monitor = Monitors(configured, Pairs(model.encoder), ViewDataset(data.shards, two), Run(tmp_path, "pretrain"))
    assert set(monitor(1)) == {"rankme"}
    captions = json.loads((tmp_path / "figures" / "captions.json").read_text())
    assert set(captions) - {"schema"} == {"views.png", "attention.png"}
    assert (tmp_path / "figures" / "views.png").read_bytes().startswith(b"\x89PNG")
