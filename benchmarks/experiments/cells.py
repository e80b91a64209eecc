"""The cells of the experiment: what each arm trains, what a step of it costs, and one cell run to its end.

OUT/pretrain OUT/judge      data sets of different patients
OUT/cost.json               CPU seconds a step of every arm
OUT/cells/ARM-BUDGET-SEED/  config.yaml, run/ (a run folder of miram), judged.json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from miram.benchmarks.experiments.judging import judge_encoder
from miram.benchmarks.experiments.lesions import LesionSettings, make_lesions
from miram.data.shards import ShardDataset
from miram.engine.files import read_json, write_json
from miram.engine.loop import Trainer
from miram.pretrain.stage import pretrain
from miram.pretrain.weights.loading import load_encoder, random_like

COST = "miram.experiment.cost/1"
PRETRAIN_SEED, JUDGE_SEED, CALIBRATE_SEED = 40_001, 40_002, 40_003
SAME = 0.05  # arms that cost the reference's time within this much share its cell of equal steps
CALIBRATION, WARM, ROUNDS = 12, 4, 3  # steps of a measurement, of them not counted, and how often


@dataclass(frozen=True, kw_only=True)
class Form:
    """The size of the experiment."""

    steps: int
    batch: int
    pretrain_patients: int
    judge_patients: int
    encoder: dict[str, Any]
    decoder: dict[str, Any]
    patch: int = 8
    image: int = 32
    workers: int = 0
    lesions: LesionSettings
    lr: float
    moco_lr: float
    precision: str = "fp32"


SMALL = Form(
    steps=600,
    batch=32,
    pretrain_patients=200,
    judge_patients=200,
    encoder={"depth": 4, "embed_dim": 128, "num_heads": 4},
    decoder={"depth": 1, "width": 64, "heads": 4},
    lesions=LesionSettings(seed=0),
    lr=1e-3,
    moco_lr=3e-4,
)
TINY = replace(SMALL, steps=6, batch=16, pretrain_patients=8, judge_patients=24)
LARGE = Form(
    steps=20_000,
    batch=256,
    pretrain_patients=3000,
    judge_patients=1000,
    encoder={"depth": 12, "embed_dim": 384, "num_heads": 6},
    decoder={"depth": 4, "width": 256, "heads": 8},
    image=64,
    workers=12,
    lesions=LesionSettings(seed=0, film=2400, side=192),
    lr=6e-4,
    moco_lr=3e-4,
    precision="bf16",
)


def model_of(arm: str, form: Form) -> dict[str, Any]:
    """The `model` section (and, for MoCo, the objective's) of an arm."""
    first = {"scale": 1, "attention": "softmax", "loss_on": "masked", **form.decoder}
    second = {"scale": 2, "attention": "softmax", "loss_on": "all", **form.decoder}
    shared = {"scale": 2, "tokens": "shared", "loss_on": "all"}
    scales = {"miram": [first, second], "upsampled": [first, second], "shared": [first, shared]}
    scales["masked"] = [first, second | {"loss_on": "masked"}]
    return {
        "encoder": "vit_tiny_patch16_224",
        "encoder_options": {**form.encoder, "patch_size": form.patch},
        "image_size": form.image,
        "scales": scales.get(arm, [first]),
        "target": "upsampled" if arm == "upsampled" else "source",
    }


ARMS = ("miram", "mae", "upsampled", "shared", "moco", "random")
OPTIONAL = ("masked",)
REFERENCE = "mae"  # whose time at equal steps is everybody's equal time
# Milder than the product's, which stayed at chance in a pilot of this size. With these the loss on held-out pairs fell
# from 2.77 (chance at batch 32) to 1.63 in 200 steps.
PAIR: dict[str, Any] = {"rotation": 0, "gamma": 0.1, "contrast": 0.1, "brightness": 0.1, "blur": [0.0, 0.0]}


def config(arm: str, seed: int, steps: int, form: Form, out: Path, run: Path) -> dict[str, Any]:
    """The configuration of one pretraining."""
    tree: dict[str, Any] = {
        "out": str(run),
        "seed": seed,
        "data": {"shards": str(out / "pretrain"), "split": None, "workers": form.workers, "cache_mb": 1024},
        "crop": {"area": [0.64, 1.0], "aspect": [1.0, 1.0]},
        "model": model_of(arm, form),
        "train": {
            "steps": steps,
            "batch_size": form.batch,
            "blr": (form.moco_lr if arm == "moco" else form.lr) * 256 / form.batch,
            "warmup_steps": steps // 20,
            "precision": form.precision,
            "log_every": 50,
            "checkpoint_every": 250,
            "keep_checkpoints": 1,
        },
    }
    if arm == "moco":
        tree |= {"objective": "moco_v3", "moco": {"dim": 128, "hidden": 512}, "pair": PAIR}
    return tree


def make_data(form: Form, out: Path, workers: int) -> None:
    """The data sets, unless they are there."""
    for name, seed, patients in (
        ("pretrain", PRETRAIN_SEED, form.pretrain_patients),
        ("judge", JUDGE_SEED, form.judge_patients),
        ("calibrate", CALIBRATE_SEED, -(-form.batch // 8)),
    ):
        make_lesions(out / name, patients, replace(form.lesions, seed=seed), workers)


def run_cell(arm: str, seed: int, budget: str, form: Form, out: Path) -> None:
    """Pretrain (or go on with it) and judge; a finished cell is left alone."""
    folder = cell_folder(out, arm, budget, seed)
    if (folder / "judged.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards = ShardDataset(out / "judge", None)
    if arm == "random":
        encoder = random_like(str(_untrained(out, form)), seed)
    else:
        steps = steps_of(arm, budget, form, out)
        run = trained(config(arm, seed, steps, form, out, folder / "run"), folder / "config.yaml")
        encoder = load_encoder(run)
    judge_encoder(encoder, shards, folder / "judged.json")


def trained(tree: dict[str, Any], path: Path) -> Path:
    """Write the configuration, run it through the product's own stage, and return the run folder."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return pretrain(str(path)).folder


def _untrained(out: Path, form: Form) -> Path:
    """A run of one step: random weights take its architecture and its data's statistics."""
    folder = out / "cells" / "one-step"
    folder.mkdir(parents=True, exist_ok=True)
    return trained(config("mae", 0, 1, form, out, folder / "run"), folder / "config.yaml")


def cell_folder(out: Path, arm: str, budget: str, seed: int) -> Path:
    """Where a cell lies."""
    return out / "cells" / f"{arm}-{budget}-{seed}"


def steps_of(arm: str, budget: str, form: Form, out: Path) -> int:
    """Steps of a cell: the same for all, or as many as fit into the reference's time."""
    if budget == "steps":
        return form.steps
    cost = read_json(out / "cost.json", COST)["seconds"]
    return round(form.steps * cost[REFERENCE] / cost[arm])


def shares_cell(arm: str, cost: dict[str, float]) -> bool:
    """Whether an arm's equal time is its equal number of steps."""
    return arm == "random" or abs(cost[REFERENCE] / cost[arm] - 1) < SAME


def measure_costs(arms: Sequence[str], form: Form, out: Path) -> dict[str, float]:
    """Seconds a step of every arm, reading included: processor time of this process, or wall time where a GPU works.

    Arms take turns in one process, and each keeps its cheapest round: others on the machine disturb all alike.
    """
    path = out / "cost.json"
    if path.exists():
        seconds: dict[str, float] = read_json(path, COST)["seconds"]
        if set(arms) - {"random"} <= set(seconds):
            return seconds
    rounds: dict[str, list[float]] = {arm: [] for arm in arms if arm != "random"}
    for _ in range(ROUNDS):
        for arm, found in rounds.items():
            found.append(_seconds_a_step(arm, form, out))
    seconds = {arm: min(found) for arm, found in rounds.items()}
    write_json(path, COST, {"seconds": seconds, "rounds": rounds, "clock": "wall" if _on_gpu() else "process"})
    return seconds


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _clock() -> float:
    if _on_gpu():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _seconds_a_step(arm: str, form: Form, out: Path) -> float:
    stamps: list[float] = []
    learn = Trainer.learn

    def timed(trainer: Trainer, batches: list[Any]) -> Any:
        result = learn(trainer, batches)
        stamps.append(_clock())
        return result

    with tempfile.TemporaryDirectory(dir=out) as place, mock.patch.object(Trainer, "learn", timed):
        folder = Path(place)
        tree = config(arm, 0, CALIBRATION, form, out, folder / "run")
        tree["data"]["shards"] = str(out / "calibrate")
        trained(tree, folder / "config.yaml")
    return statistics.median(b - a for a, b in zip(stamps[WARM:], stamps[WARM + 1 :], strict=False))
