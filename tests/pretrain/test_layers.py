"""Distances from what reads the encoder, against timm's layer-wise decay and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from timm.optim import param_groups_layer_decay
from torch import nn

from miram.engine.optim import make_optimizer
from miram.engine.recipe import TrainSection
from miram.pretrain.config import MocoSection, ScaleSection
from miram.pretrain.encoder import Encoder, build_encoder, card_for
from miram.pretrain.layers import distances
from miram.pretrain.miram import Miram
from miram.pretrain.moco_v3 import MocoV3

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 2}
VITS = [
    ("vit_small_patch16_224", {}),
    ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_base_patch16_clip_224", {}),  # norms before the blocks
    ("eva02_tiny_patch14_224", {}),  # norms after pooling
    ("vit_small_patch16_dinov3", {}),  # rotary positions
    ("vit_small_patch16_rope_mixed_224", {}),  # learns them
]


def encoder(name: str = "vit_small_patch16_224") -> Encoder:
    return build_encoder(card_for(name, (32, 32), SMALL))


@pytest.mark.parametrize(("name", "options"), VITS)
def test_rates_are_those_of_timms_layer_decay_under_a_head(name: str, options: dict[str, Any]) -> None:
    """Without a head timm counts from the last norm, where nothing reads it; with one it counts as we do."""
    vit = timm.create_model(name, num_classes=7, **SMALL, **options)
    known = {id(p): name for name, p in vit.named_parameters()}
    theirs = {known[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(vit, layer_decay=0.6) for p in g["params"]}
    vit.reset_classifier(0, options.get("global_pool"))
    ours = {name: 0.6**distance for name, distance in distances(vit, prefix="").items()}
    assert ours.keys() == dict(vit.named_parameters()).keys()
    assert ours == pytest.approx({name: theirs[name] for name in ours})


def test_blocks_are_counted_from_the_last() -> None:
    found = distances(encoder())
    assert found["encoder.patch_embed.proj.weight"] == found["encoder.cls_token"] == found["encoder.pos_embed"] == 4
    assert [found[f"encoder.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [3, 2, 1]
    assert [found[f"encoder.blocks.{i}.norm1.bias"] for i in range(3)] == [3, 2, 1]
    assert found["encoder.norm.weight"] == 1


def far(objective: nn.Module, found: dict[str, int]) -> set[str]:
    """Parts of an objective with a parameter away from the losses; every name has to be one of its parameters."""
    assert found.keys() <= dict(objective.named_parameters()).keys()
    return {name.split(".")[0] for name, distance in found.items() if distance}


def test_of_miram_the_encoder_alone_is_away_from_the_losses() -> None:
    scales = [ScaleSection(scale=s, depth=1, width=32, heads=2, attention="softmax") for s in (1, 2)]
    objective = Miram(encoder(), scales)
    assert far(objective, objective.distances()) == {"encoder"}
    groups = make_optimizer(objective, TrainSection(steps=1, layer_decay=0.5)).param_groups
    assert [group["lr_scale"] for group in groups] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]


def test_of_moco_the_encoder_alone_is_away_from_the_losses_and_no_slow_copy_learns() -> None:
    objective = MocoV3(encoder(), MocoSection(hidden=8, dim=4))
    assert far(objective, objective.distances()) == {"encoder"}
    optimizer = make_optimizer(objective, TrainSection(steps=1, layer_decay=0.5))
    learnt = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in learnt for name, p in objective.named_parameters() if name.startswith("momentum_"))
