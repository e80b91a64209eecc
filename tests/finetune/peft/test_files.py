"""Adapters on disk: whole or not there, on the encoder they belong on, and nothing odd taken from a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.engine.launch import make_accelerator
from miram.engine.parallel import shard
from miram.finetune.peft import Tuned, apply, files, load, save


def moved(method: str, vit: Any = None, classes: int = 2, **options: Any) -> Tuned:
    """A tuned encoder whose numbers that learn are somewhere else, as after a training."""
    tuned = apply(small() if vit is None else vit, method, **options)
    if classes:
        tuned.set_head(classes)
    torch.manual_seed(4)
    with torch.no_grad():
        for tensor in tuned.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor) * tensor.requires_grad)
    return tuned.eval()


def test_an_adapter_says_what_it_is_and_is_not_overwritten(tmp_path: Path) -> None:
    tuned = moved("ln")
    save(tuned, tmp_path / "a")
    card = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert (card["method"], card["trainable"], card["expected"], card["classes"]) == ("ln", 480, 480, 2)
    assert card["base"]["architecture"] == "vit_tiny_patch16_224"
    with pytest.raises(UserError, match="is there already"):
        save(tuned, tmp_path / "a")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o644}


@pytest.mark.parametrize("method", ["ln", "lora"])
def test_a_save_that_is_broken_off_leaves_nothing(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    tuned = moved(method)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full_disk)
        with pytest.raises(OSError, match="no space"):
            save(tuned, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    save(tuned, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", small())(pictures(small())), tuned(pictures(small())))


def test_another_encoder_is_refused_and_left_as_it_was_unless_forced(tmp_path: Path) -> None:
    save(moved("bitfit"), tmp_path / "a")
    other = small()
    nn.init.ones_(other.blocks[0].mlp.fc1.weight)
    with pytest.raises(UserError, match=r"tuned on another encoder .digest"):
        load(tmp_path / "a", other)
    assert load(tmp_path / "a", other, force=True).name == "bitfit"


@pytest.mark.parametrize("other", [{"num_heads": 4}, {"img_size": (32, 128)}])
def test_equal_weights_in_another_build_are_another_encoder(other: dict[str, Any], tmp_path: Path) -> None:
    save(moved("ln"), tmp_path / "a")
    with pytest.raises(UserError, match="tuned on another encoder"):
        load(tmp_path / "a", small(**other))


def test_a_damaged_tensor_is_found(tmp_path: Path) -> None:
    save(moved("ln"), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="missing or damaged"):
        load(tmp_path / "a", small())


ODD: list[tuple[str, Any]] = [
    *[(key, None) for key in ("method", "options", "base", "files")],
    *[(key, []) for key in ("method", "options", "base", "files", "classes")],
    *[("method", odd) for odd in (3, "lroa")],
    *[("options", odd) for odd in ("x", {"encoder": 1}, {"method": 1}, {"rank": 4})],
    *[("base", odd) for odd in ({}, "x", {"digest": 1})],
    *[
        ("files", odd)
        for odd in ({}, "x", {"../a/adapter.safetensors": "0"}, {"a" * 300 + ".safetensors": "0"}, {"a": 1})
    ],
    *[("classes", odd) for odd in ("2", 0, -2, 1.5, 10**12, True)],
]


@pytest.mark.parametrize(("key", "value"), ODD)
def test_an_odd_card_is_one_sentence(key: str, value: Any, tmp_path: Path) -> None:
    save(moved("ln"), tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError):
        load(tmp_path / "a", small())


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"schema": "miram.adapter/1"}'])
@pytest.mark.parametrize("name", ["adapter.json", "adapter_config.json"])
def test_a_card_that_is_none_is_one_sentence(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError):
        load(tmp_path, small())


HEADS: list[dict[str, Callable[[], torch.Tensor]]] = [
    {"weight": lambda: torch.zeros(2, 47)},
    {"bias": lambda: torch.zeros(2)},
    {"weight": lambda: torch.zeros(())},
    {"weight": lambda: torch.zeros(0, 48)},
    {"weight": lambda: torch.zeros(2, 48), "bias": lambda: torch.zeros(3)},
    {"weight": lambda: torch.zeros(2, 48), "scale": lambda: torch.zeros(2)},
]


@pytest.mark.parametrize("head", HEADS)
def test_an_odd_head_in_a_folder_of_pefts_is_one_sentence(head: dict[str, Any], tmp_path: Path) -> None:
    save(moved("lora", classes=0), tmp_path / "a")
    (tmp_path / "a" / "adapter.json").unlink()  # as peft leaves it
    path = tmp_path / "a" / "adapter_model.safetensors"
    odd = {f"base_model.model.head.{name}": make() for name, make in head.items()}
    save_file(load_file(path) | odd, path)
    with pytest.raises(UserError, match="no linear one on 48 features"):
        load(tmp_path / "a", small())


@pytest.mark.parametrize(
    ("gone", "said"), [("adapter.json", "a part of an adapter"), ("adapter_config.json", "missing")]
)
def test_a_part_of_an_adapter_is_none(gone: str, said: str, tmp_path: Path) -> None:
    save(moved("lora"), tmp_path / "a")
    (tmp_path / "a" / gone).unlink()
    with pytest.raises(UserError, match=said):
        load(tmp_path / "a", small())


def test_a_scale_that_was_edited_in_pefts_file_is_found(tmp_path: Path) -> None:
    save(moved("lora"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 400'))
    with pytest.raises(UserError, match=r"adapter_config\.json is missing or damaged"):
        load(str(tmp_path / "a"), small())


@pytest.mark.parametrize("odd", [nn.Linear(2, 2), "tuned"])
def test_what_is_no_vit_is_refused_by_name(odd: Any, tmp_path: Path) -> None:
    save(moved("ln"), tmp_path / "a")
    with pytest.raises(UserError, match=r"not torch.nn.modules.linear.Linear|not miram.finetune.peft.base.Tuned"):
        load(tmp_path / "a", moved("ln") if odd == "tuned" else odd)


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    tuned = moved("lora")
    tuned.head = nn.Sequential(nn.Linear(48, 8), nn.Linear(8, 2))
    with pytest.raises(UserError, match="Sequential is not saved"):
        save(tuned, tmp_path / "a")
    tuned.set_head(2)
    tuned.merged()
    for act in (tuned.merged, lambda: save(tuned, tmp_path / "a")):
        with pytest.raises(UserError, match="merged already"):
            act()


def test_what_is_loaded_is_in_the_encoders_mode(tmp_path: Path) -> None:
    save(moved("adaptformer", dropout=0.5), tmp_path / "a")
    tuned, x = load(tmp_path / "a", small()), pictures(small())
    assert torch.equal(tuned(x), tuned(x))
    assert apply(small().train(), "linear").training


def test_batch_norms_of_a_stem_are_what_was_saved(tmp_path: Path) -> None:
    def hybrid() -> Any:
        torch.manual_seed(0)
        return timm.create_model(
            "vit_small_resnet26d_224", img_size=64, depth=2, embed_dim=48, num_heads=3, in_chans=1, num_classes=0
        ).eval()

    tuned, x = apply(hybrid(), "full").train(), torch.randn(2, 1, 64, 64)
    tuned(x).sum().backward()
    with torch.no_grad():
        for tensor in tuned.parameters():
            tensor.add_(0.01)
    save(tuned, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", hybrid()).eval()(x), tuned.eval()(x))


def test_a_copy_after_a_forward_that_failed_is_a_copy() -> None:
    tuned, x = moved("adaptformer"), pictures(small())

    def fail(*_: object) -> None:
        raise MemoryError

    hook = tuned.model.blocks[0].mlp.fc2.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        tuned(x)
    hook.remove()
    assert torch.equal(copy.deepcopy(tuned)(x), tuned(x))


@pytest.mark.parametrize("method", ["ln", "lora", "lora_qkv", "dvpt", "vpt_gated"])
def test_what_two_ranks_hold_in_shards_is_saved_whole(method: str, tmp_path: Path) -> None:
    vit = VITS["class token"]
    options: dict[str, Any] = {"share_every": "all"} if method == "dvpt" else {}
    options |= {"temperature": True} if method == "vpt_gated" else {}
    x, one = pictures(vit()), moved(method, vit(), **options)

    def rank() -> torch.Tensor:
        accelerator = make_accelerator()
        tuned = moved(method, vit(), **options)
        shard(tuned, accelerator, compiled=False)
        out = tuned(x)
        out.sum().backward()
        save(tuned, tmp_path / "a", writes=accelerator.is_main_process)
        return out.detach()

    for out in on_ranks(2, rank):
        assert torch.allclose(out, one(x), atol=1e-5)
    assert torch.equal(load(tmp_path / "a", vit())(x), one(x))
