"""The teacher against blocks run by hand: what it sees, where it is read, and what it leaves alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miram.engine.errors import UserError
from miram.finetune.distill.teacher import Teacher, block_at, layers, shared
from miram.pretrain.encoder import Encoder, build_encoder, card_for, encode_visible, save_encoder

SIZE, IDS = (32, 48), torch.tensor([[4, 0, 5], [1, 3, 2]])
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.3}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "no_class": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "rope": ("eva02_tiny_patch14_224", {"patch_size": 16, "global_pool": "token"}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_ape_224", {"embed_dim": 32, "num_heads": 2}),
}
EVERY = pytest.mark.parametrize("kind", list(KINDS))


def encoder(kind: str = "plain", size: tuple[int, int] = SIZE, **options: Any) -> Encoder:
    """With weights that let no part be left out unnoticed."""
    name, more = KINDS[kind]
    card = card_for(name, size, {"depth": 4, "embed_dim": 32, "num_heads": 2, **more, **options})
    torch.manual_seed(1)
    vit = build_encoder(card)
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vit.eval()


def saved(folder: Path, kind: str = "plain", size: tuple[int, int] = SIZE, **options: Any) -> str:
    """The same as `load_encoder` finds it, trained on brighter pictures than the student's."""
    name, more = KINDS[kind]
    card = card_for(name, size, {"depth": 4, "embed_dim": 32, "num_heads": 2, **more, **options})
    object.__setattr__(card, "mean", (0.7,))
    object.__setattr__(card, "std", (0.2,))
    save_encoder(folder, encoder(kind, size, **options), card)
    return str(folder)


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 1, *SIZE, generator=torch.Generator().manual_seed(2))


@EVERY
def test_layers_end_where_the_encoder_does(kind: str) -> None:
    vit = encoder(kind)
    *_, last = layers(vit, images(), IDS)
    assert torch.equal(vit.norm(last), encode_visible(vit, images(), IDS))


@EVERY
def test_tokens_are_those_of_a_vit_cut_off_after_the_block(kind: str, tmp_path: Path) -> None:
    teacher = Teacher(saved(tmp_path, kind), encoder(), 0.5)
    cut = encoder(kind)
    del cut.blocks[2:]
    if kind == "rope_mixed":
        cut.rope.freqs = nn.Parameter(cut.rope.freqs[:, :2])  # type: ignore[union-attr, index]
        cut.rope.depth = 2  # type: ignore[union-attr]
    cut.norm = nn.Identity()
    grey = images() * 0.5 + 0.5  # of the student's mean 0.5 and deviation 0.5
    torch.testing.assert_close(teacher.tokens(images(), IDS), encode_visible(cut, (grey - 0.7) / 0.2, IDS))


def test_nothing_behind_the_chosen_block_is_computed(tmp_path: Path) -> None:
    teacher = Teacher(saved(tmp_path), encoder(), 0.5)
    for behind in (*teacher.vit.blocks[2:], teacher.vit.norm):
        behind.forward = None  # type: ignore[assignment]
    teacher.tokens(images(), IDS)
    teacher.attention(images())


def test_hidden_patches_are_not_seen(tmp_path: Path) -> None:
    teacher, changed = Teacher(saved(tmp_path), encoder(), 0.75), images()
    changed[0, :, :16, 16:] = 9  # patches 1 and 2 of image 0 are hidden
    assert torch.equal(teacher.tokens(images(), IDS), teacher.tokens(changed, IDS))
    changed[1, :, :16, 16:] = 9  # of image 1 they are visible
    assert not torch.equal(teacher.tokens(images(), IDS), teacher.tokens(changed, IDS))


@EVERY
def test_attention_is_what_the_block_s_softmax_works_on(kind: str, tmp_path: Path) -> None:
    """softmax(Q K^T / sqrt(d)) V is what the block goes on with, whatever norms and rotations came before."""
    teacher = Teacher(saved(tmp_path, kind), encoder(), 0.75)
    gone_on: list[Tensor] = []
    teacher.vit.blocks[2].attn.norm.register_forward_pre_hook(lambda _, inputs: gone_on.append(inputs[0]))  # type: ignore[union-attr, operator]
    Q, K, V = teacher.attention(images())
    mixed = torch.softmax(Q @ K.mT / Q.shape[-1] ** 0.5, dim=-1) @ V
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), gone_on[0])


def test_attention_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    teacher = Teacher(saved(tmp_path, attn_layer="diff"), encoder(), 0.75)
    teacher.tokens(images(), IDS)
    with pytest.raises(UserError, match=r"no plain attention .*DiffAttention.*kind: dmae"):
        teacher.attention(images())


def test_a_teacher_of_another_size_and_number_of_channels_is_fitted_to_the_student(tmp_path: Path) -> None:
    teacher = Teacher(saved(tmp_path, size=(64, 64)), encoder(in_chans=3), 0.75)
    colour = images().expand(-1, 3, -1, -1)
    assert teacher.vit.patch_embed.grid_size == (2, 3)
    assert teacher.tokens(colour, IDS).shape == (2, 1 + 3, 32)


def test_another_grid_is_refused_with_both_named(tmp_path: Path) -> None:
    name = saved(tmp_path, patch_size=8)
    with pytest.raises(UserError, match=r"4 x 6 patches, the student into 2 x 3; .* patches of 8 pixels"):
        Teacher(name, encoder(), 0.75)
    with pytest.raises(UserError, match=r"^distill\.teacher: there is no encoder at nosuch"):
        Teacher("nosuch", encoder(), 0.75)


def test_who_holds_a_teacher_has_none_of_its_tensors(tmp_path: Path) -> None:
    teacher = Teacher(saved(tmp_path), encoder(), 0.75)
    holder = nn.Linear(2, 2)
    holder.teacher = teacher  # type: ignore[assignment]
    assert set(holder.state_dict()) == {"weight", "bias"}
    assert deepcopy(holder).teacher is teacher
    assert not teacher.vit.training
    assert not any(p.requires_grad for p in teacher.vit.parameters())
    assert not teacher.tokens(images().requires_grad_(), IDS).requires_grad


@pytest.mark.parametrize(
    ("blocks", "depth", "number"),
    [(24, 0.75, 18), (12, 0.75, 9), (2, 0.75, 2), (6, 0.75, 5), (4, 1.0, 4), (4, 0.01, 1)],
)
def test_depth_is_a_share_of_blocks(blocks: int, depth: float, number: int) -> None:
    vit = encoder()
    vit.blocks = nn.Sequential(*[nn.Identity() for _ in range(blocks)])
    assert block_at(vit, depth) == number


def test_shared_tokens_are_the_class_token_and_patches_that_both_have() -> None:
    tokens = torch.arange(9.0).reshape(1, 9, 1)  # class token, two registers, six patches
    registers, plain, bare = encoder("registers"), encoder(), encoder("no_class")
    assert shared(tokens, registers, plain).flatten().tolist() == [0, 3, 4, 5, 6, 7, 8]
    assert shared(tokens, registers, bare).flatten().tolist() == [3, 4, 5, 6, 7, 8]
    assert shared(tokens[:, 2:], plain, registers).flatten().tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert shared(tokens[:, 3:], bare, plain).flatten().tolist() == [3, 4, 5, 6, 7, 8]
