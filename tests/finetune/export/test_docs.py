"""What docs/export.md tells users is so, and its code runs as it stands there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from sources import classifier, images, source_of
from torch import nn
from vits import small

from miram.__main__ import app
from miram.engine.errors import UserError
from miram.finetune.export import onnx_file, parity, stage
from miram.finetune.export.card import front_matter, release_of, write_card
from miram.finetune.export.hugging_face_vit import NO_PLACE
from miram.finetune.export.int8 import linear_share
from miram.finetune.export.source import Source
from miram.finetune.export.timm_folder import plain
from miram.finetune.merging import MergedViT
from miram.finetune.peft import METHODS

PAGE = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
KINDS = {
    "encoder": lambda: source_of(vit := small(image=(64, 32)), vit=vit),
    "classifier by a method that merges": classifier,
    "classifier by another method": lambda: replace(classifier(), vit=None, method="vpt_deep"),
    "segmentation": lambda: source_of(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(32, 32)), "segmenter"),
}


def rows(first: str) -> list[list[str]]:
    """The table whose head begins so, without its head."""
    (body,) = re.findall(rf"^\| ?{first} ?\|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]


def holds(source: Source, form: str) -> bool:
    """Whether a format takes this network, as far as that is asked before anything is written."""
    try:
        if form == "int8":
            return linear_share(source.module) > 0
        if form.startswith("onnx"):
            found = onnx_file.networked(source, 2 if "merge" in form else None)
            return "merge" not in form or isinstance(found[0], MergedViT)  # type: ignore[index]
        return plain(source, form) is not None
    except UserError:
        return False


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_kinds_and_formats_is_what_the_exporters_take(kind: str) -> None:
    (told,) = ([cell == "yes" for cell in told] for name, *told in rows("") if name == kind)
    assert told == [holds(KINDS[kind](), form) for form in (*stage.FORMATS, "onnx --merge-tokens")]
    assert len(rows("")) == len(KINDS)


def test_the_methods_that_merge_are_named() -> None:
    (sentence,) = re.findall(r"^(.*) merge into the encoder's weights", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", sentence)) == {name for name, method in METHODS.items() if method.merges}


def test_figures_and_names_are_those_of_the_code() -> None:
    first, *others = parity.BATCHES
    assert f"{first}, {others[0]} and {others[1]} images at once, and on {parity.IMAGES} images" in PAGE
    assert parity.TOLERANCE == 1e-4
    assert onnx_file.LIMIT == 1.8e9
    assert [form for form, *_ in rows("format")] == [f"`{form}`" for form in stage.FORMATS]
    (keys,) = re.findall(r"`metadata_props` hold (.*)\n", PAGE)
    assert set(re.findall(r"`(\w+)`", keys)) == {*onnx_file.SAID, "schema", "source"}
    assert all(part in PAGE for part in NO_PLACE.values())


def test_options_of_the_command_exist_and_their_defaults_are_told() -> None:
    command = typer.main.get_command(app).commands["export"]  # type: ignore[attr-defined]
    known = {option: parameter for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![|\w-])--[a-z][a-z-]*", PAGE))
    assert len(named) > 6
    assert named <= known.keys()
    assert f"`--margin` ({known['--margin'].default})" in PAGE


@pytest.mark.parametrize(
    ("dataset", "licence", "row"),
    [
        ("embed", "a licence", 0),
        ("x", "CC BY-NC 4.0", 1),
        ("x", "unknown", 2),
        ("phantom", "made by miram, free of rights", 3),
    ],
)
def test_the_table_of_licences_is_what_a_card_says(dataset: str, licence: str, row: int) -> None:
    told = [{"dataset": dataset, "licence": licence, "used_for": "pretraining"}]
    source = source_of(nn.Linear(1, 1), licences=told)
    _, said, name = rows("licence of the data")[row]
    head, first = front_matter(source, "timm"), re.split(r"[,.:]", release_of(source))[0]
    assert all(f": {word}\n" in head for word in re.findall(r"`([\w-]+)`", name))
    assert row == 3 or said.startswith(first)


@pytest.mark.slow
def test_the_code_of_the_page_runs_and_computes_what_was_exported(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vit = small(image=(64, 32))
    encoder, tuned = source_of(vit, vit=vit), classifier()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shards").symlink_to(phantoms)
    for source, run, forms in ((encoder, "first", ("timm", "hf")), (tuned, "lora", ("hf", "onnx", "int8"))):
        for form in forms:
            folder = tmp_path / "runs" / run / "export" / form
            folder.mkdir(parents=True)
            (written, *_) = stage.written(source, form, folder, None)
            write_card(folder, source, form, written, None)
    blocks, names = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), dict[str, Any]()
    found: dict[str, torch.Tensor] = {}
    for block in blocks:
        exec(block, names)
        for name in ("features", "tokens", "logits"):
            if f"{name} = " in block or f"({name},)" in block:
                found[f"{name} {len(found)}"] = torch.as_tensor(names[name])
    seen = names["images"]
    wanted = {
        "features": encoder.module(seen), "tokens": vit.forward_features(seen), "logits": tuned.module(names["films"]),
    }  # fmt: skip
    assert len(found) == 6
    for name, outputs in found.items():
        rounding = 0.05 if name == list(found)[-1] else 1e-4
        torch.testing.assert_close(outputs, wanted[name.split()[0]], atol=rounding, rtol=1e-4)
    assert names["classes"] == ["no", "yes"]
    assert float(names["probabilities"].sum(1).max()) == pytest.approx(1)
    assert images(1).shape[1:] == seen.shape[1:]
