"""A tuned model as it goes out: it judges any image as it judged those of its test, and nothing in it may change.

RUN/model/model.json         {"schema", "target": {"name", "kind", "classes", "labels", "separator"}, "encoder": as it
                             was named, "base": {"architecture", …, "digest"}, "method", "options", "input", "tiles",
                             "image_size", "mean", "std", "temperature", "thresholds": {"image": […], …}, "readout",
                             "headline", "operating_point", "operating_at", "preprocessing": […], "trained_on":
                             {"images", "patients", "records", "of"}, "files": {NAME: sha256}, "digest"}
RUN/model/adapter/           what learnt, and the head (finetune/peft/files.py)
RUN/model/mil.safetensors    instead of it, where an image is read as tiles

The folder appears whole or not at all. `digest` is sha256 over all else in model.json, which holds those of the files:
it names the model. The encoder itself is not in the folder.
Legend: n images, k classes, w outputs of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ...data.shards import ShardDataset
from ...engine.errors import UserError
from ...engine.metrics import Floats, Ints
from ...pretrain.encoder import Encoder
from ..peft.base import Tuned
from ..peft.files import load, save
from ..sealed import CARD, CLASSIFIER, read_base, read_card, refuse_unfinished, refuse_without, seal, whole_folder
from .cards import ModelCard
from .config import Level, TilesSection
from .labels import Labelled
from .mil import MilModel, logits
from .reading import frame_logits
from .targets import Target
from .tiles import TileFeatures, fault_of, tile_features

ADAPTER, MIL = "adapter", "mil.safetensors"


@dataclass(frozen=True)
class Locked:
    """A model with everything that turns an image into a decision.

    Attributes:
        model: images -> logits; of tiles the attention that reads the features of `encoder`.
        cache: folder where features of tiles are kept; None: nowhere.
    """

    card: ModelCard
    model: Tuned | MilModel
    encoder: Encoder | None = None
    cache: Path | None = None

    @property
    def target(self) -> Target:
        """What it predicts."""
        return self.card.target.target

    @property
    def digest(self) -> str:
        """64 hex digits that name the model: another weight, threshold or temperature, another name."""
        return self.card.digest or self.card.own_digest()

    def logits(self, shards: ShardDataset, rows: Ints, batch_size: int = 64) -> Floats:
        """(n, w) of these rows of a data set, in their order; of frames, none depends on what other rows there are.

        Raises:
            UserError: the images have other channels than the encoder takes, or what comes out is not finite.
        """
        refuse_channels(self.card, shards)
        card = self.card
        if isinstance(self.model, MilModel):
            found = self.of_tiles(self.model, shards, rows, batch_size)
        else:
            assert card.input != "tiles"
            found = frame_logits(self.model, shards, rows, card.input, card.image_size, card.normalise, batch_size)
        if bad := int((~np.isfinite(found)).any(1).sum()):
            raise UserError(
                f"{', '.join(shards.roots)}: the model gives no finite numbers for {bad} of {len(rows)} images, so its "
                "training went astray; tune it again with lower rates (finetune.search.lrs) or another encoder"
            )
        return found

    def of_tiles(self, model: MilModel, shards: ShardDataset, rows: Ints, batch_size: int) -> Floats:
        """(n, w): images of a bag share its logits, and the bag is all of its tiles among these rows."""
        with self.tiles(shards, rows, batch_size) as (features, of):
            return logits(model, features, of, np.arange(len(rows)))

    def tiling(self, shards: ShardDataset) -> TilesSection:
        """Which tiles are read of a data set: a spacing that was stated of the training data is none of other data."""
        return self.card.tiles.model_copy(update={"spacing_mm": self.card.stated_spacing(shards)})

    @contextmanager
    def tiles(self, shards: ShardDataset, rows: Ints, batch_size: int) -> Iterator[tuple[TileFeatures, Labelled]]:
        """Features of the rows' tiles, and whose the rows are, in their order.

        Raises:
            UserError: an image's resolution is not known, or coarser than the tiles'.
        """
        assert self.encoder is not None
        order, place = np.unique(rows, return_inverse=True)
        some, section = shards.subset(order), self.tiling(shards)
        refuse_resolution(section, some)
        with TemporaryDirectory(prefix="miram-tiles-") as folder:
            cache = self.cache or Path(folder)
            features = tile_features(self.encoder, some, section, batch_size, cache, "the locked model's")
            yield features, replace(unlabelled(self.target, shards, rows), rows=place)

    def probabilities(self, shards: ShardDataset, rows: Ints, batch_size: int = 64) -> Floats:
        """(n, k) of these rows, at the locked temperature.

        Raises:
            UserError: as `logits`.
        """
        return self.target.probabilities(self.logits(shards, rows, batch_size), self.card.temperature)

    def decide(self, probabilities: Floats, level: Level = "image") -> Ints:
        """(n,) classes, or (n, k) 0/1, by the locked thresholds of images, breasts or patients."""
        return self.target.decide(probabilities, self.card.thresholds[level])


def unlabelled(target: Target, shards: ShardDataset, rows: Ints) -> Labelled:
    """Rows of a data set whose truth nobody knows, as those of a task."""
    chosen = shards.rows.take(rows)
    dataset, patient, side, keys = (np.array(chosen.column(c)) for c in ("dataset", "patient", "laterality", "key"))
    patients = np.char.add(np.char.add(dataset, "/"), patient)
    breasts = np.where(side == "", keys, np.char.add(np.char.add(patients, "/"), side))
    truth = np.zeros((len(rows), len(target.classes)) if target.kind == "multilabel" else len(rows), np.int64)
    return Labelled(target, rows, truth, patients, breasts, keys, np.array(shards.splits)[rows], {})


def refuse_channels(card: ModelCard, shards: ShardDataset) -> None:
    """Refuse images that the encoder cannot take.

    Raises:
        UserError: they have other channels.
    """
    wanted = card.base.channels
    if shards.channels != wanted:
        places = ", ".join(shards.roots)
        raise UserError(
            f"{places}: images of {shards.channels} channels, and the model takes {wanted}; ingest them again with "
            f"--channels {wanted}"
        )


def refuse_resolution(section: TilesSection, shards: ShardDataset) -> None:
    """Refuse images that cannot be cut into tiles of a stated resolution.

    Raises:
        UserError: how many, and why the first.
    """
    column = shards.rows.column("spacing_mm")
    if faults := [fault for value in column if (fault := fault_of(value, section))]:
        raise UserError(
            f"{', '.join(shards.roots)}: {len(faults)} of {len(column)} images cannot be judged; of the first, "
            f"{faults[0]}: ingest them again with their spacing (column spacing_mm of the label file), and fine enough"
        )


# ---------------------------------------------------------------------------------------------- making one


def write_locked(folder: Path, card: ModelCard, model: Tuned | MilModel) -> ModelCard:
    """Write a model; one that is there, of an earlier start of the same run, goes.

    Args:
        folder: RUN/model.
        card: of `card_for`.
        model: the tuned encoder with its head, or the attention over tiles.

    Returns:
        The card with its digest.
    """
    with whole_folder(folder) as part:
        if isinstance(model, Tuned):
            save(model, part / ADAPTER)
        else:
            model.write(part / MIL)
        return seal(part, CLASSIFIER, card)


# ---------------------------------------------------------------------------------------------- reading one


def read_locked(run: str | Path, encoder: str | None = None) -> Locked:
    """The model of a finished run.

    Args:
        run: the run's folder, or a folder of a model that was copied from one.
        encoder: where the encoder now lies, if no longer where the run found it.

    Raises:
        UserError: there is no finished run of `miram finetune`, the model is damaged, or the encoder is not there or is
            another one.
    """
    run = Path(run)
    if (run / CARD).is_file():
        return read_model(run, encoder)
    refuse_unfinished(run, "finetune")
    return read_model(run / "model", encoder)


def read_model(folder: Path, encoder: str | None = None) -> Locked:
    """A model, whatever became of its run.

    Raises:
        UserError: as `read_locked`.
    """
    card = read_card(folder, CLASSIFIER, ModelCard)
    refuse_without(folder, card, MIL if card.input == "tiles" else f"{ADAPTER}/adapter.json")
    vit = read_base(folder, card, encoder)
    if card.input == "tiles":
        return Locked(card, MilModel.read(folder / MIL), vit)
    return Locked(card, load(folder / ADAPTER, vit).eval())
