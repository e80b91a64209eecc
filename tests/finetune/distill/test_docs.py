"""What docs/distill.md and the presets tell users is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from miram.engine.config import keys, load, presets
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.config import ProbeConfig
from miram.finetune.distill.config import DistillConfig
from miram.pretrain.config import PretrainConfig
from miram.pretrain.encoder import Encoder, build_encoder, card_for

PAGE = (Path(__file__).parents[3] / "docs" / "distill.md").read_text()
OURS = [name for name in presets() if name.startswith("distill/")]
EVERY = [key for schema in (DistillConfig, FinetuneConfig, ProbeConfig) for key in keys(schema)]


def encoder_of(schema: type[PretrainConfig], preset: str) -> Encoder:
    model = load(schema, preset).model
    with torch.device("meta"):
        return build_encoder(card_for(model.encoder, model.size, {"in_chans": 1} | model.encoder_options))


def test_the_tables_of_keys_are_the_sections_with_their_defaults() -> None:
    told = dict(re.findall(r"^\| `([a-z_.]+\.[a-z_]+)` \| `?([^|`]+)`? \|", PAGE, re.MULTILINE))
    ours = r"distill\.|finetune\.teacher\."
    assert told == {key: default.strip('"') for key, _, default, _ in EVERY if re.match(ours, key)}


def test_keys_and_presets_that_the_page_names_exist() -> None:
    known = {key for key, *_ in EVERY}
    sections = {".".join(parts[: i + 1]) for parts in (key.split(".") for key in known) for i in range(len(parts))}
    named = set(re.findall(r"(?:`|--)((?:distill|finetune|data|model|probe)\.[a-z_.]*[a-z_])", PAGE))
    assert len(named) > 10
    assert named <= sections
    assert set(re.findall(r"(?<![/\w])((?:distill|pretrain|finetune|probe)/[a-z]\w+)(?![\w./])", PAGE)) <= {*presets()}


def test_the_table_of_presets_has_every_one() -> None:
    assert sorted(re.findall(r"^\| `(distill/\w+)` \|", PAGE, re.MULTILINE)) == sorted(OURS)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("dmae", "mae"),
        ("relations", "vit_small"),
        ("demo", "demo"),
        pytest.param(
            "phantoms",
            "phantom_teacher",
            marks=pytest.mark.skipif("pretrain/phantom_teacher" not in presets(), reason="no such preset"),
        ),
    ],
)
def test_the_teacher_of_a_preset_is_larger_and_of_the_students_grid(student: str, teacher: str) -> None:
    small, large = encoder_of(DistillConfig, f"distill/{student}"), encoder_of(PretrainConfig, f"pretrain/{teacher}")
    assert small.patch_embed.grid_size == large.patch_embed.grid_size
    sizes = [sum(parameter.numel() for parameter in vit.parameters()) for vit in (small, large)]
    assert sizes[0] < sizes[1] / 2
