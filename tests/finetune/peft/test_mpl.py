"""Modular prompt learning against lists of prompts that are cut and joined one by one."""

from __future__ import annotations

from itertools import product
from typing import Any

import by_hand
import pytest
import torch
from vits import pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import apply
from miram.finetune.peft.mpl import MPL
from miram.finetune.peft.shape import Shape


def lives(blocks: int, n_ctx: int, add: int, remove: int, depth: int) -> list[list[tuple[int, int]]]:
    """For every block its prompts, each as (block at which it entered, its number there)."""
    prompts, seen = [(0, k) for k in range(n_ctx)], []
    for i in range(blocks):
        if 0 < i < depth:
            for _ in range(remove):
                if prompts:
                    prompts.pop()
            prompts = prompts + [(i, k) for k in range(add * n_ctx)]
        seen.append(list(prompts))
    return seen


OPTIONS = [
    dict(zip(("n_ctx", "add", "remove", "depth"), values, strict=True))
    for values in product((1, 2, 3), (1, 2), (0, 1, 2, 4), (1, 2, 4, 9))
    if values[2] <= values[0] * values[1]
]


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_counts_are_those_of_adding_and_removing_one_by_one(blocks: int) -> None:
    shape = Shape.of(small(depth=blocks))
    for options in OPTIONS:
        seen = lives(blocks, **options)
        assert [MPL(**options).prompts_at(i) for i in range(blocks)] == [len(one) for one in seen], options
        ever = {prompt for one in seen for prompt in one}
        assert MPL(**options).expected(shape) == 48 * len(ever), options


def test_a_vit_b_sees_one_to_nine_prompts() -> None:
    assert [MPL().prompts_at(i) for i in range(12)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]


@pytest.mark.parametrize(
    "options", [{}, {"n_ctx": 2, "add": 1, "remove": 2}, {"n_ctx": 2, "add": 2, "remove": 3, "depth": 3}]
)
def test_prompts_are_added_removed_and_carried(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    tuned = apply(small(depth=4), "mpl", **options)
    assert tuned.trainable == tuned.expected
    model, vit = tuned.model, tuned.model.vit
    with torch.no_grad():
        for prompts in model.prompts:
            prompts.normal_()
    lengths: list[int] = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    images = pictures(vit)
    tokens = model.forward_features(images)

    x, held = by_hand.embed(vit, images), {}
    full = {"n_ctx": 1, "add": 2, "remove": 1, "depth": 9} | options
    for i, (block, alive) in enumerate(zip(vit.blocks, lives(4, **full), strict=True)):
        fresh = {(j, k): model.prompts[j][k].detach().expand(2, -1) for j, k in alive if j == i and (j, k) not in held}
        held |= fresh
        out = by_hand.through(block, torch.cat([x, torch.stack([held[key] for key in alive], dim=1)], dim=1))
        x = out[:, :17]
        held |= {key: out[:, 17 + n] for n, key in enumerate(alive)}
        assert lengths[i] == 17 + len(alive)
    torch.testing.assert_close(tokens, by_hand.norm(vit.norm, x), rtol=1e-5, atol=1e-5)


def test_removing_more_than_is_added_is_refused() -> None:
    apply(small(), "mpl", remove=2)
    with pytest.raises(UserError, match="remove is 3, more than the 2 prompts"):
        apply(small(), "mpl", remove=3)
