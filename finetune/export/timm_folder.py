"""A folder that timm loads by itself.

OUT/model.safetensors    timm's own key names, a classifier's head among them
OUT/config.json          {"architecture", "num_classes", "label_names", "model_args": {…}, "pretrained_cfg": {…}}

timm.create_model("local-dir:OUT", pretrained=True)
"""

from __future__ import annotations

from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import timm
from timm.models import save_for_hf
from torch import Tensor

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder
from .parity import Written
from .source import Source

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_timm(source: Source, folder: Path) -> Written:
    """Write the two files.

    Raises:
        UserError: the source is no plain ViT of timm's.
    """
    vit = plain(source, "timm")
    architecture = cast(Any, vit).pretrained_cfg.get("architecture")
    if not timm.is_model(architecture or ""):
        raise UserError(f"--to timm: timm has no architecture {architecture!r}, so it could not build this one again")
    size = (source.channels, *source.image_size)
    cast(Any, vit).pretrained_cfg = {  # nothing of whoever first trained this architecture
        "architecture": architecture,
        "input_size": size,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "mean": source.mean,
        "std": source.std,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    labels = {"label_names": list(source.outputs)} if source.head is not None else {}
    save_for_hf(vit, str(folder), model_config=labels, safe_serialization=True)
    (folder / WEIGHTS).chmod(0o644)  # safetensors keeps its files to their owner; weights are to be shared
    return Written([WEIGHTS, CONFIG], Loaded(folder), usage=USAGE)


USAGE = """
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
outputs = model(images)                     # features, or a classifier's logits
tokens = model.forward_features(images)     # (batch, prefix + patches, width)
"""


class Loaded:
    """The folder as its user reads it."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        """Read once it is asked for."""
        return timm.create_model(f"local-dir:{self.folder}", pretrained=True).eval()

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> features or logits."""
        out: Tensor = self.model(images)
        return out


def plain(source: Source, form: str) -> Encoder:
    """A copy of the ViT, a classifier's head inside.

    Raises:
        UserError: there is no such ViT.
    """
    if source.vit is None:
        why = (
            "a segmentation model has a decoder that no library knows"
            if source.kind == "segmenter"
            else f"{source.method} adds what a plain ViT has no place for"
        )
        raise UserError(f"--to {form} takes a plain ViT, and {why}; use --to onnx")
    vit = deepcopy(source.vit)
    if source.head is not None:
        vit.head, vit.num_classes = deepcopy(source.head), source.head.out_features
    return vit
