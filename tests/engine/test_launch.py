"""How ranks are to share a model: what was configured, or what the launcher's file asks."""

from __future__ import annotations

import os

import pytest
import torch

from miram.engine.errors import UserError
from miram.engine.launch import FSDP_ASKED, hidden, strategy


@pytest.mark.parametrize(
    ("parallel", "asked", "version", "expected"),
    [
        ("auto", None, None, "ddp"),
        ("auto", "false", "2", "ddp"),
        ("auto", "true", "2", "fsdp2"),
        ("ddp", "true", "2", "ddp"),
        ("fsdp2", None, None, "fsdp2"),
        ("fsdp2", "true", "1", "fsdp2"),
    ],
)
def test_the_configuration_goes_before_the_launchers_file(
    parallel: str, asked: str | None, version: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ((FSDP_ASKED, asked), ("FSDP_VERSION", version)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert strategy(parallel, world=2) == expected
    assert strategy(parallel, world=1) == "alone"


@pytest.mark.parametrize("version", ["1", None])
def test_the_first_fsdp_is_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FSDP_ASKED, "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(UserError, match="fsdp_version: 2"):
        strategy("auto", world=2)


def test_a_variable_is_hidden_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAM_HERE", "yes")
    with hidden("MIRAM_HERE"), hidden("MIRAM_ABSENT"):
        assert "MIRAM_HERE" not in os.environ
    assert os.environ["MIRAM_HERE"] == "yes"
    assert "MIRAM_ABSENT" not in os.environ


def test_blocks_are_found_by_timms_name_for_them() -> None:
    from miram.engine.parallel import blocks

    model = torch.nn.ModuleDict({"encoder": torch.nn.Module(), "blocks": torch.nn.ModuleList([torch.nn.ReLU()])})
    model["encoder"].blocks = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.Tanh()))
    assert [type(block) for block in blocks(model)] == [torch.nn.Linear, torch.nn.Sequential, torch.nn.ReLU]
