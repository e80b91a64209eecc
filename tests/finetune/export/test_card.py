"""The card says whether weights may be passed on, names no place and nobody, and an export is whole or not there."""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lockables import lock, write_encoder
from torch import Tensor, nn
from vits import pictures, small

from miram.data.sources import cbis, cmmd, embed, inbreast, mias, rsna, vindr
from miram.engine.errors import RunFailed, UserError
from miram.engine.files import read_json, sha256
from miram.finetune.classify.locked import read_locked
from miram.finetune.export import stage
from miram.finetune.export.card import CARD, EXPORT, README, release_of, write_card
from miram.finetune.export.licences import ATTRIBUTED, FORBIDDEN, RESTRICTED, UNSTATED, terms_of
from miram.finetune.export.parity import Written
from miram.finetune.export.source import Source, read_source
from miram.finetune.export.stage import export


def of(dataset: str, licence: str, used_for: str = "pretraining") -> dict[str, str]:
    return {"dataset": dataset, "licence": licence, "used_for": used_for}


PHANTOM = of("phantom", "made by miram, free of rights")


def source_with(*licences: dict[str, str], **changes: Any) -> Source:
    known: dict[str, Any] = {"kind": "encoder", "module": nn.Identity(), "vit": None, "head": None, "channels": 1}
    known |= {"image_size": (8, 8), "mean": (0.1,), "std": (0.2,), "digest": "d" * 64, "licences": [*licences]}
    return Source(**(known | changes))


def card_of(folder: Path, source: Source) -> tuple[dict[str, Any], str, dict[str, Any]]:
    (folder / "model.bin").write_bytes(b"weights")
    write_card(folder, source, "timm", Written(["model.bin"], None), None)
    text = (folder / README).read_text()
    return read_json(folder / CARD, EXPORT), text, yaml.safe_load(text.split("---")[1])


def test_a_card_has_no_heading_with_nothing_under_it(tmp_path: Path) -> None:
    _, text, _ = card_of(tmp_path, source_with())
    assert "## Input" in text
    assert not re.findall(r"^## .*\n+(?=## |\Z)", text, re.MULTILINE)


# ---------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize(
    ("licence", "terms"),
    [
        (of("embed", embed.LICENCE), FORBIDDEN),
        (of("mine", embed.LICENCE), FORBIDDEN),
        (of("embed", "unknown"), FORBIDDEN),
        (of("cbis-ddsm+embed", "CC BY 3.0"), FORBIDDEN),
        (of("rsna", rsna.LICENCE), RESTRICTED),
        (of("vindr-mammo", vindr.LICENCE), RESTRICTED),
        (of("mias", mias.LICENCE), RESTRICTED),
        (of("inbreast", inbreast.LICENCE), RESTRICTED),
        (of("x", "CC BY-NC 4.0"), RESTRICTED),
        (of("cbis-ddsm", cbis.LICENCE), ATTRIBUTED),
        (of("cmmd", cmmd.LICENCE), ATTRIBUTED),
        (PHANTOM, ATTRIBUTED),
        (of("folder", "unknown"), UNSTATED),
        (of("embedding-study", "CC BY 4.0"), ATTRIBUTED),
    ],
)
def test_every_licence_is_read_for_what_it_means_for_weights(licence: dict[str, str], terms: str) -> None:
    assert terms_of(licence) == terms


def test_one_set_of_embed_anywhere_forbids_the_release(tmp_path: Path) -> None:
    banned = of("embed", embed.LICENCE, "pretraining of its teacher")
    content, text, front = card_of(tmp_path, source_with(PHANTOM, of("rsna", rsna.LICENCE), banned))
    first = next(line for line in text.split("---", 2)[2].splitlines() if line and not line.startswith("#"))
    assert first.startswith("**DO NOT RELEASE.")
    assert (front["license"], front["license_name"]) == ("other", "no-release")
    assert content["release"].startswith("DO NOT RELEASE")
    assert content["data"][2] == {**banned, "terms": FORBIDDEN}


def test_the_strictest_of_the_data_decides(tmp_path: Path) -> None:
    assert release_of(source_with(PHANTOM, of("rsna", rsna.LICENCE))).startswith("Restricted")
    assert release_of(source_with(PHANTOM, of("x", "unknown"))).startswith("Not known")
    assert release_of(source_with()).startswith("Not known")
    _, text, front = card_of(tmp_path, source_with(of("rsna", rsna.LICENCE)))
    assert front["license"] == "other"
    assert "DO NOT RELEASE" not in text
    _, _, front = card_of(tmp_path, source_with(PHANTOM))
    assert front["license"] == "unknown"  # never more than is known
    assert front["datasets"] == ["phantom"]


def test_provenance_loses_its_places(tmp_path: Path) -> None:
    provenance = {
        "objective": "dmae",
        "init": {"from": "timm:vit_tiny_patch16_224"},
        "teacher": {"from": "/data/secret/run", "digest": "abc", "init": {"from": "timm:../x"}},
        "converted_from": {"file": "patient_7.pth", "sha256": "1f"},
    }
    content, text, _ = card_of(tmp_path, source_with(PHANTOM, provenance=provenance))
    assert content["source"]["provenance"] == {
        "objective": "dmae",
        "init": {"from": "timm:vit_tiny_patch16_224"},
        "teacher": {"digest": "abc", "init": {}},
        "converted_from": {"sha256": "1f"},
    }
    assert "secret" not in text


def test_no_string_of_a_provenance_that_may_be_a_path_is_told(tmp_path: Path) -> None:
    secret = ["/root/secret", "C:\\secret", "~secret", "runs/secret"]
    provenance = {
        "objective": "dmae",
        "note": secret[0],
        "notes": [*secret, "kept", {"deep": [secret[1]], secret[3]: 1}],
        "teacher": {"provenance": {"init": {"from": "timm:vit_tiny_patch16_224", "at": secret[2]}}},
    }
    content, text, _ = card_of(tmp_path, source_with(PHANTOM, provenance=provenance))
    assert content["source"]["provenance"] == {
        "objective": "dmae",
        "notes": ["kept", {"deep": []}],
        "teacher": {"provenance": {"init": {"from": "timm:vit_tiny_patch16_224"}}},
    }
    assert "secret" not in text


# ---------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"Features \(batch, 48\): the class token behind"),
        ({"global_pool": "avg"}, r"\(batch, 48\): the mean of the patch tokens behind"),
        ({"global_pool": "avg", "pool_include_prefix": True}, r"\(batch, 48\): the mean of all tokens behind"),
        ({"global_pool": "max"}, r"\(batch, 48\): the largest value of each channel over the patch tokens"),
        ({"global_pool": "avgmax"}, r"\(batch, 48\): half the sum of the mean and the largest value of each channel"),
        ({"global_pool": "map"}, r"\(batch, 48\): timm's pooling `map` behind"),
        (
            {"global_pool": ""},
            r"\(batch, 17, 48\): every token .*, 1 before those\s+of the 16 patches; nothing is pooled",
        ),
    ],
)
def test_features_are_called_what_timm_makes_of_the_tokens(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    vit = small(fc_norm=False, **options)
    _, text, _ = card_of(tmp_path, source_with(PHANTOM, vit=vit))
    assert re.search(said, text)
    assert f"Features (batch, {', '.join(map(str, vit(pictures(vit)).shape[1:]))}):" in text


def test_the_card_tells_an_engineer_what_goes_in_what_comes_out_and_what_yes_means(tmp_path: Path) -> None:
    known = {
        "kind": "classifier",
        "task": "density",
        "kind_of_task": "binary",
        "classes": ("fatty", "dense"),
        "temperature": 0.5,
        "thresholds": {"image": (0.25,), "breast": (0.5,)},
        "reading": {"input": "whole", "preprocessing": [{"breast": True, "margin": 0.0, "max_size": None}]},
        "judged": {"stage": "finetune", "metric": "AUC", "value": 0.9, "interval": [0.8, 0.95], "level": "image"}
        | {"n_images": 40, "n_patients": 10, "split": "3 folds by patient"},
    }
    content, text, front = card_of(tmp_path, source_with(PHANTOM, **known))
    assert front["pipeline_tag"] == "image-classification"
    for said in (
        "float32 of shape (batch, 1, 8, 8)",
        "mean 0.1, std 0.2.",
        "with breast yes, margin 0.0.",
        "`dense` from probability 0.25 on, of one image.",
        "`dense` from probability 0.5 on, of one breast.",
        "AUC 0.900 [0.800, 0.950] by image on 40 images of 10 patients (3 folds by patient)",
    ):
        assert said in text
    assert content["judged"]["value"] == 0.9
    segmenter = source_with(PHANTOM, kind="segmenter", classes=("background", "mass"), thresholds={"pixel": (0.3,)})
    content, text, _ = card_of(tmp_path, segmenter)
    assert "it outlines mass." in content["intended_use"]
    assert "`mass` from probability 0.3 on, of one pixel." in text


# ---------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("exported")
    lock(home / "run", phantoms, write_encoder(home / "encoder"), input="whole", split="train")
    (home / "run" / "config.yaml").write_text(f"data: {{shards: {phantoms}, split: test, task: mass}}\n")
    return home / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_an_export_holds_what_its_card_says(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(copy, "timm")
    assert folder == copy / "export" / "timm"
    content = read_json(folder / CARD, EXPORT)
    assert content["files"] == {path.name: sha256(path) for path in folder.iterdir() if path.name != CARD}
    assert content["parity"]["inputs"]["images"] == 4  # real ones, of the run's data
    assert content["parity"]["largest_difference"] <= content["parity"]["tolerance"]
    card = read_locked(copy).card
    assert content["thresholds"] == {level: [*values] for level, values in card.thresholds.items()}
    assert (content["classes"], content["temperature"]) == (["0", "1"], card.temperature)
    assert "not a medical device" in content["intended_use"]
    assert "wrote" in capsys.readouterr().out


def test_no_file_names_a_place_a_host_or_a_patient(copy: Path, phantoms: Path) -> None:
    folder = export(copy, "timm")
    patients = read_locked(copy).card.trained_on.of
    private = [str(copy), str(phantoms), str(Path.home()), socket.gethostname(), *patients]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [word for word in private if word.encode() in content], path.name
    words = (folder / README).read_text() + (folder / CARD).read_text()
    assert not re.search(r"(?<![\w.:/])/(?:\w+/)+\w", words)


def test_the_ban_is_said_on_the_screen(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_source(copy)
    banned = replace(found, licences=[of("embed", embed.LICENCE)])
    monkeypatch.setattr(stage, "read_source", lambda *_: banned)
    export(copy, "timm")
    assert "DO NOT RELEASE" in capsys.readouterr().out


def test_what_computes_something_else_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = stage.write_timm

    def wrong(source: Source, folder: Path) -> Written:
        done = right(source, folder)
        assert done.runner is not None
        return replace(done, runner=lambda images, good=done.runner: good(images) + 0.01)

    monkeypatch.setattr(stage, "write_timm", wrong)
    with pytest.raises(RunFailed, match=r"differs from its source by 0\.01.*nothing was written"):
        export(copy, "timm")
    assert not (copy / "export").exists()


def test_an_engine_that_loses_too_much_is_left_out_and_where_none_is_left_nothing_is_written(
    copy: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def engine(source: Source, folder: Path, name: str) -> Written:
        (folder / name).write_bytes(b"weights")

        def upside_down(images: Tensor) -> Tensor:
            return -source.module(images)

        # of a source and its opposite one judges below 0.5
        return Written([name], source.module if name == "same" else upside_down, tolerance=None)

    settings = {"data": [str(phantoms)], "split": "test"}
    monkeypatch.setattr(stage, "write_int8", engine)
    monkeypatch.setattr(stage, "ENGINES", ("same", "opposite"))
    before = stage.Guard(read_source(copy), copy, [str(phantoms)], "test").change(read_source(copy).module).before
    worse = abs(2 * before.value - 1)
    assert worse > 0.02
    flip = -1 if before.value < 0.5 else 1
    monkeypatch.setattr(stage, "read_source", lambda *_: flipped(read_source(copy), flip))
    folder = export(copy, "int8", **settings)
    assert sorted(path.name for path in folder.iterdir()) == [README, CARD, "same"]
    assert "opposite was made and left out, as it lost more than it may: AUC" in (folder / README).read_text()
    assert "left out" in capsys.readouterr().out
    monkeypatch.setattr(stage, "ENGINES", ("opposite",))
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunFailed, match=r"opposite: AUC of mass by image fell by .* more than --margin 0\.01"):
        export(copy, "int8", **settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    export(copy, "int8", margin=1.0, **settings)
    assert (folder / "opposite").is_file()


class Times(nn.Module):
    """A network's outputs times a number."""

    def __init__(self, inside: nn.Module, by: float):
        super().__init__()
        self.inside, self.by = inside, by

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.by * self.inside(images)
        return out


def flipped(source: Source, by: float) -> Source:
    return replace(source, module=Times(source.module, by))


def test_an_export_that_fails_leaves_the_one_before(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(copy, "timm")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(*_: object) -> Written:
        raise RunFailed("no")

    monkeypatch.setattr(stage, "write_timm", fails)
    with pytest.raises(RunFailed):
        export(copy, "timm")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["timm"]


def test_the_same_export_again_gives_the_same_bytes(copy: Path) -> None:
    folder = export(copy, "timm")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    export(copy, "timm")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_folder_of_others_is_replaced(copy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    export(copy, "timm", mine)  # an empty folder is free
    content = json.loads((mine / CARD).read_text())
    (mine / CARD).write_text(json.dumps(content | {"source": {"digest": "0" * 64}}))
    with pytest.raises(UserError, match="holds the export of other weights"):
        export(copy, "timm", mine)
    (mine / CARD).unlink()
    with pytest.raises(UserError, match="no export of miram; name another folder"):
        export(copy, "timm", mine)
    assert (mine / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("tim", {}, "no such format; did you mean 'timm'"),
        ("timm", {"merge_tokens": 4}, "goes with --to onnx only"),
        ("timm", {"data": ["/nowhere"]}, "/nowhere"),
    ],
)
def test_what_does_not_go_together_is_refused(copy: Path, to: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        export(copy, to, **options)
    assert not (copy / "export").exists()
