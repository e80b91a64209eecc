"""Foreign weights against the libraries they come from: transformers' own outputs, timm's own loading."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from miram.engine.errors import UserError, exit_code
from miram.pretrain.config import ScaleSection
from miram.pretrain.encoder import build_encoder, card_for, normalisation, save_encoder
from miram.pretrain.miram import Miram
from miram.pretrain.weights.convert import convert
from miram.pretrain.weights.layouts import translate
from miram.pretrain.weights.loading import load_encoder, read_provenance
from miram.pretrain.weights.start import initialise_decoder, initialise_encoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SHAPE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-6,
}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 128,
}
TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


def stirred(model: Any) -> Any:
    """Every parameter at random, so that zeros and ones hide nothing; MAE's fixed positions stay."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def mae(kind: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return stirred(kind(ViTMAEConfig(**SHAPE, **DECODER, mask_ratio=0.0, **options)))


def vit(kind: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return stirred(kind(ViTConfig(**SHAPE, **options)))


def dino(kind: type[PreTrainedModel], config: type[Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    return stirred(kind(config(**shape)))


FOREIGN: dict[str, Callable[[], PreTrainedModel]] = {
    "ViTMAEModel": lambda: mae(ViTMAEModel),
    "ViTMAEForPreTraining": lambda: mae(ViTMAEForPreTraining),
    "ViTModel": lambda: vit(ViTModel),
    "ViTModel without biases": lambda: vit(ViTModel, qkv_bias=False),
    "ViTForImageClassification": lambda: vit(ViTForImageClassification),
    "Dinov2Model": lambda: dino(Dinov2Model, Dinov2Config),
    "Dinov2WithRegistersModel": lambda: dino(Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
}


def tokens(model: PreTrainedModel, images: Tensor) -> Tensor:
    """What transformers itself says."""
    body = getattr(model, model.base_model_prefix, model)
    if "MAE" in type(model).__name__:
        return body(images, noise=torch.arange(16.0).expand(len(images), -1)).last_hidden_state
    return body(images).last_hidden_state


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("saved_as", ["folder", "pth"])
def test_a_transformers_model_keeps_its_tokens(name: str, saved_as: str, tmp_path: Path) -> None:
    """A folder has the names of old releases, `state_dict()` those of release 5."""
    model, source = FOREIGN[name](), tmp_path / "hub"
    model.save_pretrained(source)
    if saved_as == "pth":
        (source / "model.safetensors").unlink()
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    convert(source, tmp_path / "out", channels=3)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_encoder(tmp_path / "out").forward_features(images), tokens(model, images), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", ["ViTMAEModel", "Dinov2WithRegistersModel"])
def test_a_grey_picture_gives_one_channel_what_it_gave_three(name: str, tmp_path: Path) -> None:
    model = FOREIGN[name]()
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    convert(tmp_path / "hub", tmp_path / "out")
    encoder, grey = load_encoder(tmp_path / "out"), torch.rand(2, 1, 32, 32)
    colour = (grey.expand(-1, 3, -1, -1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    single = torch.from_numpy(normalisation(encoder)(grey.numpy().copy()))
    with torch.inference_mode():
        torch.testing.assert_close(encoder.forward_features(single), tokens(model, colour), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- layouts of one ViT


def original(**options: Any) -> VisionTransformer:
    torch.manual_seed(1)
    return stirred(timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, "num_classes": 0, **TINY, **options}))


def facebook(model: VisionTransformer, full: bool) -> dict[str, Tensor]:
    """The state of facebookresearch/mae around an encoder."""
    state = dict(model.state_dict())
    if full:
        from_hf = mae(ViTMAEForPreTraining).decoder
        state |= {
            "mask_token": from_hf.mask_token.data,
            "decoder_pos_embed": torch.cat([torch.zeros(1, 1, 32), grid()], 1),
        }
        state |= {"decoder_embed.weight": torch.randn(32, 48), "decoder_embed.bias": torch.randn(32)}
        block = timm.models.vision_transformer.Block(32, 4, qkv_bias=True).state_dict()
        state |= {
            f"decoder_blocks.{n}.{key}": torch.randn_like(value) for n in range(2) for key, value in block.items()
        }
        state |= {"decoder_norm.weight": torch.randn(32), "decoder_norm.bias": torch.randn(32)}
        state |= {"decoder_pred.weight": torch.randn(192, 32), "decoder_pred.bias": torch.randn(192)}
    return state


def hub_file(folder: Path, state: Any, **config: Any) -> Path:
    """Weights under the hub's name, and what is told of them."""
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "pytorch_model.bin"


def grid() -> Tensor:
    from miram.pretrain.encoder import sincos_positions

    return sincos_positions((4, 4), 32)


def timms_own(path: Path, **options: Any) -> VisionTransformer:
    """The file as timm loads it."""
    overlay = {"file": str(path), "num_classes": 0, "input_size": (3, 32, 32)}
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **TINY, **options
    ).eval()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_facebook_s_layout_gives_what_timm_makes_of_it(full: bool, wrapped: bool, tmp_path: Path) -> None:
    """Also with what its trainer leaves in a file: options, optimiser and epoch."""
    model = original()
    torch.save(model.state_dict(), tmp_path / "encoder_only.pth")
    state: dict[str, Any] = facebook(model, full)
    if wrapped:
        state = {"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    name = "vit_tiny_patch16_224"
    file = hub_file(tmp_path, state, num_attention_heads=4)
    with pytest.raises(UserError, match="--architecture"):  # four heads of 12 are not what timm's tiny has
        convert(file, tmp_path / "named", architecture=name)
    lines = convert(file, tmp_path / "out", channels=3)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = timms_own(tmp_path / "encoder_only.pth", img_size=32).forward_features(images)
        torch.testing.assert_close(load_encoder(tmp_path / "out").forward_features(images), theirs)
    assert (tmp_path / "out" / "decoder.safetensors").exists() == full
    assert any(line.startswith("dropped  optimizer") for line in lines) == wrapped


@pytest.mark.parametrize("size", [(48, 32), (16, 64)])
def test_another_size_and_one_channel_are_what_timm_makes_of_them(size: tuple[int, int], tmp_path: Path) -> None:
    """timm sums the channels plainly, which is ours where they have one mean and standard deviation."""
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.save(original().state_dict(), folder / "pytorch_model.bin")
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, **half}))
    lines = convert(folder, tmp_path / "out", f"{size[0]}x{size[1]}", channels=1)
    images = torch.randn(2, 1, *size)
    with torch.inference_mode():
        theirs = timms_own(folder / "pytorch_model.bin", img_size=size, in_chans=1).forward_features(images)
        ours = load_encoder(tmp_path / "out").forward_features(images)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert f"interpolated from 4 x 4 to {size[0] // 8} x {size[1] // 8}" in "\n".join(lines)
    assert "3 channels summed to 1" in "\n".join(lines)


def test_a_classifier_is_dropped_and_said_so(tmp_path: Path) -> None:
    model = original(num_classes=7)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    lines = convert(tmp_path / "model.safetensors", tmp_path / "out", channels=3)
    dropped = {line.split(":")[0].split()[1] for line in lines if line.startswith("dropped")}
    assert dropped == {"head.weight", "head.bias"}
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_encoder(tmp_path / "out").forward_features(images), model.forward_features(images)
        )


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_a_folder_of_timm_s_own_is_read_by_its_name(name: str, tmp_path: Path) -> None:
    """Register tokens, layer scale and rotary positions; as timm pushes it to the hub."""
    torch.manual_seed(2)
    shape = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    side = 28 if "14" in name else 32
    model = stirred(timm.create_model(name, num_classes=0, img_size=side, **shape))
    timm.models._hub.save_for_hf(model, tmp_path / "hub", model_args=shape | {"img_size": side})
    convert(tmp_path / "hub", tmp_path / "out", channels=3)
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_encoder(tmp_path / "out").forward_features(images), model.forward_features(images)
        )


@pytest.mark.parametrize(
    "built", [{}, {"num_classes": 10}, {"img_size": 32, "num_classes": 10}, {"img_size": (32, 64)}]
)
@pytest.mark.parametrize("given", [{}, {"img_size": 48}])
def test_what_timm_writes_of_head_and_size_into_every_folder_is_understood(
    built: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    """`given`: a size as an integer, as older releases write it; the positions know better."""
    shape = {"depth": 1, "embed_dim": 48, "num_heads": 4}
    model = stirred(timm.create_model("vit_tiny_patch16_224", **shape, **built))
    timm.models.save_for_hf(model, tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert {"num_classes", "in_chans", "global_pool", "img_size"} <= config["model_args"].keys()
    config["model_args"] |= given if built.get("img_size") != (32, 64) else {}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "hub", tmp_path / "out", channels=3)
    loaded, images = load_encoder(tmp_path / "out"), torch.randn(1, 3, *model.patch_embed.img_size)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.forward_features(images), model.forward_features(images))
    assert loaded.num_classes == 0


def test_a_size_in_timm_s_folder_is_that_of_the_model_not_of_its_pretraining(tmp_path: Path) -> None:
    """Rotary positions have no shape to ask; an integer as older releases of timm write it."""
    shape = {"depth": 1, "embed_dim": 48, "num_heads": 4}
    model = timm.create_model("vit_small_patch16_dinov3", img_size=64, **shape).eval()
    timm.models.save_for_hf(model, tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text())
    config["model_args"]["img_size"] = 64
    path.write_text(json.dumps(config))
    assert config["pretrained_cfg"]["input_size"] == [3, 256, 256]
    convert(tmp_path / "hub", tmp_path / "out")
    assert load_encoder(tmp_path / "out").patch_embed.img_size == (64, 64)


def test_an_encoder_of_ours_may_take_another_input_and_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    card = card_for("vit_tiny_patch16_224", (32, 16), {**TINY, "in_chans": 3})
    card = replace(card, provenance={"split": "train"})
    (tmp_path / "run").mkdir()
    save_encoder(tmp_path / "run", build_encoder(card), card)
    convert(tmp_path / "run", tmp_path / "out", "64x16")
    assert load_encoder(tmp_path / "out")(torch.randn(1, 1, 64, 16)).shape == (1, 48)
    assert read_provenance(str(tmp_path / "out"))["split"] == "train"
    convert(tmp_path / "out", tmp_path / "again", "32")
    assert read_provenance(str(tmp_path / "again"))["split"] == "train"
    origin = read_provenance(str(tmp_path / "again"))["converted_from"]
    assert (origin["file"], origin["was"]["file"]) == ("out", "run")
    assert origin["was"] == read_provenance(str(tmp_path / "out"))["converted_from"]


@pytest.mark.parametrize("name", FOREIGN)
def test_every_key_has_exactly_one_fate(name: str) -> None:
    state = FOREIGN[name]().state_dict()
    weights = translate(state)
    assert sorted(fate.key for fate in weights.fates) == sorted(state)
    reached = {fate.target for fate in weights.fates if fate.verdict != "dropped"}
    assert reached == {*weights.encoder, *weights.decoder}


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (3, "no object"),
        ({"image_size": "x"}, "image_size"),
        ({"image_size": [64]}, "image_size"),
        ({"num_attention_heads": "3"}, "num_attention_heads"),
        ({"architecture": 5}, "architecture"),
        ({"architecture": "qqqqqqqqqq"}, "--architecture"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": 7}, "model_args"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"evil": 1}}, "--architecture: timm cannot build"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "deviation"),
        ({"image_mean": [0.5] * 3, "image_std": [0, 0, 0]}, "image_std"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}, "deviation"),
        ({"layer_norm_eps": "a"}, "layer_norm_eps"),
        ({"hidden_act": "relu"}, "gelu"),
        ({"decoder_num_attention_heads": "x"}, "decoder_num_attention_heads"),
        ({"model_type": "dinov3_vit"}, "timm's is"),
    ],
)
def test_a_config_that_says_what_cannot_be_is_refused_by_key(config: Any, said: str, tmp_path: Path) -> None:
    file = hub_file(tmp_path, original(num_heads=3).state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as refused:
        convert(file, tmp_path / "out")
    assert len(str(refused.value)) < 400
    assert str(tmp_path) in str(refused.value)


def test_whole_numbers_may_be_means_and_deviations(tmp_path: Path) -> None:
    file = hub_file(tmp_path, original().state_dict(), num_attention_heads=4, image_mean=[0] * 3, image_std=[1] * 3)
    assert "mean 0, standard deviation 1" in convert(file, tmp_path / "out")[2]


def test_a_config_beside_a_bare_file_is_another_model_s(tmp_path: Path) -> None:
    torch.save(original(embed_dim=192, num_heads=3).state_dict(), tmp_path / "x.pth")
    lines = [convert(tmp_path / "x.pth", tmp_path / "alone")]
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12, "image_mean": [0], "image_std": [1]}))
    lines += [convert(tmp_path / "x.pth", tmp_path / "beside")]
    assert lines[0][:-1] == lines[1][:-1]
    cards = [json.loads((tmp_path / name / "encoder.json").read_text()) for name in ("alone", "beside")]
    assert cards[0] == cards[1]


def test_transformers_dinov3_is_sent_to_timm_s(tmp_path: Path) -> None:
    """Also as a bare file."""
    model = DINOv3ViTModel(
        DINOv3ViTConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3, image_size=32)
    )
    model.save_pretrained(tmp_path / "hub")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    for source in (tmp_path / "hub", tmp_path / "x.pth"):
        with pytest.raises(UserError, match="timm's is"):
            convert(source, tmp_path / "out")


def test_out_may_be_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(original(embed_dim=192, num_heads=3).state_dict(), tmp_path / "x.pth")
    (tmp_path / "out").write_text("")
    assert exit_code(lambda: convert(tmp_path / "x.pth", tmp_path / "out")) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    file = hub_file(tmp_path, facebook(original(), full=True), num_attention_heads=4, decoder_num_attention_heads=4)
    monkeypatch.setattr("miram.pretrain.encoder.save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert(file, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out" / "decoder.safetensors").write_bytes(b"of an older conversion")
    with pytest.raises(UserError, match="already has decoder"):
        convert(file, tmp_path / "out")


def test_what_could_not_be_read_is_told_without_advice_on_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"extra": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "odd.pth").write_bytes(bytes([0xE0]) * 100)
    for name, told in (("trap", r"Path\.touch|pathlib|getattr"), ("empty", "EOFError"), ("odd", "operand 224")):
        with pytest.raises(UserError, match=told) as refused:
            convert(tmp_path / f"{name}.pth", tmp_path / "out")
        assert "PyTorch" not in str(refused.value)
        assert "documentation" not in str(refused.value)


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_a_file_that_would_run_code_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": original().state_dict(), "extra": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth cannot be read as plain tensors"):
        convert(tmp_path / "trap.pth", tmp_path / "out")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


def without(key: str) -> dict[str, Tensor]:
    return {k: v for k, v in original(num_heads=3).state_dict().items() if k != key}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(1)}, "no known layout"),
        ({}, "no tensors"),
        (without("blocks.1.mlp.fc2.bias"), r"lacks blocks\.1\.mlp\.fc2\.bias"),
        (without("") | {"blocks.1.adapter.weight": torch.zeros(2)}, r"has blocks\.1\.adapter\.weight"),
        (without("") | {"blocks.1.norm1.weight": torch.zeros(2)}, r"norm1\.weight"),
        (without("pos_embed"), "--architecture"),
        (without("") | {"layernorm.weight": torch.zeros(48)}, r"two of the weights would be norm\.weight"),
        ({k: v for k, v in vit(ViTModel).state_dict().items() if "layers.1.attention.k_proj" not in k}, "lack"),
        (without("") | {"pos_embed": torch.zeros(1, 15, 48)}, "of no square"),
        (without("") | {"pos_embed": torch.zeros(5)}, r"pos_embed is of shape \(5,\)"),
        (without("") | {"patch_embed.proj.weight": torch.zeros(48, 192)}, r"patch_embed\.proj\.weight is of shape"),
        (without("blocks.0.mlp.fc1.weight"), r"blocks\.0\.mlp\.fc1\.weight"),
        (without("") | {"norm.weight": torch.full((48,), torch.nan)}, r"norm\.weight is not finite"),
        (without("") | {"norm.weight": torch.ones(48, dtype=torch.int32)}, r"norm\.weight holds int32"),
        (without("") | {"norm.weight": torch.ones(48, dtype=torch.complex64)}, r"norm\.weight holds complex64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(state: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as refused:
        convert(hub_file(tmp_path, state, num_attention_heads=3), tmp_path / "out")
    assert len(str(refused.value)) < 500
    assert not (tmp_path / "out").exists()


def test_bytes_nothing_bad_sizes_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"no archive")
    (tmp_path / "x.safetensors").write_bytes(b"no header")
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(UserError, match=name):
            convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(UserError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    save_file(original(num_heads=3).state_dict(), tmp_path / "model.safetensors")
    for size in ("30", "0", "4x", "big"):
        with pytest.raises(UserError, match=r"size|patches"):
            convert(tmp_path / "model.safetensors", tmp_path / "out", size)
    convert(tmp_path / "model.safetensors", tmp_path / "out")
    for name in ("encoder.safetensors", "encoder.json"):
        with pytest.raises(UserError, match="already"):
            convert(tmp_path / "model.safetensors", tmp_path / "out")
        (tmp_path / "out" / name).unlink()


def test_heads_that_no_shape_shows_are_a_guess_that_is_said_aloud(tmp_path: Path) -> None:
    torch.save(original(embed_dim=128, num_heads=2).state_dict(), tmp_path / "x.pth")
    lines = convert(tmp_path / "x.pth", tmp_path / "out")
    assert "THE 2 HEADS ARE A GUESS" in lines[0]
    assert "A GUESS" in lines[1]
    torch.save(original(embed_dim=192, num_heads=3).state_dict(), tmp_path / "usual.pth")
    assert "3 heads, as is usual" in convert(tmp_path / "usual.pth", tmp_path / "out_usual")[0]


# ---------------------------------------------------------------------------------------------- starting from weights


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    card = card_for("vit_tiny_patch16_224", (32, 32), {**TINY, "in_chans": 3})
    torch.manual_seed(4)
    encoder = stirred(build_encoder(card))
    save_encoder(tmp_path, encoder, card)
    return tmp_path


def test_training_starts_from_another_encoder_at_its_own_size(trained: Path) -> None:
    mine = build_encoder(card_for("vit_tiny_patch16_224", (64, 16), TINY))
    lines = initialise_encoder(mine, str(trained))
    convert(trained, trained / "out", "64x16")
    for key, tensor in load_file(trained / "out" / "encoder.safetensors").items():
        torch.testing.assert_close(mine.state_dict()[key], tensor)
    assert not mine.pos_embed.requires_grad
    assert any("pos_embed: interpolated from 4 x 4 to 8 x 2" in line for line in lines)
    assert len([line for line in lines if line.startswith(("taken", "adapted"))]) >= 16


def test_weights_of_timm_start_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, create = original(), timm.create_model
    torch.save(model.state_dict(), tmp_path / "x.pth")

    def local(name: str, pretrained: bool = False, **options: Any) -> Any:
        config = {"file": str(tmp_path / "x.pth"), "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 0}
        overlay = {"pretrained_cfg_overlay": config}
        return create(
            name, pretrained=pretrained, **options, **((overlay | {**TINY, "img_size": 32}) if pretrained else {})
        )

    monkeypatch.setattr(timm, "create_model", local)
    mine = build_encoder(card_for("vit_tiny_patch16_224", (48, 32), TINY))
    initialise_encoder(mine, "timm:vit_tiny_patch16_224")
    monkeypatch.undo()
    theirs = timms_own(tmp_path / "x.pth", in_chans=1, img_size=(48, 32))
    images = torch.randn(2, 1, 48, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            mine.eval().forward_features(images), theirs.forward_features(images), atol=1e-5, rtol=1e-5
        )


def test_no_network_is_the_user_s_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    mine = build_encoder(card_for("vit_tiny_patch16_224", (32, 32), TINY))
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="network"):
        initialise_encoder(mine, "timm:vit_tiny_patch16_224")


def test_another_architecture_is_refused_with_both_named(trained: Path) -> None:
    mine = build_encoder(card_for("vit_tiny_patch16_224", (32, 32), {**TINY, "depth": 3}))
    with pytest.raises(UserError, match=r"is 2 blocks of 48 with 4 heads.*is 3 blocks of 48.*set model\.encoder"):
        initialise_encoder(mine, str(trained))


def test_a_converted_decoder_starts_the_decoder_of_scale_1(tmp_path: Path) -> None:
    state = facebook(original(num_heads=3), full=True)
    file = hub_file(tmp_path, state, num_attention_heads=3, decoder_num_attention_heads=4)
    lines = convert(file, tmp_path / "out", "48x32")
    assert sum("predictions of 3 channels averaged" in line for line in lines) == 2
    convert(tmp_path / "out", tmp_path / "again", "32")
    assert (tmp_path / "again" / "decoder.safetensors").exists()
    encoder = build_encoder(card_for("vit_tiny_patch16_224", (48, 32), TINY | {"num_heads": 3}))
    fine = ScaleSection(scale=2, depth=1, width=16, heads=2)
    model = Miram(encoder, [ScaleSection(scale=1, depth=2, width=32, heads=4), fine])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert "taken" in initialise_decoder(model, str(tmp_path / "out"))[0]
    decoder = load_file(tmp_path / "out" / "decoder.safetensors")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, decoder.get(key, before[key]))
    prediction = state["decoder_pred.weight"].reshape(8, 8, 3, 32)
    torch.testing.assert_close(decoder["decoders.1.head.weight"].reshape(8, 8, 32), prediction.mean(2))
    other = Miram(encoder, [ScaleSection(scale=1, depth=2, width=32, heads=8), fine])
    assert "not used" in initialise_decoder(other, str(tmp_path / "out"))[0]
    assert initialise_decoder(model, "timm:vit_tiny_patch16_224") == initialise_decoder(model, str(tmp_path)) == []


def test_a_decoder_is_kept_only_where_its_positions_are_ours(tmp_path: Path) -> None:
    """transformers leaves the positions of a model made at random at zero; public weights have MAE's."""
    model = mae(ViTMAEForPreTraining)
    model.save_pretrained(tmp_path / "zeros")
    model.decoder.decoder_pos_embed.data = torch.cat([torch.zeros(1, 1, 32), grid()], dim=1)
    model.save_pretrained(tmp_path / "public")
    lines = {name: convert(tmp_path / name, tmp_path / "out" / name) for name in ("zeros", "public")}
    assert not (tmp_path / "out" / "zeros" / "decoder.safetensors").exists()
    assert sum("positions are not MAE's" in line for line in lines["zeros"]) >= 10
    assert (tmp_path / "out" / "public" / "decoder.safetensors").exists()
    assert "ImageNet's mean, as MAE's are" in lines["public"][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_in_half_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: tensor.to(dtype) for key, tensor in facebook(original(), full=True).items()}
    file = hub_file(tmp_path, state, num_attention_heads=4, decoder_num_attention_heads=4)
    convert(file, tmp_path / "out", channels=3)
    decoder = load_file(tmp_path / "out" / "decoder.safetensors")
    assert torch.equal(decoder["decoders.1.head.weight"], state["decoder_pred.weight"].float())


@pytest.mark.parametrize(
    ("changed", "heads", "why"),
    [
        ({"decoder_pred.weight": torch.zeros(7, 32)}, 4, r"of other shape are decoders.1.head.weight"),
        ({"decoder_norm.weight": None}, 4, "it lacks decoders.1.norm.weight"),
        ({"decoder_foo.weight": torch.zeros(2)}, 4, "it has decoder_foo.weight"),
        ({"mask_token": None}, 4, "mask_token"),
        ({}, 5, "multiple of heads"),
    ],
)
def test_a_decoder_that_is_not_ours_is_left_out_and_said_so(
    changed: dict[str, Tensor | None], heads: int, why: str, tmp_path: Path
) -> None:
    """What is kept starts the decoder of scale 1 with nothing missing."""
    state = {k: v for k, v in {**facebook(original(), full=True), **changed}.items() if v is not None}
    file = hub_file(tmp_path, state, num_attention_heads=4, decoder_num_attention_heads=heads)
    lines = convert(file, tmp_path / "out")
    assert any(line.startswith("THE DECODER IS LEFT OUT") and why in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encoder.json", "encoder.safetensors"]
    dropped = {line.split(":")[0].split()[1] for line in lines if line.startswith("dropped")}
    assert {"decoder_embed.weight", "decoder_blocks.N.attn.qkv.weight", "decoder_pred.bias"} <= dropped


def test_what_a_projection_without_bias_loses_is_said_aloud(tmp_path: Path) -> None:
    """CLIP's; with equal means nothing is lost."""
    model = stirred(timm.create_model("vit_base_patch16_clip_224", num_classes=0, **{**TINY, "img_size": 32}))
    args = {**TINY, "img_size": 32}
    timm.models.save_for_hf(model, tmp_path / "hub", model_args=args)
    lost = [line for line in convert(tmp_path / "hub", tmp_path / "out") if "MEANS IS LOST" in line]
    assert len(lost) == 1
    assert "patch_embed.proj.weight" in lost[0]
    assert "LOST" not in "".join(convert(tmp_path / "hub", tmp_path / "colour", channels=3))
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.4] * 3}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    assert "LOST" not in "".join(convert(tmp_path / "hub", tmp_path / "equal"))


def test_a_bare_file_with_rotary_positions_is_read_by_the_name_it_is_given(tmp_path: Path) -> None:
    """DINOv3 as timm has it: nothing in its shapes says how it rotates, so it has to be named."""
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0, img_size=(64, 48)).eval()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="--architecture"):
        convert(tmp_path / "x.pth", tmp_path / "out")
    lines = convert(tmp_path / "x.pth", tmp_path / "out", "64x48", 3, "vit_tiny_patch16_dinov3_qkvb")
    images = torch.randn(1, 3, 64, 48)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_encoder(tmp_path / "out").forward_features(images), model.forward_features(images)
        )
    assert "what timm says of vit_tiny_patch16_dinov3_qkvb" in lines[1]
