"""What is exported is the run's own network, and what is no finished network is refused with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lockables import lock, write_encoder
from safetensors.torch import load_file, save_file

from miram.data.config import DataSection
from miram.data.shards import ShardDataset
from miram.engine.config import dump_yaml
from miram.engine.errors import UserError
from miram.engine.files import write_json
from miram.engine.recipe import TrainSection
from miram.engine.run import STATE
from miram.finetune.classify.config import FinetuneConfig, FinetuneSection
from miram.finetune.classify.locked import read_locked
from miram.finetune.export.licences import of_pretraining
from miram.finetune.export.source import read_source
from miram.pretrain.encoder import Encoder, load_ours


def finished(folder: Path, stage: str, status: str = "finished") -> Path:
    write_json(folder / "state.json", STATE, {"stage": stage, "status": status, "reason": ""})
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(write_encoder(tmp_path_factory.mktemp("source") / "encoder"), "pretrain")


def test_an_encoder_is_the_very_one_of_its_file(encoder: Path) -> None:
    source = read_source(encoder)
    vit, card = load_ours(str(encoder))
    images = torch.randn(3, 1, 32, 32)
    assert source.kind == "encoder"
    torch.testing.assert_close(source.module(images), vit(images), rtol=0, atol=0)
    assert (source.image_size, source.channels, source.mean, source.std) == ((32, 32), 1, card.mean, card.std)
    assert source.digest == read_source(encoder / "encoder.safetensors").digest


def test_a_distilled_encoder_is_one_too_and_its_teachers_data_counts(encoder: Path, tmp_path: Path) -> None:
    student = write_encoder(tmp_path / "student")
    card = json.loads((student / "encoder.json").read_text())
    learnt = {"data": [{"dataset": "a", "licence": "CC BY 4.0", "records": "0"}]}
    behind = {"data": [{"dataset": "b", "licence": "unknown", "records": "1"}]}
    card["provenance"] = learnt | {"objective": "dmae", "teacher": {"from": "/b", "digest": "0", "provenance": behind}}
    (student / "encoder.json").write_text(json.dumps(card))
    finished(student, "distill", "preempted")
    with pytest.raises(UserError, match=r"is not finished \(preempted\); repeat"):
        read_source(student)
    source = read_source(finished(student, "distill"))
    assert source.kind == "encoder"
    assert source.digest == read_source(encoder).digest, "the same weights, whoever taught them"
    assert [(x["dataset"], x["used_for"]) for x in source.licences] == [
        ("a", "pretraining"),
        ("b", "pretraining of its teacher"),
    ]


@pytest.mark.parametrize("method", ["linear", "full", "lora", "dora", "lora_qkv", "ssf", "vpt_deep", "adaptformer"])
def test_a_classifier_says_what_the_locked_model_says(
    method: str, phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    lock(tmp_path / "run", phantoms, encoder, method=method, input="whole")
    images = torch.randn(4, 1, 32, 32)
    wanted = read_locked(tmp_path / "run").model(images)
    source = read_source(tmp_path / "run")
    torch.testing.assert_close(source.module(images), wanted, rtol=0, atol=2e-5)
    merges = method not in ("vpt_deep", "adaptformer")
    assert isinstance(source.vit, Encoder) == merges
    if source.vit is not None and source.head is not None:  # and the parts are those of the whole
        torch.testing.assert_close(source.head(source.vit(images)), wanted, rtol=0, atol=2e-5)
    assert not source.module.training
    assert not any(tensor.requires_grad for tensor in source.module.parameters())


def test_what_is_known_of_a_classifier_goes_along(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    _, card = lock(tmp_path / "run", phantoms, encoder, input="windows", temperature=2.5)
    source = read_source(tmp_path / "run")
    assert (source.classes, source.outputs, source.task) == (("0", "1"), ("0", "1"), "mass")
    assert (source.temperature, source.thresholds) == (2.5, card.thresholds)
    assert source.trained_on == {"images": 24, "patients": 6}
    assert any("one frame" in note and "windows" in note for note in source.notes)
    assert read_source(tmp_path / "run" / "model").digest == source.digest


def test_an_ordinal_model_says_what_each_output_asks(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    lock(tmp_path / "run", phantoms, encoder, task="density", kind="ordinal", input="whole")
    source = read_source(tmp_path / "run")
    assert source.outputs == tuple(f"above {name}" for name in source.classes[:-1])
    assert source.module(torch.randn(2, 1, 32, 32)).shape == (2, len(source.outputs))


def test_licences_of_the_tuning_come_from_its_data_or_are_unknown(
    phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    lock(run, phantoms, encoder, input="whole")
    settings = FinetuneConfig(
        data=DataSection(shards=str(phantoms), task="mass"),
        finetune=FinetuneSection(encoder=str(encoder)),
        train=TrainSection(steps=1, batch_size=4),
    )
    (run / "config.yaml").write_text(dump_yaml(settings))
    licence = ShardDataset(phantoms).manifests[0]["licence"]
    tuned = {x["dataset"]: x["licence"] for x in read_source(run).licences if x["used_for"] == "tuning"}
    assert tuned == {"phantom": licence}
    (run / "config.yaml").write_text(dump_yaml(settings).replace(str(phantoms), str(tmp_path / "gone")))
    tuned = {x["dataset"]: x["licence"] for x in read_source(run).licences if x["used_for"] == "tuning"}
    assert tuned == {"phantom": "unknown"}


def test_what_a_start_or_a_teacher_learnt_from_counts_too() -> None:
    def learnt(name: str) -> dict[str, object]:
        return {"data": [{"dataset": name, "licence": f"of {name}", "records": "0"}]}

    provenance = learnt("a") | {
        "init": {"from": "/here/b", **learnt("b"), "init": {"from": "timm:vit_tiny_patch16_224"}},
        "teacher": {"from": "/here/c", "digest": "0", "provenance": learnt("c") | {"init": {"from": "random"}}},
    }
    found = of_pretraining(provenance)
    assert [(x["dataset"], x["licence"]) for x in found] == [
        ("a", "of a"),
        ("b", "of b"),
        ("that of timm:vit_tiny_patch16_224", "unknown"),
        ("c", "of c"),
    ]
    assert of_pretraining({}) == [{"dataset": "unknown", "licence": "unknown", "used_for": "pretraining"}]
    assert of_pretraining({"init": {"from": "/somebody/elses.safetensors"}})[0]["dataset"] == "unknown"


Damage = Callable[[Path], object]
ENCODERS: dict[str, tuple[Damage, str]] = {
    "gone": (shutil.rmtree, "is not there; name a finished run"),
    "unfinished": (lambda at: finished(at, "pretrain", "preempted"), r"is not finished \(preempted\); repeat"),
    "of a probe": (lambda at: finished(at, "probe"), "is a run of `miram probe`, which makes nothing to export"),
    "cut off": (
        lambda at: (at / "encoder.safetensors").write_bytes((at / "encoder.safetensors").read_bytes()[:-9]),
        "does not fit its encoder.json",
    ),
    "without weights": (lambda at: (at / "encoder.safetensors").unlink(), "there is no encoder at"),
}


@pytest.mark.parametrize("what", ENCODERS)
def test_no_encoder_is_refused_by_name(what: str, encoder: Path, tmp_path: Path) -> None:
    damage, said = ENCODERS[what]
    copy = tmp_path / "copy"
    shutil.copytree(encoder, copy)
    damage(copy)
    with pytest.raises(UserError, match=said):
        read_source(copy)


def test_a_file_of_an_unfinished_run_is_no_more_finished_than_the_run(encoder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(encoder, tmp_path / "copy"))
    finished(copy, "pretrain", "running")
    for named in (copy, copy / "encoder.safetensors"):
        with pytest.raises(UserError, match=r"is not finished \(running\); repeat"):
            read_source(named)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": "miram.other/1"}', f'{{"schema": "{STATE}"}}'])
def test_a_damaged_state_is_refused_and_not_taken_for_none(text: str, encoder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(encoder, tmp_path / "copy"))
    (copy / "state.json").write_text(text)
    for named in (copy, copy / "encoder.safetensors"):
        with pytest.raises(UserError, match=r"state\.json"):
            read_source(named)


def test_weights_that_are_not_finite_are_refused(encoder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(encoder, tmp_path / "copy"))
    state = load_file(copy / "encoder.safetensors")
    state["norm.bias"][3] = float("nan")
    save_file(state, copy / "encoder.safetensors")
    with pytest.raises(UserError, match="not finite everywhere"):
        read_source(copy)


def test_an_encoder_needs_no_other(encoder: Path) -> None:
    with pytest.raises(UserError, match="stands on none; leave it out"):
        read_source(encoder, str(encoder))


def test_tiles_are_no_single_network(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    lock(tmp_path / "run", phantoms, encoder, input="tiles")
    with pytest.raises(UserError, match=r"reads an image as tiles .* is not exported"):
        read_source(tmp_path / "run")


def test_a_damaged_model_and_a_moved_encoder_are_refused(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    run = tmp_path / "run"
    lock(run, phantoms, home, input="whole")
    home.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="say with --encoder where it lies now"):
        read_source(run)
    assert read_source(run, str(tmp_path / "moved")).kind == "classifier"
    card = json.loads((run / "model" / "model.json").read_text())
    (run / "model" / "model.json").write_text(json.dumps(card | {"temperature": 3.0}))
    with pytest.raises(UserError, match="damaged or was edited"):
        read_source(run, str(tmp_path / "moved"))
    finished(run, "finetune", "failed")
    with pytest.raises(UserError, match="not finished"):
        read_source(run, str(tmp_path / "moved"))


def test_a_federation_leaves_a_classifier(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    lock(tmp_path / "run", phantoms, encoder, input="whole")
    plain = read_source(tmp_path / "run")
    finished(tmp_path / "run", "federate")
    assert read_source(tmp_path / "run").digest == plain.digest
    finished(tmp_path / "run", "federate", "running")
    with pytest.raises(UserError, match="not finished"):
        read_source(tmp_path / "run")
