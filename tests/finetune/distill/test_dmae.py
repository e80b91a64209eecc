"""DMAE against loops over tokens, a student that is its teacher, and a step of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miram.finetune.distill.dmae import Dmae
from miram.finetune.distill.teacher import Teacher
from miram.pretrain.config import ScaleSection
from miram.pretrain.encoder import Encoder, build_encoder, card_for, encode_visible, save_encoder
from miram.pretrain.miram import Miram

SCALES = (
    ScaleSection(scale=1, depth=1, width=16, heads=2),
    ScaleSection(scale=2, depth=1, width=16, heads=2, decode_fraction=0.5),
)


def encoder(name: str = "vit_tiny_patch16_224", **options: Any) -> tuple[Encoder, Any]:
    card = card_for(name, (64, 64), {"depth": 4, "embed_dim": 32, "num_heads": 2, **options})
    torch.manual_seed(3)
    return build_encoder(card), card


def taught(folder: Path, student: Encoder, depth: float = 0.75, **options: Any) -> Dmae:
    vit, card = encoder(**{"embed_dim": 48, **options})
    save_encoder(folder, vit, card)
    return Dmae(Miram(student, SCALES), Teacher(str(folder), student, 0.75), depth, 2.0)


def batch_for(model: Dmae, n: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.rand(n, *shape, generator=draw) for name, shape in model.student.inputs.items()}


def test_reconstruction_is_the_student_s_own_to_the_bit(tmp_path: Path) -> None:
    model = taught(tmp_path, encoder()[0])
    batch = batch_for(model)
    assert torch.equal(model(batch)[:2], model.student(batch))
    assert torch.equal(model.counts(batch)[:2], model.student.counts(batch))
    assert model.loss_names == ("1", "2", "tokens")
    assert model.loss_weights == (1.0, 1.0, 2.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_token_loss_is_that_of_loops(tmp_path: Path, checkpointing: bool) -> None:
    student, _ = encoder(depth=2)
    student.set_grad_checkpointing(checkpointing)
    model = taught(tmp_path, student, depth=0.5)
    batch = batch_for(model)
    ids_keep, _ = model.student.masks(batch)
    theirs, found = model.teacher.tokens(batch["view/1"], ids_keep), []
    hook = student.blocks[0].register_forward_hook(lambda *args: found.append(args[2]))
    encode_visible(student, batch["view/1"], ids_keep)
    hook.remove()
    (tokens,), total = found, 0.0
    for b in range(3):
        for token in range(1 + ids_keep.shape[1]):
            z, t = model.project(tokens[b, token]).tolist(), theirs[b, token].tolist()
            z_norm, t_norm = sum(x * x for x in z) ** 0.5, sum(x * x for x in t) ** 0.5
            total += sum(abs(x / z_norm - y / t_norm) for x, y in zip(z, t, strict=True)) / 48**0.5
    assert model(batch)[2].item() == pytest.approx(total, rel=1e-4)
    assert model.counts(batch)[2].item() == 3 * (1 + ids_keep.shape[1])


@pytest.mark.parametrize("width", [32, 192])
def test_the_distance_of_random_directions_is_2_by_the_root_of_pi_whatever_the_width(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = taught(tmp_path, encoder()[0], embed_dim=width)
    draw = torch.Generator().manual_seed(4)
    theirs, ours = (torch.randn(16, 17, width, generator=draw) for _ in range(2))  # a difference: sqrt(2 / D) normal
    monkeypatch.setattr(model.teacher, "tokens", lambda *_: theirs)
    model.project = nn.Identity()  # type: ignore[assignment]
    found = model.token_error(ours, torch.empty(0), torch.empty(0)).item() / (16 * 17)
    assert found == pytest.approx(2 / math.pi**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch16_224", {}), ("eva02_tiny_patch14_224", {"patch_size": 16, "global_pool": "token"})],
)
def test_a_student_that_is_its_teacher_has_no_token_loss(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    student, card = encoder(name, **options)
    save_encoder(tmp_path, student, card)
    model = Dmae(Miram(student, SCALES), Teacher(str(tmp_path), student, 0.75), 0.75)
    model.project.load_state_dict({"weight": torch.eye(32), "bias": torch.zeros(32)})
    batch = batch_for(model)
    assert model(batch)[2].item() == 0
    model.project.weight.data *= 7  # directions count, lengths do not
    assert model(batch)[2].item() == pytest.approx(0, abs=1e-5)
    assert Dmae(model.student, model.teacher, 0.5)(batch)[2].item() > 1


def test_where_one_has_no_class_token_patches_alone_count(tmp_path: Path) -> None:
    bare = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for model in (taught(tmp_path / "a", encoder()[0], **bare), taught(tmp_path / "b", encoder(**bare)[0])):
        batch = batch_for(model)
        assert model.counts(batch)[2].item() == 3 * 4  # of 16 patches a quarter is visible
        assert model(batch).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("eva02_tiny_patch14_224", {"patch_size": 16, "global_pool": "token"}),
    ],
)
def test_a_step_reaches_all_of_the_student_and_nothing_of_the_teacher(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    model = taught(tmp_path, encoder(name, **options)[0])
    before = {key: value.clone() for key, value in model.teacher.vit.state_dict().items()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), 0.1)
    (model(batch_for(model)) * torch.tensor(model.loss_weights)).sum().backward()
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == []
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.teacher.vit.state_dict().items())
    assert not any("teacher" in key for key in model.state_dict())


def test_the_token_loss_alone_teaches_up_to_the_block_that_is_read(tmp_path: Path) -> None:
    model = taught(tmp_path, encoder()[0], depth=0.5)
    model(batch_for(model))[2].backward()
    learnt = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.encoder.blocks]
    assert learnt == [True, True, False, False]


def test_layer_decay_finds_every_parameter_of_the_encoder(tmp_path: Path) -> None:
    model = taught(tmp_path, encoder()[0])
    found = model.distances()
    assert found.keys() <= dict(model.named_parameters()).keys()
    assert {name.removeprefix("student.encoder.") for name in found} == dict(model.encoder.named_parameters()).keys()
    assert isinstance(model.project, nn.Linear)
