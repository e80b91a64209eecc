"""What a locked model says of itself: model.json (its layout: locked.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ...data.shards import ShardDataset
from ...data.views import Normalisation
from ...engine.config import Section
from ...engine.metrics import Ints, Kind
from ..peft.files import Base
from ..sealed import SealedCard
from .config import FinetuneSection, Input, Level, ReadoutSection, TilesSection
from .labels import Labelled
from .targets import Target

PIXELS = {"breast": None, "spacing_mm": None, "max_size": None, "level": "image", "margin": 0.0}  # where not said
DICOM_PIXELS = {"voi": "auto", "voi_index": 0}


class Taught(Protocol):
    """What the card of any model says of the images that it learnt from, and so takes."""

    @property
    def preprocessing(self) -> tuple[dict[str, Any], ...]:
        """How films became images, of every data set that differed."""

    @property
    def channels(self) -> int:
        """Of an image."""

    @property
    def measured(self) -> bool:
        """Whether an image must say its spacing."""


class TargetCard(Section):
    """What is predicted, and how labels became classes."""

    name: str
    kind: Kind
    classes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]] | None = None
    separator: str = "|"

    @property
    def target(self) -> Target:
        """The same as losses and probabilities want it."""
        return Target(self.name, self.kind, self.classes)


class TrainedOn(Section):
    """Whose images it learnt from, by hashes that only the holder of the data's key could turn into somebody."""

    images: int
    patients: int
    records: tuple[tuple[str, str], ...]
    """(name, digest) of the data sets"""
    of: tuple[str, ...]
    """the patients"""


class ModelCard(SealedCard):
    """model.json."""

    target: TargetCard
    encoder: str
    base: Base
    method: str
    options: dict[str, Any]
    input: Input
    tiles: TilesSection
    temperature: float
    thresholds: dict[Level, tuple[float, ...]]
    readout: ReadoutSection
    headline: Level
    operating_point: str
    operating_at: float
    preprocessing: tuple[dict[str, Any], ...]
    trained_on: TrainedOn

    @property
    def normalise(self) -> Normalisation:
        """Of pixels, as it was in training, whatever the encoder's own file says today."""
        return Normalisation(self.mean, self.std)

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.base.channels

    @property
    def measured(self) -> bool:
        """Whether an image must say its spacing: tiles are cut at a stated resolution."""
        return self.input == "tiles"

    def stated_spacing(self, shards: ShardDataset) -> float | None:
        """Millimetres a pixel that were said of the training data, if these are that data; nothing of others."""
        names = {(manifest["dataset"], manifest["records"]) for manifest in shards.manifests}
        same = names <= set(self.trained_on.records) and not any(other_settings(self, m) for m in shards.manifests)
        return self.tiles.spacing_mm if same else None


def card_for(
    section: FinetuneSection,
    labelled: Labelled,
    fit: Ints,
    shards: ShardDataset,
    base: Mapping[str, Any],
    normalise: Normalisation,
    temperature: float,
    thresholds: Mapping[Level, tuple[float, ...]],
) -> ModelCard:
    """The card of a model.

    Args:
        section: how it was tuned.
        labelled: the task.
        fit: numbers of the labelled images that anything in it was chosen by: weights, temperature, thresholds.
        shards: where they lie.
        base: the encoder, as `Tuned.base` or `finetune.peft.registry.describe` gives it before it is tuned.
        normalise: of what the encoder sees.
        temperature: of the logits.
        thresholds: by level.
    """
    mapping = section.classes if isinstance(section.classes, dict) else None
    target = TargetCard(**vars(labelled.target), labels=mapping, separator=section.separator)
    same = ("encoder", "method", "options", "input", "tiles", "readout", "headline", "operating_point", "operating_at")
    encoder = Base(**base)
    return ModelCard(
        target=target,
        base=encoder,
        image_size=encoder.image_size,
        mean=normalise.mean,
        std=normalise.std,
        temperature=temperature,
        thresholds=dict(thresholds),
        preprocessing=preprocessing_of(shards),
        trained_on=trained_on(labelled, fit, shards),
        **{name: getattr(section, name) for name in same},
    )


def preprocessing_of(shards: ShardDataset) -> tuple[dict[str, Any], ...]:
    """How films became images, of every data set that says something else than those before it."""
    found: list[dict[str, Any]] = []
    for manifest in shards.manifests:
        if (how := manifest.get("preprocessing", {})) not in found:
            found.append(how)
    return tuple(found)


def pixel_settings(how: Mapping[str, Any]) -> dict[str, Any]:
    """What changes the pixels among a manifest's `preprocessing`; nothing where it does not say how it was made."""
    if not how:
        return {}
    dicom = how.get("dicom", {})
    return {name: how.get(name, usual) for name, usual in PIXELS.items()} | {
        f"dicom.{name}": dicom.get(name, usual) for name, usual in DICOM_PIXELS.items()
    }


def other_settings(card: Taught, manifest: Mapping[str, Any]) -> str:
    """How films became other pixels than those of the model's training, in words; nothing where they did not."""
    here, trained = pixel_settings(manifest.get("preprocessing", {})), list(map(pixel_settings, card.preprocessing))
    if here in trained:
        return ""
    known = [how for how in trained if how]
    if not here or not known:
        return "it is not said how " + ("the training data was ingested" if here else "it was ingested")
    nearest = min(known, key=lambda how: sum(here[name] != how[name] for name in here))
    odd = [name for name in here if here[name] != nearest[name]]
    told, meant = (", ".join(f"{name} {how[name]}" for name in odd) for how in (here, nearest))
    return f"ingested with {told}; the training data with {meant}"


def trained_on(labelled: Labelled, fit: Ints, shards: ShardDataset) -> TrainedOn:
    """Whose images a model knows."""
    of = sorted({patient.rpartition("/")[2] for patient in labelled.patients[fit].tolist()})
    records = tuple((manifest["dataset"], manifest["records"]) for manifest in shards.manifests)
    return TrainedOn(images=len(fit), patients=len(np.unique(labelled.patients[fit])), records=records, of=tuple(of))
