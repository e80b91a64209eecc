"""The feature cache against the ViT itself: hooks on its blocks, its own tokens, and files that were tampered with."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file
from vits import VITS, small

from miram.data.config import CropSection
from miram.data.shards import ShardDataset
from miram.data.views import draw_box, windows
from miram.engine.errors import UserError
from miram.engine.seeding import generator
from miram.finetune.features import Features, Reading, cached_features, extract, key, states
from miram.pretrain.encoder import Encoder, normalisation, weights_digest

BARE = small("vit_small_patch16_dinov3", class_token=False, num_reg_tokens=0)  # rotary, no prefix token at all
KINDS = VITS | {"rotary, bare": lambda: BARE}
EVERYTHING = Reading(layers=(-1, -2), pools=("mean", "cls", "cls+mean"), crops=3, tokens=True)


@pytest.fixture(scope="module")
def shards(phantoms: Path) -> ShardDataset:
    return ShardDataset(phantoms)


@pytest.fixture(scope="module")
def vit() -> Encoder:
    return small(image=(32, 48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def features(vit: Encoder, shards: ShardDataset, folder: Path) -> Features:
    return cached_features(vit, shards, EVERYTHING, 7, folder, "test")


def seen(vit: Encoder, shards: ShardDataset, i: int) -> torch.Tensor:
    return windows(shards[i], vit.patch_embed.img_size, normalisation(vit))


# ---------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_what_hooks_on_the_blocks_see_through_the_final_norm(kind: str, recompute: bool) -> None:
    vit = copy.deepcopy(KINDS[kind]())
    vit.set_grad_checkpointing(recompute)
    images, after = torch.randn(3, 1, *vit.patch_embed.img_size), []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, out: after.append(out))
    with torch.no_grad():
        last = vit.forward_features(images)
        found = states(vit, images, {-1, -2})
        for layer, expected in ((-1, last), (-2, vit.norm(after[-2]))):
            torch.testing.assert_close(torch.cat(found[layer], dim=1), expected, rtol=0, atol=0)
    assert found[-1][0].shape[1] == vit.num_prefix_tokens


@pytest.mark.parametrize("pool", ["mean", "cls", "cls+mean"])
def test_a_feature_is_the_mean_over_windows_of_the_pooled_tokens(
    pool: Any, vit: Encoder, shards: ShardDataset, features: Features
) -> None:
    found = features.pooled(-1, pool)
    assert found.shape == (48, 96 if pool == "cls+mean" else 48)
    assert found.dtype == np.float32
    for i in (0, 5, 47):
        with torch.no_grad():
            tokens = vit.forward_features(seen(vit, shards, i))
        parts = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
        expected = torch.cat([parts[part] for part in pool.split("+")], dim=1)
        np.testing.assert_allclose(found[i], expected.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(features.windows(-1, pool)[features.owners == i], expected, rtol=1e-4, atol=1e-5)


def test_every_layer_has_its_own_and_the_owners_are_in_order(features: Features) -> None:
    assert not np.allclose(features.pooled(-1, "mean"), features.pooled(-2, "mean"), atol=1e-2)
    assert (np.diff(features.owners) >= 0).all()
    assert set(features.owners) == set(range(48))


def test_tokens_average_to_the_pooled_feature_and_stay_with_their_image(
    vit: Encoder, shards: ShardDataset, features: Features
) -> None:
    patches = vit.patch_embed.num_patches
    assert features.token_counts.tolist() == [len(seen(vit, shards, i)) * patches for i in range(48)]
    for i in (0, 5, 47):
        tokens = features.tokens(i)
        assert (tokens.dtype, tokens.shape) == (np.float32, (features.token_counts[i], 48))
        np.testing.assert_allclose(tokens.mean(0), features.pooled(-1, "mean")[i], atol=2e-3)  # half precision on disk
    with torch.no_grad():
        expected = vit.forward_features(seen(vit, shards, 5))[:, 1:].flatten(0, 1)
    np.testing.assert_allclose(features.tokens(5), expected, atol=3e-3)


def test_crops_are_those_that_training_draws(vit: Encoder, shards: ShardDataset, features: Features) -> None:
    """Boxes from (seed, crop number, key) alone; their pixels by torch's own antialiased resizing."""
    found = features.crops(-1, "mean")
    assert found.shape == (48, 3, 48)
    size, crop = vit.patch_embed.img_size, CropSection()
    for i, j in ((0, 0), (5, 2), (47, 1)):
        sample, normalise = shards[i], normalisation(vit)
        rng = generator(0, j, "crop", sample.key)
        top, left, height, width = draw_box(rng, sample.pixels, size, crop)
        mirrored = rng.random() < 0.5
        theta = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])
        image = torch.from_numpy(np.asarray(sample.pixels, np.float32))[None, None]
        h, w = image.shape[2:]
        fine = 8  # samples a pixel and axis, averaged: brute force
        theta[0, 0] = torch.tensor([width / w, 0, (2 * left + width) / w - 1])
        theta[0, 1] = torch.tensor([0, height / h, (2 * top + height) / h - 1])
        grid = torch.nn.functional.affine_grid(theta, [1, 1, fine * size[0], fine * size[1]], align_corners=False)
        cut = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
        cut = torch.nn.functional.avg_pool2d(cut, fine)
        cut = cut.flip(3) if mirrored else cut
        with torch.no_grad():
            pixels = torch.from_numpy(normalise(cut[0].numpy().copy(), sample.max_value))[None]
            expected = vit.forward_features(pixels)[0, 1:].mean(0)
        others = np.delete(found.reshape(-1, 48), 3 * i + j, axis=0)
        gap = np.abs(found[i, j] - expected.numpy()).max()
        assert gap < 0.05
        assert gap < np.abs(others - expected.numpy()).max(1).min()


def test_neither_batches_nor_company_change_a_crop(
    vit: Encoder, shards: ShardDataset, features: Features, phantoms: Path, tmp_path: Path
) -> None:
    fewer = cached_features(vit, shards, replace(EVERYTHING, crops=2), 16, tmp_path, "test")
    np.testing.assert_allclose(fewer.crops(-1, "mean"), features.crops(-1, "mean")[:, :2], rtol=1e-4, atol=1e-5)
    half = ShardDataset(phantoms, "train")
    kept = np.isin(shards.rows.column("key"), half.rows.column("key"))
    alone = cached_features(vit, half, Reading(crops=3), 16, tmp_path, "test")
    np.testing.assert_allclose(alone.crops(-1, "mean"), features.crops(-1, "mean")[kept], rtol=1e-4, atol=1e-5)
    other = cached_features(vit, shards, replace(EVERYTHING, seed=1), 16, tmp_path, "test")
    assert not np.allclose(other.crops(-1, "mean"), features.crops(-1, "mean"), atol=1e-2)
    np.testing.assert_allclose(other.pooled(-1, "mean"), features.pooled(-1, "mean"), rtol=1e-4, atol=1e-5)


def test_windows_do_not_depend_on_what_else_is_read(vit: Encoder, shards: ShardDataset, tmp_path: Path) -> None:
    """Bit for bit, so that a figure stays when another probe is asked for beside it."""
    plain = cached_features(vit, shards, Reading(), 16, tmp_path, "test").pooled(-1, "mean")
    for reading in (replace(EVERYTHING, crops=0), EVERYTHING):
        beside = cached_features(vit, shards, reading, 16, tmp_path, "test").pooled(-1, "mean")
        np.testing.assert_array_equal(beside, plain)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        (Reading(layers=(-3,)), "layer -3"),
        (Reading(layers=(0,)), "layer 0"),
        (Reading(crops=-1), "-1 crops"),
        (Reading(layers=()), "at least one"),
        (Reading(pools=()), "at least one"),
    ],
)
def test_what_cannot_be_read_is_refused(
    reading: Reading, said: str, vit: Encoder, shards: ShardDataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        cached_features(vit, shards, reading, 16, tmp_path, "test")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["no class token", "average of registers", "rotary, bare", "map pooling"])
def test_a_register_is_no_class_token(kind: str, shards: ShardDataset, tmp_path: Path) -> None:
    for pool in ("cls", "cls+mean"):
        with pytest.raises(UserError, match="no class token"):
            cached_features(KINDS[kind](), shards, Reading(pools=(pool,)), 16, tmp_path, "test")
    assert cached_features(KINDS[kind](), shards, Reading(), 16, tmp_path, "test").pooled(-1, "mean").shape == (48, 48)


def test_features_that_are_not_finite_are_refused_and_leave_nothing(shards: ShardDataset, tmp_path: Path) -> None:
    broken = small(image=32)
    with torch.no_grad():
        broken.norm.bias += 1e5  # finite as such, too large for tokens in half precision
    cached_features(broken, shards, Reading(), 16, tmp_path / "kept", "test")
    with pytest.raises(UserError, match=r"test.* not finite"):
        cached_features(broken, shards, Reading(tokens=True), 16, tmp_path / "lost", "test")
    assert [p.name for p in (tmp_path / "lost").iterdir() if p.suffix != ".lock"] == []


def test_other_channels_are_refused(shards: ShardDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 channels and the data has 1"):
        cached_features(small(image=32, in_chans=3), shards, Reading(), 16, tmp_path, "test")


# ---------------------------------------------------------------------------------------------- which file is taken


def test_the_same_features_are_read_and_not_computed_again(
    vit: Encoder, shards: ShardDataset, features: Features, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miram.finetune.features.extract", None)
    again = cached_features(copy.deepcopy(vit), shards, EVERYTHING, 16, folder, "another name")
    assert np.array_equal(again.pooled(-2, "cls"), features.pooled(-2, "cls"))
    assert again.path == features.path


def twins() -> list[Encoder]:
    """Encoders with the same tensors that are not the same function."""

    def made(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> Encoder:
        torch.manual_seed(0)
        options = {"depth": 2, "embed_dim": 64, "num_heads": 2, "in_chans": 1, "img_size": 32, "num_classes": 0}
        return timm.create_model(name, **(options | kwargs)).eval()

    rotary = "vit_small_patch16_dinov3"
    first = [made(), made(num_heads=4), made(norm_layer=lambda dim, **_: torch.nn.LayerNorm(dim, eps=1e-3))]
    first.append(made(act_layer=torch.nn.ReLU))
    first.append(made())
    first[-1].pretrained_cfg = {**first[-1].pretrained_cfg, "mean": (0.1,), "std": (0.1,)}
    return [*first, made(rotary), made(rotary, img_size=(32, 48)), made(rotary, rope_temperature=50.0)]


def test_two_encoders_never_share_a_file(shards: ShardDataset, tmp_path: Path) -> None:
    made = twins()
    assert len({weights_digest(vit) for vit in made}) == 2  # the plain ones and the rotary ones
    assert len({key(vit, shards, Reading()) for vit in made}) == len(made)
    found = [cached_features(vit, shards, Reading(), 16, tmp_path, "test").pooled(-1, "mean") for vit in made]
    assert all(not np.array_equal(found[i], found[j]) for i in range(len(made)) for j in range(i))


def test_the_key_follows_weights_samples_and_reading_and_nothing_else(
    vit: Encoder, shards: ShardDataset, phantoms: Path
) -> None:
    before, changed = key(vit, shards, EVERYTHING), copy.deepcopy(vit)
    assert key(changed, shards, EVERYTHING) == before
    assert key(changed.double(), shards, EVERYTHING) != before
    changed = copy.deepcopy(vit)
    changed.set_grad_checkpointing(True)
    assert key(changed.train(), shards, replace(EVERYTHING, layers=(-2, -1, -1))) == before
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.bias[3] += 1e-6
    assert key(changed, shards, EVERYTHING) != before
    assert key(vit, ShardDataset(phantoms, "train"), EVERYTHING) != before
    for change in ({"layers": (-1,)}, {"pools": ("mean",)}, {"crops": 2}, {"tokens": False}, {"seed": 1}):
        assert key(vit, shards, replace(EVERYTHING, **change)) != before


def test_the_digest_of_weights_sees_names_shapes_types_and_every_bit() -> None:
    def one(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

    a, b = torch.zeros(2, 3), torch.ones(4)
    assert one(a=a, b=b) == one(b=b, a=a)
    flipped = a.clone()
    flipped.view(torch.int32)[1, 2] = 1
    others = [
        {"a": a, "c": b},
        {"a": a.T, "b": b},
        {"a": flipped, "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a},
    ]
    half = [{"a": a.bfloat16(), "b": b}, {"a": a.half(), "b": b}]
    assert len({one(**tensors) for tensors in [{"a": a, "b": b}, *others, *half]}) == 8


@pytest.mark.parametrize("damage", ["cut", "bit", "no json", "other json", "bad json"])
def test_a_damaged_file_is_made_again(
    damage: str, vit: Encoder, shards: ShardDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = cached_features(vit, shards, Reading(), 16, tmp_path, "test")
    expected, card = first.pooled(-1, "mean"), first.path.with_suffix(".json")
    content = bytearray(first.path.read_bytes())
    if damage == "cut":
        first.path.write_bytes(content[:-4])
    elif damage == "bit":
        content[-1000] ^= 64
        first.path.write_bytes(content)
    elif damage == "no json":
        card.unlink()
    else:
        card.write_text(json.dumps({"schema": "other"}) if damage == "other json" else "{")
    again = cached_features(vit, shards, Reading(), 16, tmp_path, "test")
    assert np.array_equal(again.pooled(-1, "mean"), expected)
    assert "damaged" in capsys.readouterr().err
    assert cached_features(vit, shards, Reading(), 16, tmp_path, "test").path == again.path
    assert "damaged" not in capsys.readouterr().err


def test_any_reader_of_safetensors_reads_the_file(features: Features) -> None:
    columns = load_file(features.path)
    pooled = {
        f"{kind}/{layer}/{part}" for kind in ("windows", "crops") for layer in (-1, -2) for part in ("cls", "mean")
    }
    assert columns.keys() == pooled | {"owners", "tokens"}
    assert columns["tokens"].dtype == np.float16
    assert columns["owners"].tolist() == features.owners.tolist()


def test_a_killed_process_leaves_no_file_and_what_it_left_goes(
    shards: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies with everything in its hands but the file."""

    def die(*arguments: Any) -> None:
        extract(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    arguments = (small(image=32), shards, Reading(), 16, tmp_path, "test")
    with monkeypatch.context() as patch:
        patch.setattr("miram.finetune.features.extract", die)
        dying = get_context("fork").Process(target=cached_features, args=arguments)
        dying.start()
        dying.join()
    assert dying.exitcode == -signal.SIGKILL
    assert [p.suffix for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    assert any(p.suffix == ".partial" for p in tmp_path.iterdir())
    expected = [i for i in range(48) for _ in seen(arguments[0], shards, i)]
    assert cached_features(*arguments).owners.tolist() == expected
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".lock", ".safetensors"]


def test_of_several_that_want_the_same_one_computes_and_the_others_wait(
    shards: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is of the open file, so threads meet it as processes do."""
    begun = []

    def slow(*arguments: Any) -> None:
        begun.append(arguments)
        time.sleep(0.2)
        extract(*arguments)

    monkeypatch.setattr("miram.finetune.features.extract", slow)
    arguments = (small(image=32), shards, Reading(), 16, tmp_path, "test")
    with ThreadPoolExecutor(3) as pool:
        found = [f.result() for f in [pool.submit(cached_features, *arguments) for _ in range(3)]]
    assert len(begun) == 1
    assert len({features.path for features in found}) == 1
