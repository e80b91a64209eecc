"""The stage: settings that would switch the guard off are refused, and so are places that are not the export's own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from lockables import lock, write_encoder

from miram.engine.errors import UserError
from miram.finetune.export.card import CARD
from miram.finetune.export.stage import export, merging


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("stage") / "encoder")


@pytest.fixture(scope="module")
def exported(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(encoder, "timm", tmp_path_factory.mktemp("stage") / "timm")


@pytest.fixture
def earlier(exported: Path, tmp_path: Path) -> Path:
    """An export that may be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "earlier"))


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), -0.1])
def test_a_margin_that_stops_nothing_is_refused(margin: float) -> None:
    with pytest.raises(UserError, match=r"--margin \S+: give a number from 0 up"):
        export("nowhere", "int8", margin=margin)


@pytest.mark.parametrize("text", ["0.6", "1.0", "nan", "inf", "-1", "all"])
def test_a_share_beyond_half_of_the_tokens_is_refused_as_what_is_no_share(text: str) -> None:
    with pytest.raises(
        UserError, match=f"--merge-tokens {text}: give whole tokens a block, as 8, or a share up to 0.5"
    ):
        merging(text)


def test_tokens_and_shares_are_told_apart() -> None:
    assert [merging(text) for text in ("8", "0.5", "0.0", None)] == [8, 0.5, 0.0, None]


@pytest.mark.parametrize("out", [".", "", ".."])
def test_the_working_folder_is_not_written_over(
    out: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="the folder you are in"):
        export(encoder, "timm", Path(out))
    assert list(tmp_path.rglob("*")) == [here.parent, here]


def test_a_relative_folder_is_one_of_the_working_folder(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(encoder, "timm", Path("new")) == tmp_path / "new"


def test_a_link_is_not_written_through(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    for target in ("there", "nowhere"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        with pytest.raises(UserError, match="is a link; name the folder itself"):
            export(encoder, "timm", link)
    assert link.is_symlink()
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    "edit",
    [
        "{",
        '{"schema": "other"}',
        {"source": None},
        {"source": []},
        {"source": {}},
        {"source": {"digest": None}},
        {"files": None},
        {"files": ["model.safetensors"]},
    ],
)
def test_a_card_that_does_not_parse_is_no_export_of_miram(edit: Any, encoder: Path, earlier: Path) -> None:
    content = json.loads((earlier / CARD).read_text())
    (earlier / CARD).write_text(edit if isinstance(edit, str) else json.dumps(content | edit))
    with pytest.raises(UserError, match="is there and no export of miram; name another folder"):
        export(encoder, "timm", earlier)


@pytest.mark.parametrize("name", ["mine.txt", "notes/mine.txt"])
def test_files_that_the_export_did_not_write_are_not_deleted(name: str, encoder: Path, earlier: Path) -> None:
    export(encoder, "timm", earlier)  # its own files may go
    (earlier / name).parent.mkdir(exist_ok=True)
    (earlier / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds what no export of miram wrote \\({name}\\)"):
        export(encoder, "timm", earlier)
    assert (earlier / name).read_text() == "mine"


def test_a_split_that_is_not_there_does_not_switch_the_measurement_off(
    encoder: Path, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    lock(run, phantoms, encoder)
    (run / "config.yaml").write_text(
        f"out: here\ndata:\n  shards: {phantoms}\n  task: mass\nfinetune:\n  encoder: {encoder}\ntrain:\n  steps: 1\n"
    )
    with pytest.raises(UserError, match="tset"):
        export(run, "int8", split="tset")
    assert not (run / "export").exists()


def test_all_extras_of_int8_that_are_missing_are_named_at_once(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"needs torchao, which is not here: pip install 'miram\[compress\]'"):
        export(encoder, "int8", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UserError, match=r"needs onnxruntime, torchao, which are not here: pip install 'miram\[onnx,compress\]'"
    ):
        export(encoder, "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
