"""Token relations against loops over heads, queries and keys, and a student that attends as its teacher does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miram.engine.errors import UserError
from miram.finetune.distill.relations import Relations
from miram.finetune.distill.teacher import Teacher
from miram.pretrain.encoder import Encoder, build_encoder, card_for, save_encoder

EVA = ("eva02_tiny_patch14_224", {"patch_size": 16, "global_pool": "token"})


def encoder(name: str = "vit_tiny_patch16_224", **options: Any) -> tuple[Encoder, Any]:
    card = card_for(name, (32, 32), {"depth": 4, "embed_dim": 48, "num_heads": 3, **options})
    torch.manual_seed(3)
    vit = build_encoder(card)
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vit, card


def taught(folder: Path, student: Encoder, heads: int | None = None, depth: float = 0.75, **options: Any) -> Relations:
    save_encoder(folder, *encoder(**options))
    return Relations(student, Teacher(str(folder), student, depth), heads)


def batch(n: int = 2) -> dict[str, Tensor]:
    return {"view/1": torch.randn(n, 1, 32, 32, generator=torch.Generator().manual_seed(5))}


def row(query: Tensor, keys: Tensor) -> list[float]:
    """softmax(q . k / sqrt(d)) over keys, in floats of Python."""
    scores = [sum(a * b for a, b in zip(query.tolist(), key, strict=True)) for key in keys.tolist()]
    powers = [math.exp(score / math.sqrt(len(query))) for score in scores]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("heads", [None, 6, 1])
def test_the_losses_are_those_of_loops(tmp_path: Path, heads: int | None) -> None:
    """Also with the teacher's channels split into other heads than its own."""
    student, _ = encoder(embed_dim=32, num_heads=2, depth=2)
    model = taught(tmp_path, student, heads)
    h = heads or 3
    theirs = [x.transpose(1, 2).reshape(2, 5, 48) for x in model.teacher.attention(batch()["view/1"])]
    ours = model.relate(student.forward_features(batch()["view/1"])).reshape(2, 5, 3, 48).unbind(2)
    expected = [0.0, 0.0]
    for loss, (a, b) in enumerate([(0, 1), (2, 2)]):
        for image in range(2):
            for head in range(h):
                part = slice(head * 48 // h, (head + 1) * 48 // h)
                for i in range(5):
                    P = row(theirs[a][image, i, part], theirs[b][image, :, part])
                    p = row(ours[a][image, i, part], ours[b][image, :, part])
                    kl = sum(x * math.log(x / y) for x, y in zip(P, p, strict=True))
                    expected[loss] += kl / (h * 5)
    assert model(batch()).tolist() == pytest.approx(expected, rel=1e-4)
    assert model.counts(batch()).tolist() == [2, 2]


def test_a_student_that_ends_where_the_teacher_is_read_attends_alike(tmp_path: Path) -> None:
    """Two blocks, the third's norm for its last, and the third's projection: KL is 0."""
    student, _ = encoder(depth=2)
    model = taught(tmp_path, student)
    vit, _ = encoder()
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith(("norm.", "blocks.2", "blocks.3"))}
    student.load_state_dict(state | {f"norm.{k}": v for k, v in vit.blocks[2].norm1.state_dict().items()})  # type: ignore[union-attr]
    assert model(batch()).min() > 1e-4
    model.relate.load_state_dict(vit.blocks[2].attn.qkv.state_dict())  # type: ignore[union-attr, arg-type]
    assert model(batch()).abs().max() < 1e-5


@pytest.mark.parametrize("student", [("vit_tiny_patch16_224", {"reg_tokens": 2}), EVA])
@pytest.mark.parametrize("teacher", [("vit_tiny_patch16_224", {"qk_norm": True}), EVA])
def test_a_step_reaches_all_of_the_student_and_nothing_of_the_teacher(
    student: tuple[str, dict[str, Any]], teacher: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    """DDP asks for it. Where the last block's own Q, K and V were read, its projection and FFN would learn nothing."""
    name, options = student
    model = taught(tmp_path, encoder(name, **options)[0], name=teacher[0], **teacher[1])
    before = {key: value.clone() for key, value in model.teacher.vit.state_dict().items()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), 0.1)
    model(batch()).sum().backward()
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == []
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.teacher.vit.state_dict().items())
    assert not any("teacher" in key for key in model.state_dict())


def test_learning_makes_them_alike(tmp_path: Path) -> None:
    model = taught(tmp_path, encoder(embed_dim=32, num_heads=2, depth=2)[0])
    optimizer, first = torch.optim.Adam(model.parameters(), 3e-3), model(batch()).detach()
    for _ in range(40):
        optimizer.zero_grad()
        model(batch()).sum().backward()
        optimizer.step()
    assert (model(batch()) < 0.2 * first).all()


def test_in_bf16_relations_are_of_full_precision(tmp_path: Path) -> None:
    model = taught(tmp_path, encoder()[0])
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model(batch()), rtol=0.05, atol=1e-3)


def test_heads_that_do_not_divide_the_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.relation_heads: the teacher's 48 channels do not divide into 5"):
        taught(tmp_path, encoder()[0], heads=5)


def test_layer_decay_finds_every_parameter_of_the_encoder(tmp_path: Path) -> None:
    model = taught(tmp_path, encoder()[0])
    names = {name.removeprefix("encoder.") for name in model.distances()}
    assert names == dict(model.encoder.named_parameters()).keys()
    assert isinstance(model.relate, nn.Linear)
