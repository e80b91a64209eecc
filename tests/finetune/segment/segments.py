"""A segment run on phantoms with a tiny encoder, for tests of what it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vits import small

from miram.engine.config import dump_yaml
from miram.engine.run import Run
from miram.finetune.segment.config import SegmentConfig
from miram.finetune.segment.stage import segment
from miram.pretrain.encoder import card_for, save_encoder

TRAIN = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "precision": "fp32", "blr": 3.2e-2, "betas": [0.9, 0.999]}


def encoder_at(folder: Path) -> Path:
    """A file of an encoder of two blocks of width 48 that reads 64 x 32, with random weights."""
    folder.mkdir(parents=True)
    vit = small(image=(64, 32))
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": (0.2,), "std": (0.2,)}
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    save_encoder(folder, vit, card_for("vit_tiny_patch16_224", (64, 32), options))
    return folder / "encoder.safetensors"


def config(shards: Path, out: Path, encoder: Path | None, **changes: Any) -> SegmentConfig:
    """Four steps of a narrow light decoder on a frozen encoder, unless told otherwise."""
    tree: dict[str, Any] = {
        "out": str(out),
        "data": {"shards": str(shards), "split": None, "workers": 0, "cache_mb": 64, **changes.pop("data", {})},
        "train": {**TRAIN, **changes.pop("train", {})},
        **{name: changes.pop(name) for name in ("sweep", "seed") if name in changes},
    }
    tree["segment"] = {
        "encoder": None if encoder is None else str(encoder),
        "method": "frozen",
        "model_options": {"width": 16},
        "replicates": 40,
        "overlap": 0.25,
        **changes,
    }
    return SegmentConfig.model_validate_json(json.dumps(tree), strict=True)


def run(shards: Path, out: Path, encoder: Path | None, **changes: Any) -> Run:
    """`miram segment` with such a configuration; `sweeps` as --sweep."""
    sweeps = changes.pop("sweeps", False)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(dump_yaml(config(shards, out, encoder, **changes)))
    return segment(str(path), sweeps=sweeps)


def result(run_: Run) -> Mapping[str, Any]:
    """Its result.json."""
    return dict(json.loads((run_.folder / "result.json").read_text()))
