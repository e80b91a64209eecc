"""Segmentation models without a training: what is bright is a finding, or weights at random in a sealed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miram.data.shards import ShardDataset
from miram.engine.files import write_json
from miram.engine.run import STATE
from miram.finetune.classify.cards import TrainedOn, preprocessing_of
from miram.finetune.segment.locked import SegmentCard, Segmenter, write_segmenter
from miram.finetune.segment.models import build

CLASSES = ("background", "lesion")


class Bright(nn.Module):
    """Class k from the k-th level on, for sure."""

    def __init__(self, levels: tuple[float, ...] = (0.5,)):
        super().__init__()
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        number = sum(((images[:, 0] >= level).long() for level in self.levels), torch.zeros(1, dtype=torch.long))
        return 20.0 * nn.functional.one_hot(number, len(self.levels) + 1).movedim(-1, 1).float()


def card(shards: ShardDataset | None = None, **changes: Any) -> SegmentCard:
    """Of a network without an encoder that reads images as they are stored, in tiles of 32."""
    said: dict[str, Any] = {
        "encoder": None,
        "base": None,
        "image_size": (32, 32),
        "mean": 0.0,
        "std": 1.0,
        "classes": CLASSES,
        "kind": "instances",
        "model": "unet",
        "model_options": {"channels": (4, 4, 4, 4, 4)},
        "control": None,
        "control_seed": 0,
        "method": "full",
        "options": {},
        "channels": 1,
        "mm_per_pixel": None,
        "long_side": None,
        "thresholds": (0.5,),
        "rasters": (1, 100_000),
        "smallest": 0,
        "overlap": 0.25,
        "flips": (),
        "preprocessing": () if shards is None else preprocessing_of(shards),
        "trained_on": TrainedOn(images=0, patients=0, records=(), of=()),
    }
    return SegmentCard(**(said | changes))


def bright(levels: tuple[float, ...] = (0.5,), **changes: Any) -> Segmenter:
    """A model that sees what is bright."""
    classes = ("background", *(f"class {k}" for k in range(1, len(levels) + 1))) if len(levels) > 1 else CLASSES
    thresholds = None if len(levels) > 1 else (0.5,)
    return Segmenter(
        card(**({"classes": classes, "thresholds": thresholds, "digest": "d" * 64} | changes)), Bright(levels)
    )


def seal(run: Path, data: Path, **changes: Any) -> Segmenter:
    """A narrow U-Net with random weights in RUN/model, as a finished run leaves it."""
    made = card(ShardDataset(data), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build(made.model, made.model_options, None, made.channels, len(made.classes))
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("out: here\n")
    write_json(run / "state.json", STATE, {"stage": "segment", "status": "finished", "reason": ""})
    return Segmenter(write_segmenter(run / "model", made, model), model.eval())
