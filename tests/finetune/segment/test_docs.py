"""What docs/segment.md and the presets tell users is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from miram.engine.config import keys, load, presets
from miram.finetune.peft import METHODS
from miram.finetune.segment.bench import FROZEN
from miram.finetune.segment.config import SegmentConfig
from miram.finetune.segment.decoders import Light, Linear, Unetr
from miram.finetune.segment.mdsa_unet import RELEASED
from miram.finetune.segment.models import MODELS, build, read_model

PAGE = (Path(__file__).parents[3] / "docs" / "segment.md").read_text()
OURS = [name for name in presets() if name.startswith("segment/")]


def counted(name: str) -> list[int]:
    """The parameters that the page's table tells of a model."""
    (row,) = re.findall(rf"^\| `{name}`[^|]*\|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{3,}", row)]


def parameters(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize(("name", "decoder"), [("light", Light), ("linear", Linear), ("unetr", Unetr)])
def test_decoders_have_the_parameters_that_the_page_tells(name: str, decoder: Callable[..., nn.Module]) -> None:
    options = read_model(name, {}).model_dump(exclude={"layers"})
    with torch.device("meta"):
        found = [parameters(decoder(dim, (16, 16), 1, 2, **options)) for dim in (384, 768)]  # ViT-S, ViT-B
    assert counted(name) == found


def test_networks_have_the_parameters_that_the_page_tells() -> None:
    assert counted("unet") == [parameters(build("unet", {}, None, 1, 2))]
    assert counted("mdsa_unet") == [6_576_225]
    assert MODELS.keys() == {"light", "linear", "unetr", "mdsa_unet", "unet"}


def test_the_table_of_switches_is_the_release_and_our_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`[^|]*\| (?:`(\w+)`|(\d+))[^|]*\|$", PAGE, re.MULTILINE)
    ours = read_model("mdsa_unet", {}).model_dump()
    assert {name for name, *_ in rows} == RELEASED.keys()
    for name, here, word, number in rows:
        assert str(ours[name]) == here
        assert str(RELEASED[name]) == (word or number)


@pytest.mark.parametrize("preset", OURS)
def test_presets_are_what_they_say(preset: str) -> None:
    settings = load(SegmentConfig, preset)
    assert settings.segment.model in MODELS
    assert settings.segment.method in {*METHODS, FROZEN}
    assert settings.sweep.against in settings.sweep.models


def test_keys_and_presets_that_the_page_names_exist() -> None:
    known = {key for key, *_ in keys(SegmentConfig)}
    named = set(re.findall(r"`(?:--)?((?:segment|sweep|data|train)\.[a-z_.]*[a-z_])", PAGE))
    assert len(named) > 12
    assert named <= known
    assert set(re.findall(r"\b(segment/[a-z]\w+)(?![\w.])", PAGE)) <= set(presets())
