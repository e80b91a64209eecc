"""What weights learnt from is never told to be freer than is known, whatever was edited in a provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lockables import lock, write_encoder
from sources import source_of
from torch import nn

from miram.finetune.export.card import data_lines, release_of
from miram.finetune.export.licences import Licence, home_of, of_pretraining
from miram.finetune.export.source import read_source

UNKNOWN = {"dataset": "unknown", "licence": "unknown", "used_for": "pretraining"}
FREE = {"dataset": "a", "licence": "CC BY 4.0", "used_for": "pretraining"}
STARTED = UNKNOWN | {"used_for": "pretraining of the encoder it started from"}


@pytest.mark.parametrize(
    ("provenance", "found"),
    [
        ({"objective": "miram"}, [UNKNOWN]),
        ({"converted_from": {"sha256": "1f"}}, [UNKNOWN]),
        ({"objective": "miram", "data": [], "init": None}, [UNKNOWN]),
        ({"objective": "miram", "init": {"from": "random"}}, [UNKNOWN]),
        (
            {"objective": "miram", "init": {"from": "/b", "data": [FREE]}},
            [UNKNOWN, FREE | {"used_for": STARTED["used_for"]}],
        ),
        ({"init": {"from": "random"}}, []),
        ({"init": {"from": "random:vit_tiny_patch16_224"}}, []),
        ({"data": [{"dataset": "x"}]}, [UNKNOWN | {"dataset": "x"}]),
        ({"data": [{"licence": "CC0"}]}, [UNKNOWN | {"licence": "CC0"}]),
        ({"data": None, "objective": "a"}, [UNKNOWN]),
        ({"data": "x"}, [UNKNOWN]),
        ({"data": [FREE, 3]}, [FREE, UNKNOWN]),
        ({"init": "abc"}, [STARTED]),
        ({"init": {"from": "/b", "provenance": "abc"}}, [STARTED]),
        ({"init": {"from": "/b", "provenance": {"data": [{}]}}}, [STARTED]),
    ],
)
def test_whatever_is_not_told_is_unknown(provenance: dict[str, Any], found: list[Licence]) -> None:
    assert of_pretraining(provenance) == found


def test_a_free_data_set_of_the_tuning_does_not_free_an_encoder_of_unknown_origin() -> None:
    tuned = [*of_pretraining({"converted_from": {"sha256": "1f"}}), FREE | {"used_for": "tuning"}]
    assert release_of(source_of(nn.Identity(), "classifier", licences=tuned)).startswith("Not known")


def test_only_what_was_never_trained_is_said_to_be_so() -> None:
    for provenance, never in (({"init": {"from": "random"}}, True), ({"objective": "miram"}, False), ({}, False)):
        rows = "\n".join(data_lines(source_of(nn.Identity(), provenance=provenance)))
        assert ("never trained" in rows) == never
        assert ("unknown" in rows) != never


def test_a_models_own_folder_named_by_a_dot_finds_its_run(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    lock(run, phantoms, write_encoder(tmp_path / "encoder"), input="whole")
    (run / "config.yaml").write_text("{}")
    monkeypatch.chdir(run / "model")
    assert home_of(Path()) == run
    assert read_source(".").home == run
    monkeypatch.chdir(run)
    assert home_of(Path("model")).samefile(run)
    assert home_of(Path()).samefile(run)
