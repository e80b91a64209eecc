"""A segmentation model as it goes out: it reads any image as it read those of its test, and nothing in it may change.

RUN/model/model.json            {"schema", "classes", "kind", "model", "model_options", "control", "control_seed",
                                "encoder": as it was named or null, "base": {"architecture", …, "digest"} or null,
                                "method", "options", "channels", "image_size", "mm_per_pixel", "long_side", "mean",
                                "std", "thresholds", "smallest", "rasters", "overlap", "flips", "preprocessing": […],
                                "trained_on": {…}, "files": {NAME: sha256}, "digest"}
RUN/model/adapter/              what learnt of the encoder (finetune/peft/files.py)
RUN/model/network.safetensors   the decoder; of a network without an encoder, all of it

The folder appears whole or not at all. `digest` is sha256 over all else in model.json, which holds those of the files:
it names the model. The encoder itself is not in the folder.
Legend: K classes, H W of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...data.crops import Resolution
from ...data.record import MaskKind
from ...data.shards import Sample
from ...data.views import Normalisation
from ...engine.errors import UserError
from ...engine.launch import device
from ...engine.tensors import read_into
from ...pretrain.encoder import Encoder
from ...pretrain.weights.loading import random_like
from ..classify.cards import TrainedOn
from ..peft.base import write_all
from ..peft.files import load, save
from ..sealed import (
    CARD,
    SEGMENTER,
    SealedCard,
    asking,
    read_base,
    read_card,
    refuse_unfinished,
    refuse_without,
    seal,
    whole_folder,
)
from .decoders import EncoderDecoder
from .inference import Reading, masked, probabilities
from .models import build
from .taps import trimmed

ADAPTER, NETWORK = "adapter", "network.safetensors"


class SegmentCard(SealedCard):
    """model.json."""

    classes: tuple[str, ...]
    kind: MaskKind
    model: str
    model_options: dict[str, Any]
    control: Literal["untrained", "zeroed"] | None
    control_seed: int
    method: str | None
    options: dict[str, Any]
    channels: int
    mm_per_pixel: float | None
    long_side: int | None
    thresholds: tuple[float, ...] | None
    smallest: int
    rasters: tuple[int, int]
    """least and largest longer side, in the model's pixels, of the images that it learnt from"""
    overlap: float
    flips: tuple[tuple[int, ...], ...]
    preprocessing: tuple[dict[str, Any], ...]
    trained_on: TrainedOn

    @property
    def measured(self) -> bool:
        """Whether a film must say its spacing."""
        return self.mm_per_pixel is not None

    def reading(self, batch_size: int = 8) -> Reading:
        """How an image is read."""
        resolution, normalise = Resolution(self.mm_per_pixel, self.long_side), Normalisation(self.mean, self.std)
        return Reading(self.image_size, resolution, normalise, self.overlap, self.flips, batch_size)


@dataclass(frozen=True)
class Segmenter:
    """A model with everything that turns an image into a mask."""

    card: SegmentCard
    model: nn.Module
    batch_size: int = 8

    @property
    def digest(self) -> str:
        """64 hex digits that name the model."""
        return self.card.digest or self.card.own_digest()

    def probabilities(self, sample: Sample) -> NDArray[np.float32]:
        """(K, H, W) of a sample, in its stored geometry.

        Raises:
            UserError: the sample has other channels, or not the resolution that the model reads.
        """
        found = 1 if sample.pixels.ndim == 2 else sample.pixels.shape[2]
        if found != self.card.channels:
            raise UserError(
                f"sample {sample.key} has {found} channels, and the model takes {self.card.channels}; ingest it again "
                f"with --channels {self.card.channels}"
            )
        return probabilities(self.model, sample, self.card.reading(self.batch_size), device())

    def mask(self, said: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(H, W) class numbers of (K, H, W) probabilities."""
        return masked(said, self.card.thresholds, self.card.smallest)


# ---------------------------------------------------------------------------------------------- writing


def write_segmenter(folder: Path, card: SegmentCard, model: nn.Module) -> SegmentCard:
    """Write a model; one that is there, of an earlier start of the same run, goes.

    Returns:
        The card with its digest.
    """
    with whole_folder(folder) as part:
        if isinstance(model, EncoderDecoder):
            save(model.taps.tuned, part / ADAPTER)
        write_all(part / NETWORK, own_state(model))
        return seal(part, SEGMENTER, card)


def own_state(model: nn.Module) -> Mapping[str, Tensor]:
    """What a file holds beside the encoder's adapter."""
    return {name: tensor.detach().cpu() for name, tensor in own_part(model).state_dict().items()}


def own_part(model: nn.Module) -> nn.Module:
    """The decoder, or all of a network without an encoder."""
    return model.decoder if isinstance(model, EncoderDecoder) else model


# ---------------------------------------------------------------------------------------------- reading


def read_segmenter(run: str | Path, encoder: str | None = None, batch_size: int = 8) -> Segmenter:
    """The model of a finished run.

    Args:
        run: the run's folder, or a folder of a model that was copied from one.
        encoder: where the encoder now lies, if no longer where the run found it.
        batch_size: tiles judged at once.

    Raises:
        UserError: there is no finished run of `miram segment`, the model is damaged, or the encoder is not there or is
            another one.
    """
    folder = Path(run)
    if not (folder / CARD).is_file():
        refuse_unfinished(folder, "segment")
        folder /= "model"
    card = read_card(folder, SEGMENTER, SegmentCard)
    refuse_without(folder, card, NETWORK)
    tuned = None
    with torch.random.fork_rng():
        if card.base is not None:
            read = untrained if card.control == "untrained" else read_base
            tuned = load(folder / ADAPTER, trimmed(read(folder, card, encoder), card.model_options.get("layers")))
        model = build(card.model, card.model_options, tuned, card.channels, len(card.classes), card.control == "zeroed")
    read_into(folder / NETWORK, own_part(model).state_dict().items())
    return Segmenter(card, model.requires_grad_(False).eval().to(device()), batch_size)


def untrained(folder: Path, card: SegmentCard, encoder: str | None) -> Encoder:
    """The encoder that a control stood on: its shape is of the one that is named, its weights follow from a seed."""
    with asking(folder, card, encoder) as source:
        return random_like(source, card.control_seed, card.image_size, card.channels)
