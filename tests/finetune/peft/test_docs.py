"""The table of methods that people read is that of the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import miram
from miram.finetune.peft import METHODS

DOCS = Path(miram.__file__).parent / "docs" / "tuning.md"
OPTIONS = {"dora": {"rank": 8}} | {key: {"num_prompts": 50} for key in ("vpt_shallow", "vpt_deep", "vpt_gated")}


@pytest.mark.skipif(not DOCS.is_file(), reason="a wheel has no docs")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_table_with_its_options_and_its_count(name: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = METHODS[name](**OPTIONS.get(name, {}))
    lines = DOCS.read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| `{name}` |"))
    assert f"{method.expected(method.shape(vit)):,}" in row
    told = [line for line in lines if line.startswith("| `") and f"`{name}`" in line]
    assert all(field in " ".join(told) for field in METHODS[name].model_fields)
