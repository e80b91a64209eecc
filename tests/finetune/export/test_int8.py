"""int8: what is read back is what was measured, plain tensors alone are on the disk, and linear layers alone change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sources import SIZE, classifier, images, source_of
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from vits import small

from miram.engine.errors import UserError
from miram.finetune.export.int8 import CARD, CONFIG, TENSORS, load_int8, write_int8
from miram.finetune.peft import apply


def test_what_torch_reads_back_is_what_torchao_made(tmp_path: Path) -> None:
    source = classifier()
    before, wide = source.module(images(3)), classifier().module
    written = write_int8(source, tmp_path, "torchao")
    assert written.files == [TENSORS, CARD, CONFIG]
    quantize_(wide, Int8WeightOnlyConfig())
    with torch.inference_mode():
        wanted = wide(images(3))
        assert torch.equal(load_int8(tmp_path)(images(3)), wanted)
    assert written.runner is not None
    assert torch.equal(written.runner(images(3)), wanted)
    assert not torch.equal(wanted, before)
    assert torch.equal(source.module(images(3)), before), "the source was changed"


def test_a_matrix_on_the_disk_is_its_int8_numbers_times_the_scale_of_their_row(tmp_path: Path) -> None:
    source = classifier()
    write_int8(source, tmp_path, "torchao")
    weight = source.module[0].blocks[0].attn.qkv.weight
    with safe_open(tmp_path / TENSORS, "pt") as file:
        names = set(file.keys())
        numbers, scale = (file.get_tensor(f"blocks.0.attn.qkv.weight:{part}") for part in ("qdata", "scale"))
        assert file.get_tensor("patch_embed.proj.weight").dtype == torch.float32
    assert "blocks.0.attn.qkv.weight" not in names
    assert numbers.dtype == torch.int8
    assert ((numbers * scale - weight).abs() <= scale / 2 * 1.001).all(), "further than rounding moves a number"
    torch.testing.assert_close(scale[:, 0], weight.abs().amax(1) / 127.5, rtol=0.01, atol=0)


def test_what_is_no_plain_vit_is_read_into_the_network_it_is_of(tmp_path: Path) -> None:
    tuned = apply(small(image=SIZE), "vpt_deep")
    tuned.set_head(2)
    source = source_of(tuned, "classifier")
    written = write_int8(source, tmp_path, "torchao")
    assert written.files == [TENSORS, CARD]
    with pytest.raises(UserError, match="give load_int8 the network"):
        load_int8(tmp_path)
    assert written.runner is not None
    with torch.inference_mode():
        assert torch.equal(load_int8(tmp_path, tuned)(images(2)), written.runner(images(2)))
    with pytest.raises(UserError, match="is of another network"):
        load_int8(tmp_path, nn.Linear(3, 3))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write_int8(classifier(), tmp_path, "torchao")
    raw = bytearray((tmp_path / TENSORS).read_bytes())
    raw[-1] ^= 1
    (tmp_path / TENSORS).write_bytes(raw)
    with pytest.raises(UserError, match="is damaged; export the run again"):
        load_int8(tmp_path)


@pytest.mark.parametrize("name", [TENSORS, CARD, CONFIG])
@pytest.mark.parametrize("how", ["cut", "edited", "gone"])
def test_whatever_file_is_cut_edited_or_gone_is_named(name: str, how: str, tmp_path: Path) -> None:
    write_int8(classifier(), tmp_path, "torchao")
    raw = (tmp_path / name).read_bytes()
    if how == "gone":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(raw[: len(raw) // 2] if how == "cut" else raw.replace(b"3", b"2", 1))
    with pytest.raises(UserError, match=r"model\.int8|config\.json"):
        load_int8(tmp_path)


def test_a_folder_that_holds_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/model\.int8\.json is not there"):
        load_int8(tmp_path / "nowhere")
    (tmp_path / CARD).write_text('{"schema": "miram.int8/1"}')
    (tmp_path / TENSORS).write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        load_int8(tmp_path)


@pytest.mark.parametrize("engine", ["onnxruntime", "torchao"])
def test_a_network_without_linear_layers_is_refused(engine: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int8 is of linear layers, and this segmenter has none; export it with --to"):
        write_int8(source_of(nn.Conv2d(1, 2, 3), "segmenter"), tmp_path, engine)  # type: ignore[arg-type]
