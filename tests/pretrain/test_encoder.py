"""Encoder files that timm alone can load, and an honest refusal of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import miram
from miram.engine.errors import UserError
from miram.pretrain.config import ScaleSection
from miram.pretrain.encoder import (
    EncoderCard,
    build_encoder,
    card_for,
    encode_visible,
    normalisation,
    save_encoder,
    set_channels,
)
from miram.pretrain.miram import Miram
from miram.pretrain.weights.loading import load_encoder, random_like

SHAPE = {"depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    card = card_for("vit_tiny_patch16_224", (48, 32), SHAPE)
    card = EncoderCard(architecture=card.architecture, kwargs=card.kwargs, mean=(0.3,), std=(0.2,))
    torch.manual_seed(3)
    save_encoder(tmp_path, build_encoder(card), card)
    return tmp_path


def test_timm_alone_loads_the_weights_strictly(saved: Path) -> None:
    card = json.loads((saved / "encoder.json").read_text())
    vit = timm.create_model(card["architecture"], **card["kwargs"])
    vit.load_state_dict(load_file(saved / "encoder.safetensors"), strict=True)
    assert card["kwargs"]["in_chans"] == 1
    images = torch.randn(2, 1, 48, 32)
    torch.testing.assert_close(vit.eval()(images), miram.load_encoder(saved)(images))


def test_a_full_size_name_needs_nothing_but_channels_and_size(tmp_path: Path) -> None:
    card = card_for("vit_tiny_patch16_224", (64, 64), {})
    save_encoder(tmp_path, build_encoder(card), card)
    vit = timm.create_model(card.architecture, in_chans=1, num_classes=0, img_size=(64, 64))
    vit.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)


def test_folder_and_file_are_the_same_encoder_and_carry_their_normalisation(saved: Path) -> None:
    for place in (saved, saved / "encoder.safetensors", str(saved)):
        vit = load_encoder(place)
        assert isinstance(vit, VisionTransformer)
        assert not vit.training
        config = timm.data.resolve_model_data_config(vit)
        assert (config["mean"], config["std"], config["input_size"]) == ((0.3,), (0.2,), (1, 48, 32))


def test_random_control_has_the_shape_but_not_the_weights(saved: Path) -> None:
    trained, first, again, other = (
        load_encoder(saved),
        random_like(saved, 1),
        random_like(saved, 1),
        random_like(saved, 2),
    )
    shapes = [{k: v.shape for k, v in vit.state_dict().items()} for vit in (trained, first)]
    assert shapes[0] == shapes[1]
    weight = "blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], trained.state_dict()[weight])


def test_initialisation_is_mae_s() -> None:
    """Xavier-uniform bounds, zero biases, the patch projection seen as one matrix."""
    vit = build_encoder(card_for("vit_tiny_patch16_224", (224, 224), {}))
    weight = vit.blocks[3].attn.qkv.weight
    bound = (6 / (192 + 576)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not vit.blocks[3].attn.qkv.bias.any()
    assert vit.patch_embed.proj.weight.abs().max() <= (6 / (256 + 192)) ** 0.5
    assert not vit.pos_embed.requires_grad


@pytest.mark.parametrize("name", ["vit_tinny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_what_is_no_vit_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=name):
        card_for(name, (224, 224), {})


def test_a_vit_that_norms_only_pooled_features_and_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="norms after pooling"):
        build_encoder(card_for("vit_tiny_patch16_224", (224, 224), {"depth": 1, "global_pool": "avg"}))
    with pytest.raises(UserError, match="depht"):
        build_encoder(card_for("vit_tiny_patch16_224", (224, 224), {"depht": 1}))


def test_missing_or_foreign_weights_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")
    tensors = load_file(saved / "encoder.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, saved / "encoder.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight"):
        load_encoder(saved)
    (saved / "encoder.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"encoder\.safetensors"):
        load_encoder(saved)


@pytest.mark.parametrize(
    "change", [{"mean": None}, {"mean": 5}, {"architecture": None}, {"kwargs": 3}, {"kwargs": {}}, {"std": ["a"]}]
)
def test_a_damaged_card_is_refused_by_name(change: dict[str, object], saved: Path) -> None:
    card = json.loads((saved / "encoder.json").read_text()) | change
    for content in (card, {key: value for key, value in card.items() if key not in change}):
        (saved / "encoder.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"encoder\.json is damaged"):
            load_encoder(saved)


def test_an_unknown_name_is_not_answered_with_all_that_timm_knows() -> None:
    with pytest.raises(UserError, match="qqqqqqqqqq") as refused:
        card_for("qqqqqqqqqq", (224, 224), {})
    assert len(str(refused.value)) < 200


# ---------------------------------------------------------------------------------------------- registers, rotation

NARROW = {"depth": 2, "embed_dim": 64, "num_heads": 2}
MODERN = {  # name: patch, options
    "vit_small_patch14_dinov2": (14, {}),
    "vit_small_patch14_reg4_dinov2": (14, {}),
    "vit_small_patch16_dinov3": (16, {}),
    "vit_small_patch16_rope_mixed_ape_224": (
        16,
        {"global_pool": "token"},
    ),  # rotary, learnt by each block, and absolute
    "eva02_tiny_patch14_224": (14, {"global_pool": "token"}),
}


def modern(name: str) -> tuple[VisionTransformer | Eva, int]:
    patch, options = MODERN[name]
    torch.manual_seed(5)
    vit = build_encoder(card_for(name, (2 * patch, 3 * patch), {**NARROW, **options}))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval(), patch


@pytest.mark.parametrize("name", MODERN)
def test_all_patches_are_the_vit_itself(name: str) -> None:
    vit, patch = modern(name)
    images = torch.randn(2, 1, 2 * patch, 3 * patch)
    everything = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(encode_visible(vit, images, everything), vit.forward_features(images))


@pytest.mark.parametrize("name", MODERN)
def test_visible_patches_are_the_whole_with_the_others_never_attended_to(name: str) -> None:
    """Brute force: every token is computed, hidden ones are masked as keys in every block."""
    vit, patch = modern(name)
    images, prefix = torch.randn(2, 1, 2 * patch, 3 * patch), vit.num_prefix_tokens
    ids_keep = torch.tensor([[5, 0, 2], [3, 1, 4]])
    seen = torch.zeros(2, 1, 1, prefix + 6, dtype=torch.bool)
    seen[..., :prefix] = True
    for row, ids in enumerate(ids_keep):
        seen[row, ..., prefix + ids] = True
    whole = vit.forward_features(images, attn_mask=seen.expand(-1, -1, prefix + 6, -1))
    expected = torch.stack([torch.cat([w[:prefix], w[prefix + ids]]) for w, ids in zip(whole, ids_keep, strict=True)])
    torch.testing.assert_close(encode_visible(vit, images, ids_keep), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODERN)
def test_they_learn_through_miram_with_no_dead_parameter(name: str) -> None:
    vit, patch = modern(name)
    model = Miram(vit, [ScaleSection(scale=1, depth=1, width=16, heads=2)], mask_ratio=0.5)
    model.train()({"view/1": torch.randn(2, 1, 2 * patch, 3 * patch), "noise": torch.rand(2, 6)}).sum().backward()
    dead = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert dead == []
    assert all(not p.requires_grad for key, p in vit.named_parameters() if key == "pos_embed")


@pytest.mark.parametrize("name", MODERN)
def test_they_come_back_from_their_file_and_timm_alone_loads_it(name: str, tmp_path: Path) -> None:
    vit, patch = modern(name)
    card = card_for(name, (2 * patch, 3 * patch), {**NARROW, **MODERN[name][1]})
    save_encoder(tmp_path, vit, card)
    images = torch.randn(2, 1, 2 * patch, 3 * patch)
    alone = timm.create_model(card.architecture, **card.kwargs).eval()
    alone.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    for loaded in (load_encoder(tmp_path), alone):
        torch.testing.assert_close(loaded(images), vit(images))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    vit, patch = modern(name)
    images, ids_keep = torch.randn(2, 1, 2 * patch, 3 * patch), torch.tensor([[5, 0, 2], [3, 1, 4]])
    gradients = []
    for recompute in (False, True):
        vit.zero_grad()
        vit.set_grad_checkpointing(recompute)
        encode_visible(vit, images, ids_keep).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in vit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_a_model_without_positions_is_refused() -> None:
    with pytest.raises(UserError, match="positions"):
        build_encoder(card_for("vit_tiny_patch16_224", (32, 32), {"depth": 1, "pos_embed": "none"}))


# ---------------------------------------------------------------------------------------------- channels

COLOUR = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def colour_vit() -> VisionTransformer:
    torch.manual_seed(6)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **SHAPE).eval()
    vit.pretrained_cfg = {**vit.pretrained_cfg, **COLOUR}
    return vit


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_pictures_give_any_number_of_channels_what_they_gave_three(channels: int) -> None:
    """Each normalised by its own model: three unequal means and deviations, one mean and deviation."""
    vit, grey = colour_vit(), torch.rand(2, 1, 32, 32)
    mean, std = (torch.tensor(COLOUR[key])[:, None, None] for key in ("mean", "std"))
    before = vit((grey.expand(-1, 3, -1, -1) - mean) / std)
    plain = vit.patch_embed.proj.weight.sum(1)
    set_channels(vit, channels)
    pixels = grey.expand(-1, channels, -1, -1)
    after = vit(torch.stack([torch.from_numpy(normalisation(vit)(picture.numpy().copy())) for picture in pixels]))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vit.patch_embed.proj.weight.sum(1), plain, atol=0.05 * plain.abs().max().item(), rtol=0)


def test_timm_s_own_weights_are_the_same_for_grey_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `timm:NAME` gives to a probe."""
    source, downloaded = colour_vit(), colour_vit()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: downloaded)
    vit, grey = load_encoder("timm:vit_tiny_patch16_224"), torch.rand(1, 1, 32, 32)
    mean, std = (torch.tensor(COLOUR[key])[:, None, None] for key in ("mean", "std"))
    expected = source((grey.expand(-1, 3, -1, -1) - mean) / std)
    assert vit.patch_embed.proj.in_channels == 1
    torch.testing.assert_close(
        vit(torch.from_numpy(normalisation(vit)(grey.numpy().copy()))), expected, atol=1e-5, rtol=1e-5
    )


def test_a_file_of_others_is_sent_to_convert(tmp_path: Path) -> None:
    (tmp_path / "vit.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"run `miram convert .*vit\.pth .*vit-encoder`"):
        load_encoder(tmp_path / "vit.pth")
