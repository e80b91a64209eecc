"""What a federation's party stands on: data, labels and encoder, opened and found to fit."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from ...data.opening import open_shards
from ...engine.signals import StopSignals
from ...pretrain.weights.loading import read_encoder
from ..classify.bench import Bench
from ..classify.labels import read_labels
from ..features import check_channels
from .config import FederateConfig


def make_bench(
    settings: FederateConfig, accelerator: Accelerator, signals: StopSignals, *, complete: bool = False
) -> Bench:
    """Data, labels and encoder; `complete` data has every class, a single site's may lack some.

    Raises:
        UserError: they do not fit each other.
    """
    section, cache = settings.finetune, Path(settings.out).parent / "features"
    shards = open_shards(settings.data)
    task, kind, separator = settings.data.task, section.kind, section.separator
    labelled = read_labels(shards, task, kind, section.classes, separator, complete=complete)
    vit, said = read_encoder(section.encoder, section.image_size, shards.channels)
    check_channels(vit, shards)
    for line in said[-1:]:
        print(f"miram: encoder {section.encoder}: {line}", flush=True)
    return Bench(settings.tuning, shards, labelled, vit, accelerator, signals, cache)
