"""Locked models without a training: small encoders of random weights, and the runs that they would come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from miram.data.shards import ShardDataset
from miram.engine.files import write_json
from miram.engine.run import STATE
from miram.finetune.classify.cards import ModelCard, card_for
from miram.finetune.classify.config import FinetuneSection, TilesSection
from miram.finetune.classify.labels import Labelled, read_labels
from miram.finetune.classify.locked import Locked, read_model, write_locked
from miram.finetune.classify.mil import GatedAttention, MilModel
from miram.finetune.peft import apply
from miram.finetune.peft.base import learnt
from miram.finetune.peft.registry import describe
from miram.pretrain.encoder import EncoderCard, build_encoder, normalisation, save_encoder
from miram.pretrain.encoder import card_for as encoder_card
from miram.pretrain.weights.loading import load_encoder

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def write_encoder(folder: Path, seed: int = 0, channels: int = 1) -> Path:
    """An encoder of ours for 32 x 32 pixels, as pretraining writes it."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    card = encoder_card("vit_tiny_patch16_224", (32, 32), {**SMALL, "patch_size": 8, "in_chans": channels})
    card = EncoderCard(
        architecture=card.architecture, kwargs=card.kwargs, mean=(0.2,) * channels, std=(0.3,) * channels
    )
    save_encoder(folder, build_encoder(card), card)
    return folder


def lock(
    run: Path,
    data: Path,
    encoder: Path,
    *,
    task: str = "mass",
    split: str | None = "train",
    temperature: float = 1.7,
    thresholds: dict[str, tuple[float, ...]] | None = None,
    status: str = "finished",
    **settings: Any,
) -> tuple[Locked, ModelCard]:
    """A model in RUN/model, with a head that is not shy, as a finished run of the stage would leave it."""
    section = FinetuneSection(encoder=str(encoder), method=settings.pop("method", "lora"), **settings)
    shards = ShardDataset(data, split)
    labelled = read_labels(shards, task, section.kind, section.classes, section.separator)
    vit = load_encoder(encoder)
    base, normalise = describe(vit), normalisation(vit)
    model = tiles_model(section.tiles, labelled) if section.input == "tiles" else tuned_model(vit, section, labelled)
    levels = thresholds or dict.fromkeys(("image", "breast", "patient"), defaults(labelled))
    fit = np.arange(len(labelled.rows))
    card = card_for(section, labelled, fit, shards, base, normalise, temperature, levels)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("out: here\n")
    write_json(run / "state.json", STATE, {"stage": "finetune", "status": status, "reason": ""})
    card = write_locked(run / "model", card, model)
    return Locked(card, model, vit), card


def defaults(labelled: Labelled) -> tuple[float, ...]:
    return {"binary": (0.5,), "multilabel": (0.5,) * len(labelled.target.classes)}.get(labelled.target.kind, ())


def tuned_model(vit: Any, section: FinetuneSection, labelled: Labelled) -> Any:
    torch.manual_seed(1)
    tuned = apply(vit, section.method, **section.options)
    tuned.set_head(labelled.target.width)
    with torch.no_grad():
        for _, tensor in learnt(tuned.model):
            tensor += 0.05 * torch.randn_like(tensor)
        tuned.head.weight.normal_(std=1.0)
    return tuned.eval()


def tiles_model(section: TilesSection, labelled: Labelled) -> MilModel:
    torch.manual_seed(2)
    net = GatedAttention(SMALL["embed_dim"], 8, labelled.target.width)
    torch.nn.init.normal_(net.head.weight)
    torch.nn.init.normal_(net.score.weight, std=3)
    return MilModel(net.eval(), section.bag)


__all__ = ["lock", "read_model", "write_encoder"]
