"""Taps against timm's own maps, and, for every tuning method, against the tokens that the method gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import METHODS, apply
from miram.finetune.peft.base import learnt
from miram.finetune.segment.taps import Taps, evenly_spaced, trimmed

OPTIONS: dict[str, dict[str, Any]] = {"houlsby": {"dim": 4}, "dvpt": {"num_prompts": 3, "dim": 4, "share_every": 2}}
KINDS = ("class token", "no class token", "rotary, registers", "not square", "SwiGLU")
MAPPED = [name for name in METHODS if name != "savit"]


def taps(method: str, kind: str, **how: Any) -> Taps:
    torch.manual_seed(3)
    return Taps(apply(VITS[kind](), method, **OPTIONS.get(method, {})), **how).eval()


def rows_and_columns(tokens: Tensor, grid: tuple[int, int]) -> list[list[Tensor]]:
    """Tokens (B, N, D) by row and column, counted as one reads."""
    return [[tokens[:, row * grid[1] + column] for column in range(grid[1])] for row in range(grid[0])]


@pytest.mark.parametrize(("blocks", "expected"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (2, (0, 0, 1, 1))])
def test_four_blocks_are_evenly_spaced_with_the_last_among_them(blocks: int, expected: tuple[int, ...]) -> None:
    assert evenly_spaced(blocks) == expected
    for others in range(1, 50):
        chosen = evenly_spaced(others)
        assert chosen[-1] == others - 1
        steps = [b - a for a, b in zip((-1, *chosen), chosen, strict=False)]
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_a_plain_encoder_gives_what_timm_gives(name: str) -> None:
    vit = small(name, image=(64, 32), depth=8)
    x, seen = pictures(vit), []
    expected = vit.forward_intermediates(x, indices=[1, 3, 5, 7], norm=True, intermediates_only=True)
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out))
    found = Taps(apply(vit, "linear")).eval()(x)
    assert [m.shape for m in found] == [(2, 48, 4, 2)] * 4
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b)
        tokens = vit.norm(seen[2 * i + 1])[:, vit.num_prefix_tokens :]
        for row, line in enumerate(rows_and_columns(tokens, (4, 2))):
            for column, token in enumerate(line):
                assert torch.equal(a[:, :, row, column], token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", MAPPED)
@torch.no_grad()
def test_the_last_map_is_the_patches_of_the_tuned_features(method: str, kind: str) -> None:
    reader, x = taps(method, kind), pictures(VITS[kind]())
    for tensor in reader.parameters():
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)))
    prefix = VITS[kind]().num_prefix_tokens
    maps, tokens = reader(x), reader.tuned.forward_features(x)[:, prefix:]
    grid = VITS[kind]().patch_embed.grid_size
    assert [m.shape for m in maps] == [(2, 48, *grid)] * 4
    for row, line in enumerate(rows_and_columns(tokens, grid)):
        for column, token in enumerate(line):
            assert torch.allclose(maps[-1][:, :, row, column], token, atol=1e-5)
    assert not torch.allclose(maps[0], maps[-1], atol=1e-2)


@pytest.mark.parametrize("method", MAPPED)
def test_all_that_learns_has_a_gradient_and_all_that_is_frozen_none(method: str) -> None:
    reader, weights = taps(method, "class token"), torch.Generator().manual_seed(5)
    before = [tensor.requires_grad for tensor in reader.parameters()]
    maps = reader(pictures(VITS["class token"]()))
    assert maps[0].requires_grad == (method != "linear"), "a frozen encoder keeps no graph"
    if maps[0].requires_grad:
        sum((m * torch.randn(m.shape, generator=weights)).sum() for m in maps).backward()
    assert [tensor.grad is not None for tensor in reader.parameters()] == before


def test_savit_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match=r"method savit gives no maps.*choose another"):
        taps("savit", "class token")


@pytest.mark.parametrize("layers", [(0, 1), (0, 0, 1, 2), (-1, 0, 1, 1)])
def test_blocks_that_are_not_there_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="layers must be 4 blocks from 0 to 1"):
        taps("linear", "class token", layers=layers)


@torch.no_grad()
def test_chosen_layers_come_in_the_order_they_are_named() -> None:
    vit = small(depth=5)
    x = pictures(vit)
    each = vit.forward_intermediates(x, norm=True, intermediates_only=True)
    for a, i in zip(Taps(apply(vit, "vpt_deep"), [4, 0, 2, 4]).tuned.model.vit.blocks, range(5), strict=True):
        assert a is vit.blocks[i]
    found = Taps(apply(small(depth=5), "linear"), [4, 0, 2, 4]).eval()(x)
    assert all(torch.equal(m, each[i]) for m, i in zip(found, (4, 0, 2, 4), strict=True))


def test_zeroed_maps_are_zeros_in_the_same_graph() -> None:
    reader = taps("lora", "class token", zeroed=True)
    maps = reader(pictures(VITS["class token"]()))
    assert all(not m.any() for m in maps)
    sum(m.sum() for m in maps).backward()
    learning = [tensor for tensor in reader.parameters() if tensor.requires_grad]
    assert learning
    assert all(tensor.grad is not None for tensor in learning)
    assert all(not tensor.grad.any() for tensor in learning)


@pytest.mark.parametrize("layers", [None, [0, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize(
    "how", [{}, {"global_pool": "avg"}, {"global_pool": "map"}, {"global_pool": "avg", "fc_norm": True}]
)
def test_all_that_learns_of_an_encoder_has_a_gradient_however_it_pools(how: dict[str, Any], layers: Any) -> None:
    """Else DDP stops: what acts behind the maps is read by nobody."""
    whole = Taps(apply(small(depth=3, **how), "full"), layers).eval()
    tuned = apply(trimmed(small(depth=3, **how), layers), "full")
    maps = Taps(tuned, layers).eval()(images := torch.randn(1, 1, *small(**how).patch_embed.img_size))  # type: ignore[misc]
    assert all(torch.equal(here, there) for here, there in zip(maps, whole(images), strict=True))
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert not [name for name, tensor in learnt(tuned.model) if tensor.grad is None]
