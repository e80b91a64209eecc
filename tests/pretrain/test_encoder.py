"""Encoder files that timm alone can load, and an honest refusal of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import miram
from miram.engine.errors import UserError
from miram.pretrain.encoder import EncoderCard, build_encoder, card_for, load_encoder, random_like, save_encoder

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
