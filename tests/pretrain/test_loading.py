"""`miram.load_encoder` against transformers, timm and brute force, for everything that a name may mean."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

import miram
from miram.engine.errors import UserError
from miram.engine.files import sha256
from miram.pretrain.encoder import Encoder, build_encoder, card_for, normalisation, save_encoder, sincos_positions
from miram.pretrain.weights.loading import encoder_digest, load_encoder, random_like, read_encoder, read_provenance

SHAPE = {"depth": 2, "embed_dim": 32, "num_heads": 2}
HUB = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
HUB |= {"intermediate_size": 256, "layer_norm_eps": 1e-6}
DECODER = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}


def stirred(model: nn.Module) -> Any:
    """Every parameter at random, so that zeros and ones hide nothing; MAE's fixed positions stay."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(folder: Path, name: str = "vit_tiny_patch16_224", size: tuple[int, int] = (48, 32), **options: Any) -> Path:
    channels = options.get("in_chans", 1)
    card = card_for(name, size, SHAPE | options)
    provenance = {"split": "train"}
    card = replace(card, mean=(0.1, 0.2, 0.6)[:channels], std=(0.2, 0.5, 0.3)[:channels], provenance=provenance)
    folder.mkdir()
    save_encoder(folder, stirred(build_encoder(card)), card)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "run")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """MAE as the hub has it, with its decoder."""
    torch.manual_seed(0)
    options = DECODER | {"decoder_intermediate_size": 64}
    model = stirred(ViTMAEForPreTraining(ViTMAEConfig(**HUB, **options)))
    model.decoder.decoder_pos_embed.data[:, 1:] = sincos_positions((4, 4), 32)  # else the decoder is none of ours
    model.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def timms(monkeypatch: pytest.MonkeyPatch, path: Path, state: dict[str, Tensor]) -> None:
    """timm's pretrained weights come from a file; its own code loads them."""
    save_file(state, path)
    overlay = {"file": str(path), "num_classes": 5}
    create = timm.create_model
    small = partial(create, pretrained_cfg_overlay=overlay, img_size=32, **SHAPE)
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: (small if a[0].startswith("vit_tiny") else create)(*a, **k)
    )


def vit_of_timm() -> Any:
    return stirred(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **SHAPE))


# ---------------------------------------------------------------------------------------------- another input


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_ape_224"])
def test_positions_are_interpolated_to_another_size(name: str, tmp_path: Path) -> None:
    options = {} if name.startswith("vit_tiny") else {"embed_dim": 64, "global_pool": "token"}
    place = save(tmp_path / "run", name, **options)
    before = load_encoder(place)
    (vit, lines), same = read_encoder(place, image_size=(64, 96)), load_encoder(place, image_size=(48, 32))
    torch.testing.assert_close(same.pos_embed, before.pos_embed, rtol=0, atol=0)
    prefix = before.pos_embed.shape[1] - 6
    grid = before.pos_embed[:, prefix:].reshape(1, 3, 2, -1).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(grid, (4, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.pos_embed[:, prefix:], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vit.pos_embed[:, :prefix], before.pos_embed[:, :prefix])
    assert any(re.match(r"adapted +pos_embed: interpolated from 3 x 2 to 4 x 6", line) for line in lines)
    assert vit(torch.randn(2, 1, 64, 96)).shape == (2, vit.embed_dim)
    assert timm.data.resolve_model_data_config(vit)["input_size"] == (1, 64, 96)
    assert load_encoder(place, image_size=64).patch_embed.img_size == (64, 64)


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_pictures_give_what_they_gave_in_any_number_of_channels(own: int, channels: int, tmp_path: Path) -> None:
    place, grey = save(tmp_path / "run", in_chans=own), torch.rand(2, 1, 48, 32)
    first, other = load_encoder(place), load_encoder(place, channels=channels)
    assert first.patch_embed.proj.in_channels == own  # an encoder of ours keeps its own unless asked
    assert other.patch_embed.proj.in_channels == channels

    def seen(vit: Encoder, count: int) -> Tensor:
        pixels = grey.expand(-1, count, -1, -1).numpy()
        return vit(torch.stack([torch.from_numpy(normalisation(vit)(picture.copy())) for picture in pixels]))

    torch.testing.assert_close(seen(other, channels), seen(first, own), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", [{"image_size": 40}, {"image_size": 0}, {"image_size": (32, -16)}, {"channels": 0}])
def test_an_input_that_cannot_be_is_refused(what: dict[str, Any], saved: Path) -> None:
    for source in (saved, "random:vit_tiny_patch16_224"):
        with pytest.raises(UserError):
            load_encoder(source, **what)


# ---------------------------------------------------------------------------------------------- files of others


def test_a_hub_folder_gives_the_tokens_that_transformers_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = stirred(ViTModel(ViTConfig(**HUB))), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "hub")
    wanted = model(images).last_hidden_state
    for place in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
        torch.testing.assert_close(
            load_encoder(place, channels=3).forward_features(images), wanted, atol=1e-5, rtol=1e-5
        )
    assert load_encoder(tmp_path / "hub").patch_embed.proj.in_channels == 1


def test_a_plain_file_of_timm_s_names_is_read_as_it_is(tmp_path: Path) -> None:
    model = stirred(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7))
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    images = torch.randn(2, 3, 32, 32)
    vit, lines = read_encoder(tmp_path / "theirs.safetensors", channels=3)
    torch.testing.assert_close(vit.forward_features(images), model.forward_features(images))
    assert [line for line in lines if line.startswith("dropped")] == [
        f"dropped  head.{kind}: what follows the tokens is no part of an encoder" for kind in ("bias", "weight")
    ]


@pytest.mark.parametrize("change", ["missing", "unused"])
def test_a_key_that_is_missing_or_has_no_use_is_named(change: str, hub: Path, saved: Path) -> None:
    for file in (hub / "model.safetensors", saved / "encoder.safetensors"):
        state = load_file(file)
        encoder = (key for key in state if "decoder" not in key)
        key = next(key for key in encoder if key.endswith(("fc1.bias", "intermediate.dense.bias")))
        if change == "missing":
            del state[key]
        else:
            state["blocks.0.unheard_of"] = torch.zeros(3)
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"mlp\.fc1\.bias" if change == "missing" else "unheard_of"):
            load_encoder(file.parent)


def test_what_a_file_does_not_tell_is_said_aloud(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **SHAPE | {"embed_dim": 128})
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    with (
        pytest.warns(UserWarning, match="2 HEADS ARE A GUESS"),
        pytest.warns(UserWarning, match="A GUESS: nothing tells"),
    ):
        load_encoder(tmp_path / "x.safetensors")
    state = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"--architecture=.* of `miram convert .*x\.safetensors .*x-encoder` and name"):
        load_encoder(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_half_a_file_is_refused_by_its_name(keep: int, hub: Path) -> None:
    state = load_file(hub / "model.safetensors")
    first = [key for key in sorted(state) if "embeddings" in key]
    save_file({key: state[key] for key in [*first, *sorted(state)][:keep]}, hub / "model.safetensors")
    (hub / "config.json").unlink()
    with pytest.raises(UserError, match=re.escape(str(hub))):
        load_encoder(hub)
    (hub / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_encoder(hub)


@pytest.mark.parametrize("name", ["x.pth", "x y.pt", "hub"])
def test_what_may_hold_code_is_refused_with_the_line_that_converts_it(
    name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    state = load_file(hub / "model.safetensors")
    (hub / "model.safetensors").unlink()
    torch.save(state, hub / "pytorch_model.bin" if name == "hub" else name)
    with pytest.raises(UserError) as refused:
        load_encoder(name)
    line = re.search(r"`miram (convert [^`]+)`", str(refused.value))
    assert line
    code, _, _ = say(*shlex.split(line[1]))
    assert code == 0
    out = shlex.split(line[1])[-1]
    assert str(refused.value).endswith(f"name {shlex.quote(out)}")
    assert load_encoder(out).patch_embed.img_size == (32, 32)


# ---------------------------------------------------------------------------------------------- the report


def test_every_key_of_a_file_is_in_the_report(hub: Path, saved: Path) -> None:
    for place, file in ((hub, "model.safetensors"), (saved, "encoder.safetensors")):
        told = "\n".join(read_encoder(place)[1])
        keys = load_file(place / file).keys()
        assert f"{len(keys)} tensors: " in told
        for key in keys:
            pattern = re.sub(r"\.\d+\.", ".N.", key)
            assert re.search(rf"^(taken|adapted|dropped) +{re.escape(pattern)}\b", told, re.M), key
    dropped = [line for line in read_encoder(hub)[1] if line.startswith("dropped")]
    assert dropped
    assert all(re.match(r"dropped +(decoder|mask_token|vit\.embeddings\.mask)", line) for line in dropped)
    assert not any(re.match(r"(taken|adapted) +(decoder|mask_token)", line) for line in read_encoder(hub)[1])
    assert any("3 channels summed to 1" in line for line in read_encoder(hub)[1])


# ---------------------------------------------------------------------------------------------- timm's own


def test_timm_s_names_are_known_with_and_without_their_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit_of_timm()
    timms(monkeypatch, tmp_path / "theirs.safetensors", model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for name in ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"):
        vit, lines = read_encoder(name, channels=3)
        torch.testing.assert_close(vit.forward_features(images), model.forward_features(images))
        assert vit(images).shape == (2, 32)
        assert [line.split(":")[0] for line in lines if line.startswith("dropped")] == [
            "dropped  head.weight",
            "dropped  head.bias",
        ]
    assert load_encoder("vit_tiny_patch16_224", image_size=(64, 32))(torch.randn(1, 1, 64, 32)).shape == (1, 32)


@pytest.mark.parametrize("change", ["missing", "unused"])
def test_timm_s_own_weights_must_fit_key_by_key(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm itself says nothing once it was asked to leave out the head."""
    state = vit_of_timm().state_dict()
    if change == "missing":
        del state["blocks.1.norm2.bias"]
    timms(
        monkeypatch, tmp_path / "x.safetensors", state | ({"unheard_of": torch.ones(1)} if change == "unused" else {})
    )
    with pytest.raises(UserError, match=r"blocks\.1\.norm2\.bias" if change == "missing" else "unheard_of"):
        load_encoder("timm:vit_tiny_patch16_224")


@pytest.mark.parametrize("name", ["resnet18", "vit_small_r26_s32_224"])
def test_what_is_no_plain_vit_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **_: create(name))
    for load in (load_encoder, lambda name: random_like(name, 0)):
        with pytest.raises(UserError, match=f"timm:{name} is no plain ViT"):
            load(name)


# ---------------------------------------------------------------------------------------------- names


def test_untrained_encoders_have_names_too() -> None:
    vit, again = (load_encoder("random:vit_tiny_patch16_224", image_size=(32, 48)) for _ in "12")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in vit.state_dict().items())
    other = random_like("random:vit_tiny_patch16_224", 1, (32, 48))
    assert not torch.equal(vit.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert vit(torch.randn(1, 1, 32, 48)).shape == (1, 192)
    assert load_encoder("random").embed_dim == 384
    with pytest.raises(UserError, match=r"random:vit_tinny.*vit_tiny"):
        load_encoder("random:vit_tinny_patch16_224")


def test_a_path_is_never_a_name_and_a_folder_goes_before_timm_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vit_base_patch16_224", "random", "timm:x"):
        save(Path(name))
        assert load_encoder(Path(name)).embed_dim == 32
    assert load_encoder("vit_base_patch16_224").embed_dim == 32
    for nothing in ("vit_tinny", Path("vit_small_patch16_224"), "runs/none", ""):
        with pytest.raises(UserError, match="there is no encoder at"):
            load_encoder(nothing)


def test_a_run_that_is_not_finished_is_no_encoder(saved: Path) -> None:
    (saved / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match="name a finished pretraining run"):
        load_encoder(saved)
    (saved / "encoder.json").unlink()
    with pytest.raises(UserError, match="name a finished pretraining run"):
        load_encoder(saved)


@pytest.mark.parametrize("source", ["run", "hub", "timm:vit_tiny_patch16_224", "random:vit_tiny_patch16_224"])
@pytest.mark.parametrize("wanted", [{}, {"image_size": (64, 96), "channels": 2}])
def test_an_untrained_control_has_the_same_shape_and_input(
    source: str, wanted: dict[str, Any], saved: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    timms(monkeypatch, tmp_path / "x.safetensors", vit_of_timm().state_dict())
    trained, control, again = load_encoder(source, **wanted), *(random_like(source, 1, **wanted) for _ in "12")
    shapes = [{key: value.shape for key, value in vit.state_dict().items()} for vit in (trained, control)]
    assert shapes[0] == shapes[1]
    ours, theirs = normalisation(control), normalisation(trained)
    assert (ours.mean, ours.std) == (pytest.approx(theirs.mean), pytest.approx(theirs.std))
    images = torch.randn(1, trained.patch_embed.proj.in_channels, *trained.patch_embed.img_size)
    assert not torch.allclose(control(images), trained(images), atol=1e-2)
    assert torch.equal(control(images), again(images))


def test_what_is_known_of_an_encoder(saved: Path, hub: Path) -> None:
    assert read_provenance(saved) == {"split": "train"}
    assert [read_provenance(name) for name in (hub, "timm:x", "vit_tiny_patch16_224", "random")] == [{}] * 4
    assert encoder_digest(saved) == encoder_digest(str(saved)) == sha256(saved / "encoder.safetensors")
    assert encoder_digest(hub) == sha256(hub / "model.safetensors")
    assert encoder_digest("vit_tiny_patch16_224") == encoder_digest("timm:vit_tiny_patch16_224")
    assert encoder_digest("random") == encoder_digest("random:vit_small_patch16_224")
    for known in (read_provenance, encoder_digest):
        with pytest.raises(UserError, match="there is no encoder"):
            known("nowhere")


def test_it_is_miram_s_own() -> None:
    assert miram.load_encoder is load_encoder
