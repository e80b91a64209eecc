"""A timm folder is loaded by timm alone, with equal outputs, whatever plain ViT it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lockables import lock, write_encoder
from vits import VITS, pictures

from miram.engine.errors import UserError
from miram.finetune.export.source import Source, read_source
from miram.finetune.export.timm_folder import write_timm
from miram.pretrain.encoder import Encoder, weights_digest
from miram.pretrain.weights.loading import load_encoder


def of_vit(vit: Encoder) -> Source:
    channels = vit.patch_embed.proj.in_channels
    return Source(
        kind="encoder",
        module=vit,
        vit=vit,
        head=None,
        image_size=tuple(vit.patch_embed.img_size),
        channels=channels,
        mean=(0.25,) * channels,
        std=(0.5,) * channels,
        digest=weights_digest(vit),
    )


@pytest.mark.parametrize("kind", VITS)
def test_timm_builds_the_same_encoder_from_the_folder(kind: str, tmp_path: Path) -> None:
    vit = VITS[kind]()
    written = write_timm(of_vit(vit), tmp_path)
    assert sorted(written.files) == sorted(path.name for path in tmp_path.iterdir())
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = pictures(vit)
    torch.testing.assert_close(loaded(images), vit(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.forward_features(images), vit.forward_features(images), rtol=0, atol=1e-6)
    assert loaded.pretrained_cfg["mean"] in ((0.25,), [0.25])
    assert loaded.pretrained_cfg["input_size"][1:] == tuple(vit.patch_embed.img_size)


def test_nothing_of_who_first_trained_the_architecture_is_said_of_these_weights(tmp_path: Path) -> None:
    vit = VITS["class token"]()
    vit.pretrained_cfg = {**vit.pretrained_cfg, "license": "apache-2.0", "url": "https://x", "tag": "in21k"}
    write_timm(of_vit(vit), tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert not [word for word in ("license", "url", "in21k", "hf_hub", "paper", "augreg") if word in text]
    assert vit.pretrained_cfg["license"] == "apache-2.0"  # the source stays as it was


def test_our_own_loader_reads_the_folder_too(tmp_path: Path) -> None:
    vit = VITS["not square"]()
    write_timm(of_vit(vit), tmp_path)
    again = load_encoder(tmp_path)
    images = pictures(vit)
    torch.testing.assert_close(again(images), vit(images), rtol=0, atol=1e-6)
    np.testing.assert_allclose(again.pretrained_cfg["mean"], [0.25])


def test_a_classifier_comes_with_its_head_and_labels(phantoms: Path, tmp_path: Path) -> None:
    lock(tmp_path / "run", phantoms, write_encoder(tmp_path / "encoder"), task="density", input="whole")
    source = read_source(tmp_path / "run")
    folder = tmp_path / "timm"
    folder.mkdir()
    write_timm(source, folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(loaded(images), source.module(images), rtol=0, atol=1e-6)
    assert tuple(loaded.pretrained_cfg["label_names"]) == source.classes
    assert json.loads((folder / "config.json").read_text())["num_classes"] == len(source.classes)


def test_what_is_no_plain_vit_is_refused_by_name(phantoms: Path, tmp_path: Path) -> None:
    lock(tmp_path / "run", phantoms, write_encoder(tmp_path / "encoder"), method="vpt_shallow", input="whole")
    with pytest.raises(UserError, match="vpt_shallow adds what a plain ViT has no place for; use --to onnx"):
        write_timm(read_source(tmp_path / "run"), tmp_path)
    unknown = VITS["class token"]()
    unknown.pretrained_cfg = {**unknown.pretrained_cfg, "architecture": "vit_of_mine"}
    with pytest.raises(UserError, match="no architecture 'vit_of_mine'"):
        write_timm(of_vit(unknown), tmp_path)


@pytest.mark.slow
def test_a_process_without_miram_reads_the_folder(tmp_path: Path) -> None:
    vit = VITS["class token"]()
    folder = tmp_path / "timm"
    folder.mkdir()
    write_timm(of_vit(vit), folder)
    images = pictures(vit)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, timm\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        f"torch.save(model(torch.load('{tmp_path}/images.pt')).detach(), '{tmp_path}/out.pt')\n"
        "assert not any(name.partition('.')[0] == 'miram' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), vit(images), rtol=0, atol=1e-6)
