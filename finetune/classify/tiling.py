"""Attention over the tiles of a frozen encoder, as an approach to classification."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...engine.metrics import Floats, Ints
from . import mil
from .bench import Bench
from .mil import MilModel
from .tiles import TileFeatures, tile_features
from .tuning import rates


@dataclass
class Tiling:
    """Gated attention on features that are computed once."""

    bench: Bench
    knob = "learning rate"

    @property
    def values(self) -> tuple[float, ...]:
        """Those asked for, or so many of the attention's own range."""
        return rates(self.bench, mil.RATES)

    @cached_property
    def features(self) -> TileFeatures:
        """Of all images of the data set."""
        bench, section = self.bench, self.bench.section
        vit, name = deepcopy(bench.encoder), section.encoder
        return tile_features(vit, bench.shards, section.tiles, section.batch_size, bench.cache, name)

    def make(self, images: Ints, value: float, place: Path, seed: int, held: Ints | None = None) -> MilModel:
        """Train the attention."""
        return mil.fit(self.features, self.bench.labelled, images, self.bench.section, value, seed)

    def logits(self, model: MilModel, images: Ints) -> Floats:
        """(j, w) of labelled images."""
        return mil.logits(model, self.features, self.bench.labelled, images)

    def cost(self, model: MilModel) -> Mapping[str, Any]:
        """All of it learns but what standardises features."""
        learns = sum(tensor.numel() for tensor in model.net.parameters())
        head = sum(tensor.numel() for tensor in model.net.head.parameters())
        written = sum(tensor.numel() * tensor.element_size() for tensor in model.net.state_dict().values())
        return {"trainable": learns - head, "head": head, "adapter_bytes": written}
