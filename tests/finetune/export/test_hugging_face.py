"""The Hugging Face folder loads in transformers with equal outputs, and what its ViT cannot hold is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lockables import lock, write_encoder
from safetensors.torch import save_file
from test_timm import of_vit
from vits import VITS, pictures, small

from miram.engine.config import check
from miram.engine.errors import UserError
from miram.finetune.export.card import CARD
from miram.finetune.export.hugging_face import write_hf
from miram.finetune.export.hugging_face_mae import pretrained, unlike_mae
from miram.finetune.export.source import read_source
from miram.finetune.export.stage import export
from miram.pretrain.config import PretrainConfig
from miram.pretrain.encoder import Encoder
from miram.pretrain.miram import Miram
from miram.pretrain.stage import pretrain
from miram.pretrain.weights.loading import load_encoder

transformers = pytest.importorskip("transformers")

PLAIN: dict[str, dict[str, object]] = {
    "class token": {},
    "not square": {"image": (64, 32)},
    "three channels": {"in_chans": 3},
    "no qkv bias": {"qkv_bias": False},
    "no biases behind attention and in the MLP": {"proj_bias": False},
    "no position of the class token": {"no_embed_class": True},
    "mean of patches": {"global_pool": "avg", "fc_norm": False},
}


def tokens_of(folder: Path, images: torch.Tensor) -> torch.Tensor:
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    out: torch.Tensor = model(images).last_hidden_state
    return out.detach()


@pytest.mark.parametrize("kind", PLAIN)
def test_transformers_sees_every_token_as_timm_does(kind: str, tmp_path: Path) -> None:
    vit = small(**PLAIN[kind])  # type: ignore[arg-type]
    written = write_hf(of_vit(vit), tmp_path)
    images = pictures(vit)
    torch.testing.assert_close(tokens_of(tmp_path, images), vit.forward_features(images), rtol=0, atol=1e-5)
    assert sorted(written.files) == sorted(path.name for path in tmp_path.iterdir())
    pooled = "last_hidden_state[:, 1:].mean(1)" if kind == "mean of patches" else "last_hidden_state[:, 0]"
    assert any(pooled in note for note in written.notes)


POOLED: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "": ("last_hidden_state, every token", lambda x: x),
    "token": ("last_hidden_state[:, 0]", lambda x: x[:, 0]),
    "avg": ("last_hidden_state[:, 1:].mean(1)", lambda x: x[:, 1:].mean(1)),
    "max": ("last_hidden_state[:, 1:].amax(1)", lambda x: x[:, 1:].amax(1)),
    "avgmax": (
        "(last_hidden_state[:, 1:].mean(1) + last_hidden_state[:, 1:].amax(1)) / 2",
        lambda x: (x[:, 1:].mean(1) + x[:, 1:].amax(1)) / 2,
    ),
}


@pytest.mark.parametrize("kind", POOLED)
def test_the_note_tells_how_timms_features_are_had_of_the_tokens(kind: str, tmp_path: Path) -> None:
    vit = small(global_pool=kind, fc_norm=False)
    said, pool = POOLED[kind]
    notes = write_hf(of_vit(vit), tmp_path).notes
    assert any(f"timm's features of this encoder are {said}" in note for note in notes)
    images = pictures(vit)
    torch.testing.assert_close(pool(tokens_of(tmp_path, images)), vit(images), rtol=0, atol=1e-5)


def test_our_own_loader_reads_the_folder_back(tmp_path: Path) -> None:
    vit = small()
    write_hf(of_vit(vit), tmp_path)
    images = pictures(vit)
    torch.testing.assert_close(load_encoder(tmp_path)(images), vit(images), rtol=0, atol=1e-6)


REFUSED = {
    "no class token": "a ViT without a class token",
    "registers, LayerScale": "LayerScale",
    "average of registers": "a ViT without a class token",
    "map pooling": "a ViT without a class token",
    "post-norm": "blocks of timm's ResPostBlock",
    "q and k norms": "norms of queries and keys",
    "rotary, apart": "rotary positions",
    "rotary, registers": "rotary positions",
    "SwiGLU": "rotary positions",
    "things in parallel": "blocks of timm's ParallelThingsBlock",
}


def test_every_kind_of_vit_is_either_held_or_refused() -> None:
    assert VITS.keys() == REFUSED.keys() | {"class token", "not square"}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_has_no_place_for_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no place for .*{REFUSED[kind]}.*use --to timm or --to onnx"):
        write_hf(of_vit(VITS[kind]()), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_only_a_vit_without_a_class_token_is_said_to_have_none(tmp_path: Path) -> None:
    others = {"register tokens": small(reg_tokens=2), "a distillation token": small("deit_tiny_distilled_patch16_224")}
    for said, vit in others.items():
        with pytest.raises(UserError, match=f"no place for {said}; use --to timm"):
            write_hf(of_vit(vit), tmp_path)


def test_registers_and_an_activation_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LayerScale.*register tokens|register tokens.*LayerScale"):
        write_hf(of_vit(VITS["registers, LayerScale"]()), tmp_path)
    with pytest.raises(UserError, match="the activation QuickGELU"):
        write_hf(of_vit(small("vit_base_patch16_clip_quickgelu_224", pre_norm=False)), tmp_path)


def test_a_classifier_gives_its_logits_and_labels(phantoms: Path, tmp_path: Path) -> None:
    lock(tmp_path / "run", phantoms, write_encoder(tmp_path / "encoder"), task="density", input="whole")
    folder = export(tmp_path / "run", "hf")
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    source = read_source(tmp_path / "run")
    images = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(model(images).logits, source.module(images), rtol=0, atol=1e-5)
    assert tuple(model.config.id2label.values()) == source.classes
    assert model.config.problem_type == "single_label_classification"


def test_a_classifier_of_pooled_patches_is_refused(tmp_path: Path) -> None:
    vit = small(global_pool="avg", fc_norm=False)
    source = replace(of_vit(vit), kind="classifier", head=torch.nn.Linear(48, 2), classes=("0", "1"))
    with pytest.raises(UserError, match="a classifier of features pooled by avg"):
        write_hf(source, tmp_path)


def test_the_processor_normalises_as_the_source_says(tmp_path: Path) -> None:
    write_hf(of_vit(small(in_chans=3)), tmp_path)
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path)
    picture = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    found = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, torch.full((1, 3, 64, 64), (1 - 0.25) / 0.5))


# ---------------------------------------------------------------------------------------------- pretraining

ONE_SCALE = "--model.scales=[{scale: 1, depth: 2, width: 16, heads: 2}]"


@pytest.fixture(scope="module")
def mae(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining of one scale, of pixels as they are."""
    out = tmp_path_factory.mktemp("mae") / "run"
    pretrain("pretrain/demo", [*tiny, ONE_SCALE, f"--out={out}", "--train.steps=2", "--model.norm_pix=false"])
    return out


def batch_for(model: Miram, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "view/1": torch.randn(count, 1, 32, 32, generator=generator),
        "noise": torch.rand(count, len(model.units), generator=generator),
    }


def test_the_autoencoder_has_the_loss_and_predictions_of_the_pretraining(mae: Path) -> None:
    folder = export(mae, "hf")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder / "mae").eval()
    ours = pretrained(read_source(mae)).model.eval()
    batch = batch_for(ours)
    found = theirs(batch["view/1"], noise=batch["noise"])
    ids_keep, _ = ours.masks(batch)
    (wanted,) = ours.reconstruct(batch["view/1"], ids_keep)
    torch.testing.assert_close(found.logits, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, (ours(batch) / ours.counts(batch))[0], rtol=1e-5, atol=0)
    assert json.loads((folder / CARD).read_text())["mae"]["largest_difference"] < 1e-4
    assert {"mae/config.json", "mae/model.safetensors"} <= json.loads((folder / CARD).read_text())["files"].keys()


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def of_another_step(run: Path) -> None:
    vit: Encoder = load_encoder(run)
    with torch.no_grad():
        vit.norm.bias += 1
    save_file(vit.state_dict(), run / "encoder.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [(without_checkpoints, "checkpoints are no longer there"), (of_another_step, "another step than the encoder")],
)
def test_without_its_decoder_the_encoder_goes_alone(change: object, said: str, mae: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mae, tmp_path / "copy", ignore=shutil.ignore_patterns("export")))
    assert callable(change)
    change(copy)
    folder = export(copy, "hf")
    assert not (folder / "mae").exists()
    assert any(said in note for note in json.loads((folder / CARD).read_text())["notes"])


def test_a_decoder_with_biases_that_its_encoder_lacks_is_left_out(tiny: list[str], tmp_path: Path) -> None:
    options = [ONE_SCALE, "--train.steps=1", "--model.encoder_options.qkv_bias=false"]
    pretrain("pretrain/demo", [*tiny, *options, f"--out={tmp_path / 'run'}"])
    folder = export(tmp_path / "run", "hf")
    assert not (folder / "mae").exists()
    said = "its decoder's queries and keys have biases, its encoder's have none"
    assert any(said in note for note in json.loads((folder / CARD).read_text())["notes"])


TWO = [{"scale": 1}, {"scale": 2, "attention": "nystrom", "options": {"num_landmarks": 4}}]
UNLIKE: dict[str, tuple[dict[str, object], str]] = {
    "two scales": ({"scales": TWO}, "it reconstructs the scales 1, 2, and MAE has scale 1 alone"),
    "a finer scale": ({"scales": [{"scale": 2}]}, "it reconstructs the scales 2, and"),
    "another attention": ({"scales": [TWO[1] | {"scale": 1}]}, "none of MAE's"),
    "parts of the grid": ({"scales": [{"scale": 1, "decode_fraction": 0.25}]}, "none of MAE's"),
    "units": ({"scales": [{"scale": 1}], "mask_unit": 2}, "none of MAE's"),
    "not square": ({"scales": [{"scale": 1}], "image_size": [64, 32]}, "takes square images, and these are 64 x 32"),
    "MAE": ({"scales": [{"scale": 1}]}, ""),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_what_is_no_mae_says_why(what: str) -> None:
    model, said = UNLIKE[what]
    tree = {"data": {"shards": "x"}, "train": {"steps": 1, "batch_size": 1}, "model": model}
    found = unlike_mae(check(PretrainConfig, tree, "test"))
    assert said in found
    assert bool(said) == bool(found)


def test_a_contrastive_pretraining_is_no_mae() -> None:
    tree = {"data": {"shards": "x"}, "train": {"steps": 1, "batch_size": 1}, "objective": "moco_v3"}
    assert unlike_mae(check(PretrainConfig, tree, "test")) == "moco_v3 has no decoder"
