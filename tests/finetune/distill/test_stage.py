"""Distillation as a user runs it: both kinds, killed, on two ranks, with another teacher, and fed nonsense."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from ranks import on_ranks
from safetensors.torch import load_file

import miram
from miram.engine.config import load
from miram.engine.errors import UserError, exit_code
from miram.engine.loop import Trainer
from miram.engine.objective import Objective
from miram.engine.run import read_metrics
from miram.finetune.distill import __main__ as command
from miram.finetune.distill.config import DistillConfig
from miram.finetune.distill.dmae import Dmae
from miram.finetune.distill.stage import Distillation, distill
from miram.pretrain.encoder import build_encoder, card_for, save_encoder

KINDS = pytest.mark.parametrize("kind", ["dmae", "relations"])


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def make_teacher(folder: Path, depth: int = 4) -> Path:
    card = card_for("vit_tiny_patch16_224", (64, 64), {"depth": depth, "embed_dim": 48, "num_heads": 3})
    folder.mkdir(exist_ok=True)
    save_encoder(folder, build_encoder(card), card)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def arguments(tiny: list[str], teacher: Path) -> Callable[..., list[str]]:
    def build(kind: str, out: Path, *more: str) -> list[str]:
        mine = [f"--distill.kind={kind}", f"--distill.teacher={teacher}", f"--out={out}"]
        return [*tiny, *mine, "--train.steps=6", "--train.checkpoint_every=2", *more]

    return build


@pytest.fixture(scope="module")
def calm(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An undisturbed run of six steps of each kind."""
    folder = tmp_path_factory.mktemp("calm")
    for kind in ("dmae", "relations"):
        AcceleratorState._reset_state(reset_partial_state=True)
        distill("distill/demo", arguments(kind, folder / kind))
    return {kind: folder / kind for kind in ("dmae", "relations")}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("kind", "names", "pictures"),
    [
        ("dmae", ["loss/1", "loss/2", "loss/tokens"], {"attention.png", "reconstructions.png"}),
        ("relations", ["loss/qk", "loss/vv"], {"attention.png"}),
    ],
)
def test_a_run_leaves_an_encoder_that_says_whose_pupil_it_is(
    kind: str, names: list[str], pictures: set[str], calm: dict[str, Path], teacher: Path
) -> None:
    run = calm[kind]
    assert json.loads((run / "state.json").read_text()) == {
        "schema": "miram.state/1",
        "stage": "distill",
        "status": "finished",
        "reason": "",
    }
    assert [key for key in read_metrics(run / "metrics.jsonl")[0] if key.startswith("loss/")] == names
    assert {path.name for path in (run / "figures").glob("*.png")} == pictures
    assert (miram.load_encoder(run).embed_dim, len(miram.load_encoder(run).blocks)) == (32, 2)
    told = json.loads((run / "encoder.json").read_text())["provenance"]
    assert told["objective"] == kind
    assert told["data"][0]["dataset"] == "phantom"
    assert told["teacher"] == {"from": str(teacher), "digest": sha256(teacher / "encoder.safetensors")}


@KINDS
def test_a_checkpoint_holds_the_student_and_no_teacher(kind: str, calm: dict[str, Path]) -> None:
    held = load_file(calm[kind] / "checkpoints" / "step-00000006" / "model.safetensors")
    assert not any("teacher" in name for name in held)
    assert {x.shape[-1] for name, x in held.items() if name.endswith("norm1.weight")} == (
        {32, 16} if kind == "dmae" else {32}  # widths of student and decoders; the teacher's is 48
    )


@KINDS
def test_a_killed_run_ends_like_an_undisturbed_one(
    kind: str, calm: dict[str, Path], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    def struck() -> None:
        learn = Trainer.learn

        def strike(trainer: Trainer, batches: Any) -> None:
            learn(trainer, batches)
            if trainer.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Trainer.learn = strike  # type: ignore[method-assign]
        distill("distill/demo", arguments(kind, tmp_path))

    assert on_ranks(1, struck) == [None]
    assert len(losses(tmp_path)) == 4
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == "step-00000004"
    distill("distill/demo", arguments(kind, tmp_path))
    assert losses(tmp_path) == losses(calm[kind])
    assert sha256(tmp_path / "encoder.safetensors") == sha256(calm[kind] / "encoder.safetensors")


@pytest.mark.parametrize("kind", ["dmae", pytest.param("relations", marks=pytest.mark.slow)])
def test_two_ranks_learn_what_one_does(
    kind: str, calm: dict[str, Path], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Without `find_unused_parameters`, which would hide dead ones; micro-batches too."""
    ended = on_ranks(2, lambda: distill("distill/demo", arguments(kind, tmp_path, "--train.micro_batch=2")).finished)
    assert ended == [True, True]
    assert losses(tmp_path) == pytest.approx(losses(calm[kind]), rel=2e-5)


@pytest.mark.slow
def test_a_run_that_averages_its_weights_shares_one_teacher(
    calm: dict[str, Path], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    distill("distill/demo", arguments("dmae", tmp_path, "--train.ema=0.5"))
    assert losses(tmp_path) == losses(calm["dmae"])
    assert sha256(tmp_path / "encoder.safetensors") != sha256(calm["dmae"] / "encoder.safetensors")


def built(arguments: list[str]) -> Objective:
    """What learns by a command line."""
    settings = load(DistillConfig, "distill/demo", arguments)
    card = card_for(settings.model.encoder, settings.model.size, settings.model.encoder_options)
    return Distillation(settings).build(card)[0]


@pytest.mark.parametrize(
    ("depth", "student_depth", "blocks"),
    [("0.5", "0.25", (2, 2)), ("0.25", "1.0", (1, 8)), ("0.5", "null", (2, 4)), ("1.0", "null", (4, 8))],
)
def test_the_student_is_read_at_its_own_depth_or_at_the_teacher_s(
    depth: str, student_depth: str, blocks: tuple[int, int], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    depths = [f"--distill.depth={depth}", f"--distill.student_depth={student_depth}"]
    deep = "--model.encoder_options={depth: 8, embed_dim: 32, num_heads: 2}"
    objective = built(arguments("dmae", tmp_path, deep, *depths))
    assert isinstance(objective, Dmae)
    assert (objective.teacher.block, objective.block) == blocks


@pytest.mark.parametrize(("kind", "weights"), [("dmae", (1.0, 1.0, 2.5)), ("relations", (2.5, 2.5))])
def test_the_teacher_s_losses_have_the_weight_that_was_asked_for(
    kind: str, weights: tuple[float, ...], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    objective = built(arguments(kind, tmp_path, "--distill.weight=2.5"))
    assert objective.loss_weights == weights


def test_another_teacher_in_the_same_place_is_refused(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    place = make_teacher(tmp_path / "teacher")
    mine = arguments("relations", tmp_path / "run", f"--distill.teacher={place}")
    distill("distill/demo", mine)
    make_teacher(place, depth=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="teacher"):
        distill("distill/demo", mine)


def test_a_rehearsal_leaves_nothing(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill("distill/demo", arguments("dmae", tmp_path / "never"), dry_run=True)
    said = capsys.readouterr().out
    assert "read after block 3 of 4" in said
    assert "rehearsed step 1 of 6: loss" in said
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--objective=moco_v3", "--objective: should be 'miram'"),
        ("--distill.teacher=nosuch", "distill.teacher: there is no encoder at nosuch"),
        ("--distill.kind=tokens", "--distill.kind: should be 'dmae' or 'relations'"),
        ("--distill.relation_heads=4", "relation_heads is of kind relations"),
        ("--distill.depth=0", "--distill.depth"),
        ("--moco={dim: 8}", "pair and moco belong to moco_v3"),
        ("--model.image_size=40", "model.image_size [40, 40]"),
        ("--model.encoder_options={patch_size: 8, depth: 2, embed_dim: 32, num_heads: 2}", "into 2 x 2 patches"),
    ],
)
def test_what_does_not_fit_gets_one_line_and_leaves_nothing(
    override: str, named: str, arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never"
    assert exit_code(lambda: distill("distill/demo", arguments("dmae", out, override))) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert named in said[0]
    assert not out.exists()


def test_a_configuration_with_a_finetune_section_is_a_fine_tuning_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(command, "start_tuning", lambda *given: started.append(("tuning", *given)))
    monkeypatch.setattr(command, "start_stage", lambda *given: started.append(("encoder", *given[:2])))
    logits = tmp_path / "logits.yaml"
    logits.write_text("finetune: {encoder: random}")
    with pytest.raises(UserError, match=r"finetune\.teacher is not set"):
        command.start("miram distill", [str(logits), "--seed=1"])
    named = [str(logits), "--finetune.teacher.run=RUN"]
    command.start("miram distill", named)
    logits.write_text("finetune: {encoder: random, teacher: {run: RUN}}")
    command.start("miram distill", [str(logits), "--seed=1"])
    command.start("miram distill", ["distill/demo"])
    command.start("miram distill", ["--help"])
    assert started == [
        ("tuning", "miram distill", named),
        ("tuning", "miram distill", [str(logits), "--seed=1"]),
        ("encoder", "miram distill", ["distill/demo"]),
        ("encoder", "miram distill", ["--help"]),
    ]
    assert exit_code(lambda: command.start("miram distill", ["distill/dmeo"])) == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("finetune: 3", "finetune"),
        ("finetune: [1]", "finetune"),
        ("finetune: {teacher: null}", r"finetune\.teacher is not set"),
        ("finetune: {}", r"finetune\.teacher is not set"),
    ],
)
def test_a_finetune_section_that_is_none_or_has_no_teacher_is_refused_by_name(
    text: str, named: str, tmp_path: Path
) -> None:
    config = tmp_path / "odd.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=named):
        command.start("miram distill", [str(config)])
