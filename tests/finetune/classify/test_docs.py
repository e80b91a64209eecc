"""What docs/finetune.md and the presets tell users is so."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from miram.engine.config import keys, load, presets
from miram.finetune.classify import mil, probing
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.classify.stage import FROZEN
from miram.finetune.peft import METHODS

PAGE = (Path(__file__).parents[3] / "docs" / "finetune.md").read_text()
OURS = [name for name in presets() if name.startswith("finetune/")]


def table() -> dict[str, tuple[float, float]]:
    """Method -> range of the page's table; "" for all others."""
    rows = re.findall(r"^\| (`[^|]+|all others) \| ([\d.e-]+) \| ([\d.e-]+) \|$", PAGE, re.MULTILINE)
    return {
        name: (float(low), float(high)) for names, low, high in rows for name in re.findall(r"`(\w+)`", names) or [""]
    }


def test_the_table_of_rates_is_what_is_tried() -> None:
    told, found = table(), {name: method.rates for name, method in METHODS.items()}
    found |= {"probe": (probing.STRENGTHS[0], probing.STRENGTHS[-1]), "attention_mil": mil.RATES}
    assert len(told) > 8
    assert all(told.get(name, told[""]) == bounds for name, bounds in found.items())
    assert told.keys() - {""} <= found.keys()


@pytest.mark.parametrize("preset", OURS)
def test_presets_are_what_they_say(preset: str) -> None:
    settings = load(FinetuneConfig, preset)
    assert settings.finetune.method in {*METHODS, *FROZEN}
    named = [entry if isinstance(entry, str) else str(entry["method"]) for entry in settings.sweep.methods]
    assert set(named) <= {*METHODS, *FROZEN}
    assert settings.sweep.against in named


def test_keys_and_presets_that_the_page_names_exist() -> None:
    known = {key for key, *_ in keys(FinetuneConfig)}
    sections = {".".join(parts[: i + 1]) for parts in (key.split(".") for key in known) for i in range(len(parts))}
    named = set(re.findall(r"`(?:--)?((?:finetune|sweep|data|train)\.[a-z_.]*[a-z_])", PAGE))
    assert len(named) > 15
    assert named <= sections
    assert set(re.findall(r"\b(finetune/[a-z]\w+)(?![\w.])", PAGE)) <= set(presets())


def test_the_sweep_that_is_for_a_demo_compares_the_probe_with_four_tuning_methods() -> None:
    settings = load(FinetuneConfig, "finetune/demo_sweep")
    assert len(set(settings.sweep.methods) & METHODS.keys() - {"linear"}) >= 4
    assert "probe" in settings.sweep.methods
    assert min(settings.sweep.fractions) < 1
    assert all(a < b for a, b in pairwise(settings.sweep.fractions))
