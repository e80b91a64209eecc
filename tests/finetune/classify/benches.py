"""A bench on phantoms with a tiny encoder, for tests of what is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from vits import small

from miram.data.shards import ShardDataset
from miram.engine.launch import make_accelerator
from miram.engine.signals import StopSignals
from miram.finetune.classify.bench import Bench
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.classify.labels import read_labels
from miram.pretrain.encoder import Encoder

TRAIN = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "precision": "fp32", "betas": (0.9, 0.999)}


def config(shards: Path, out: Path, train: dict[str, Any] | None = None, **finetune: Any) -> FinetuneConfig:
    """Two steps of lora on the task `mass`, unless told otherwise."""
    task = finetune.pop("task", "mass")
    tree = {
        "out": str(out),
        "data": {"shards": str(shards), "split": None, "task": task, "workers": 0, "cache_mb": 64},
        "finetune": {"encoder": "random", "replicates": 50, "explain": 0, **finetune},
        "train": TRAIN | (train or {}),
    }
    return FinetuneConfig.model_validate(tree)


def bench(shards: Path, out: Path, train: dict[str, Any] | None = None, **finetune: Any) -> Bench:
    """The bench of such a configuration."""
    settings = config(shards, out, train, **finetune)
    data, section = ShardDataset(shards), settings.finetune
    labelled = read_labels(data, settings.data.task, section.kind, section.classes)
    return Bench(settings, data, labelled, encoder(), make_accelerator(), StopSignals(), out / "features")


def encoder() -> Encoder:
    """Two blocks of width 48, with random weights."""
    vit = small(image=(64, 32))
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": (0.2,), "std": (0.2,)}
    return vit


def images(bench: Bench, split: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Labelled images of an official split."""
    return np.flatnonzero(bench.labelled.splits == split)
