"""Every objective through the stage, as a user runs it: on two ranks, killed, continued from other weights, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import on_ranks
from safetensors.torch import load_file

import miram
from miram.engine.errors import exit_code
from miram.engine.run import read_metrics
from miram.pretrain.stage import pretrain

SINGLE = os.environ | {"OMP_NUM_THREADS": "1"}
OBJECTIVES = {
    "moco": ["--objective=moco_v3", "--moco.hidden=32", "--moco.dim=8"],
    "all": [
        "--model.image_size=64",
        "--model.mask_unit=2",
        "--model.tissue_loss=0.5",
        "--model.scales.0.attention=performer",
        "--model.scales.0.options={num_features: 32, redraw_every: 3}",
        "--model.scales.1.attention=window",
        "--model.scales.1.options={window: 4}",
        "--model.scales.1.decode_fraction=0.5",
        "--model.scales.1.upsample=learned",
        "--model.scales.1.checkpointing=true",
        "--model.checkpointing=true",
    ],
    "shared": ["--model.target=upsampled", "--model.scales.1={scale: 2, tokens: shared, loss_on: all}"],
}
NAMES = pytest.mark.parametrize("name", list(OBJECTIVES))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(name: str, tiny: list[str], out: Path, *more: str) -> list[str]:
    return [*tiny, *OBJECTIVES[name], "--train.steps=6", "--train.checkpoint_every=2", f"--out={out}", *more]


@pytest.fixture(scope="module")
def calm(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An undisturbed run of six steps of each, looked at once."""
    folder = tmp_path_factory.mktemp("calm")
    for name in OBJECTIVES:
        AcceleratorState._reset_state(reset_partial_state=True)
        pretrain("pretrain/demo", arguments(name, tiny, folder / name))
    return {name: folder / name for name in OBJECTIVES}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("name", [pytest.param("moco", marks=pytest.mark.slow), "all"])
def test_a_killed_run_of_any_objective_ends_like_an_undisturbed_one(
    name: str, calm: dict[str, Path], tiny: list[str], tmp_path: Path
) -> None:
    """The slow copy of MoCo and Performer's features are part of where a run stands."""
    command = [sys.executable, "-m", "miram.pretrain", "pretrain/demo", *arguments(name, tiny, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=SINGLE)
    lines = tmp_path / "metrics.jsonl"
    while not lines.exists() or lines.read_text().count("\n") < 3:
        assert process.poll() is None, "the run ended before it could be struck"
        time.sleep(0.02)
    process.kill()
    process.wait()
    pretrain("pretrain/demo", arguments(name, tiny, tmp_path, "--train.log_every=1"))
    assert losses(tmp_path) == losses(calm[name])
    assert (tmp_path / "encoder.safetensors").read_bytes() == (calm[name] / "encoder.safetensors").read_bytes()


@NAMES
def test_two_ranks_learn_what_one_does_with_any_objective(
    name: str, calm: dict[str, Path], tiny: list[str], tmp_path: Path
) -> None:
    """Without `find_unused_parameters`, which would hide dead ones; batch norm and negatives span the ranks."""
    ended = on_ranks(2, lambda: pretrain("pretrain/demo", arguments(name, tiny, tmp_path)).finished)
    assert ended == [True, True]
    assert losses(tmp_path) == pytest.approx(losses(calm[name]), rel=2e-5)


def test_the_pictures_are_those_of_the_objective(calm: dict[str, Path]) -> None:
    for name, picture in (("moco", "views.png"), ("all", "reconstructions.png"), ("shared", "reconstructions.png")):
        assert {picture, "attention.png", "captions.json"} <= {p.name for p in (calm[name] / "figures").iterdir()}


def test_a_run_looks_and_logs_what_it_saw(tiny: list[str], calm: dict[str, Path], tmp_path: Path) -> None:
    """Looking changes nothing of what is learnt."""
    looks = ["--monitor.every=3", "--monitor.task=mass", "--monitor.images=32"]
    pretrain("pretrain/demo", arguments("all", tiny, tmp_path, *looks))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for key in ("rankme", "probe/mass", "knn/mass"):
        assert [line["step"] for line in lines if key in line] == [3, 6]
    assert (tmp_path / "encoder.safetensors").read_bytes() == (calm["all"] / "encoder.safetensors").read_bytes()


def test_training_goes_on_from_another_encoder_at_another_size(
    calm: dict[str, Path], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step at a vanishing learning rate leaves the weights of `init`, its positions interpolated."""
    more = ["--train.steps=1", "--train.blr=1e-12", f"--init={calm['moco']}", "--model.image_size=[96, 64]"]
    pretrain("pretrain/demo", arguments("shared", tiny, tmp_path, *more))
    assert "pos_embed" in capsys.readouterr().out
    before, after = (load_file(folder / "encoder.safetensors") for folder in (calm["moco"], tmp_path))
    for key in before.keys() - {"pos_embed"}:
        torch.testing.assert_close(after[key], before[key])
    assert miram.load_encoder(tmp_path).patch_embed.grid_size == (6, 4)
    assert json.loads((tmp_path / "encoder.json").read_text())["provenance"]["init"]["from"] == str(calm["moco"])


@pytest.mark.parametrize(
    ("name", "override", "named"),
    [
        ("moco", "--train.micro_batch=4", "train.micro_batch"),
        ("moco", "--init=nosuch", "nosuch"),
        ("moco", "--init={calm}", "depth"),
        ("all", "--model.scales.1.decode_fraction=0.3", "decode_fraction 0.3"),
        ("all", "--model.mask_unit=3", "mask_unit 3"),
        ("all", "--model.attention_backend=xformers", "there is no CUDA device"),
        ("shared", "--model.attention_backend=xformers", "xformers"),
        ("moco", "--model.attention_backend=xformers", "moco_v3 has no decoder"),
        ("all", "--monitor.task=nosuch", "nosuch"),
        ("moco", "--model.encoder_options={num_classes: 3}", "model.encoder_options.num_classes"),
        ("all", "--model.encoder_options={img_size: [64, 64]}", "model.image_size"),
        ("all", "--model.encoder_options={patch_size: [16, 8]}", "square patches"),
        ("all", "--model.encoder=vit_base_patch16_siglip_224", "pools by attention"),
        ("all", "--model.scales.1.options={window: 0}", "model.scales.1"),
        ("all", "--model.mask_ratio=1e-17", "model.mask_ratio"),
        ("shared", "--model.scales.1.depth=2", "leave out depth"),
        ("shared", "--model.scales.0.scale=4", "scale 1"),
        ("shared", "--model.scales.1.scale=1.5", "model.scales.1.scale"),
    ],
)
def test_what_does_not_fit_gets_one_line_and_leaves_nothing(
    name: str,
    override: str,
    named: str,
    tiny: list[str],
    calm: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available() and "xformers" in override:
        pytest.skip("xformers may run here")
    out = tmp_path / "never"
    more = [override.replace("{calm}", str(calm["all"]))]
    if named == "there is no CUDA device":
        more.append("--model.scales.0={scale: 1, depth: 1, width: 64, heads: 4}")
    if "{calm}" in override:
        more.append("--model.encoder_options={depth: 3, embed_dim: 32, num_heads: 2}")
        named = "blocks"
    assert exit_code(lambda: pretrain("pretrain/demo", arguments(name, tiny, out, *more))) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert named in said[0]
    assert not out.exists()
