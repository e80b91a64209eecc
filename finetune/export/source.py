"""What is exported: one network of a finished run, ready to be called, and all that may be said about it.

Legend: B images of (C, H, W); D features; w outputs of a classifier; K classes of a segmenter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.errors import RunFailed, UserError
from ...engine.files import read_json
from ...engine.run import RESULT, STATE
from ...pretrain.encoder import Encoder, load_ours, weights_digest
from ..classify.cards import ModelCard, pixel_settings
from ..classify.locked import read_locked
from ..peft.base import Tuned
from ..sealed import stage_of
from ..segment.decoders import EncoderDecoder
from ..segment.locked import SegmentCard, read_segmenter
from .licences import NEVER_TRAINED, Licence, home_of, of_pretraining, of_tuning, provenance_of
from .parity import TOLERANCE, difference, noise, within

Kind = Literal["encoder", "classifier", "segmenter"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One network and what is known about it.

    Attributes:
        kind: what it is.
        module: in eval mode, on the CPU; images (B, C, H, W), normalised, -> features (B, D) as timm's vit(images)
            gives them, logits (B, w), or logits (B, K, H, W) of one tile.
        vit: the plain timm ViT inside, without a head and with all adapters merged; None where there is none.
        head: of a classifier on `vit`, the layer on its pooled features.
        image_size: height and width of the input.
        channels: of the input.
        mean: of every channel, of pixels as fractions of their largest value.
        std: likewise.
        classes: their names; of an encoder none.
        kind_of_task: binary, multiclass, multilabel or ordinal; of a segmenter what its masks hold; "" for an encoder.
        task: the label that a classifier tells.
        temperature: what logits are divided by; None where there is none.
        thresholds: by level, as the model decides; chosen on patients that it did not learn from.
        reading: how a film becomes an input, by the names of the run's settings.
        method: how it was tuned.
        trained_on: numbers of images and patients it was tuned on.
        judged: how well it did in its run's own test: metric, value, interval, level, n_images, n_patients.
        provenance: how the encoder came about.
        licences: [{"dataset", "licence", "used_for"}].
        digest: sha256 of the weights of `module`.
        notes: sentences for the card.
        home: the run's folder, for what only it holds. It is in no card.
    """

    kind: Kind
    module: nn.Module
    vit: Encoder | None
    head: nn.Linear | None
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    kind_of_task: str = ""
    task: str = ""
    temperature: float | None = None
    thresholds: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    trained_on: dict[str, int] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    licences: list[Licence] = field(default_factory=list)
    digest: str = ""
    notes: list[str] = field(default_factory=list)
    home: Path | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """(w,) what each logit of a classifier is of; an ordinal one asks whether it is more than a class."""
        return tuple(f"above {c}" for c in self.classes[:-1]) if self.kind_of_task == "ordinal" else self.classes


def read_source(run: str | Path, encoder: str | None = None) -> Source:
    """The network of a finished run, and what is known of it.

    Args:
        run: of pretrain, distill, finetune, federate or segment; a model's folder that was copied from one; what
            `miram convert` wrote; an encoder.safetensors.
        encoder: where a tuned model's encoder now lies, if no longer where the run found it.

    Raises:
        UserError: nothing is there, it is unfinished or damaged, or it is of a kind that is not exported.
        RunFailed: the model with its adapter merged computes something else.
    """
    folder = Path(run)
    stage = stage_at(folder)
    with torch.random.fork_rng():
        if stage == "segment":
            found = of_segmenter(folder, encoder)
        elif stage in ("finetune", "sweep", "federate"):
            found = of_classifier(folder, encoder)
        elif encoder is not None:
            raise UserError(f"--encoder: {run} is an encoder itself and stands on none; leave it out")
        else:
            found = of_encoder(folder, stage)
    if not all(tensor.isfinite().all() for tensor in found.module.state_dict().values()):
        raise UserError(f"{run}: its weights are not finite everywhere, so its training went astray; train it again")
    return found


def stage_at(folder: Path) -> str:
    """The stage of a run, of a model's folder, or of the run that an encoder's file lies in; "" where none is told.

    Raises:
        UserError: the run's state is damaged, so nobody knows whether it is finished.
    """
    state = (folder.parent if folder.is_file() else folder) / "state.json"
    if not state.exists():
        return stage_of(folder)
    if not (stage := read_json(state, STATE).get("stage")):
        raise UserError(f"{state} is damaged: it names no stage; repeat the command that made the run")
    return str(stage)


# ---------------------------------------------------------------------------------------------- the three kinds


def of_encoder(folder: Path, stage: str) -> Source:
    """An encoder as pretraining, distillation or `miram convert` left it.

    Raises:
        UserError: there is none, or its run is not finished.
    """
    if not folder.exists():
        raise UserError(f"{folder} is not there; name a finished run, a folder of `miram convert` or an encoder's file")
    if stage:
        refuse_unready(home_of(folder), stage)
    vit, card = load_ours(str(folder))
    return Source(
        kind="encoder",
        module=vit.requires_grad_(False),
        vit=vit,
        head=None,
        image_size=card.image_size,
        channels=card.kwargs["in_chans"],
        mean=card.mean,
        std=card.std,
        provenance=card.provenance,
        licences=of_pretraining(card.provenance),
        digest=weights_digest(vit),
        home=home_of(folder),
    )


def refuse_unready(run: Path, stage: str) -> None:
    """Raises: UserError: the run makes no encoder, or has not made it yet."""
    if stage not in ("pretrain", "distill"):
        raise UserError(
            f"{run} is a run of `miram {stage}`, which makes nothing to export; name one of pretrain, distill, "
            "finetune, segment or federate"
        )
    if (status := read_json(run / "state.json", STATE).get("status", "not begun")) != "finished":
        raise UserError(f"{run} is not finished ({status}); repeat the command that made it, and it goes on")


def of_classifier(folder: Path, encoder: str | None) -> Source:
    """A tuned classifier, its adapter merged where the method merges.

    Raises:
        UserError: it cannot be read, or it reads tiles.
        RunFailed: merging changed what it computes.
    """
    locked = read_locked(folder, encoder)
    card, tuned = locked.card, locked.model
    if not isinstance(tuned, Tuned):
        raise UserError(
            f"{folder} reads an image as tiles (finetune.input), so it is no single network and is not exported; "
            "export its encoder, or tune with finetune.input=windows"
        )
    assert isinstance(tuned.head, nn.Linear)
    head, size = tuned.head, card.image_size
    vit, notes = merged(tuned, noise(2, card.channels, size))
    module = nn.Sequential(vit, head) if vit is not None else tuned
    provenance = provenance_of(encoder or card.encoder)
    return Source(
        kind="classifier",
        module=module.requires_grad_(False).eval(),
        vit=vit,
        head=head,
        image_size=size,
        **statistics(card),
        classes=card.target.classes,
        kind_of_task=card.target.kind,
        task=card.target.name,
        temperature=card.temperature,
        thresholds={str(level): values for level, values in card.thresholds.items()},
        reading={"input": card.input, "preprocessing": list(map(pixel_settings, card.preprocessing))},
        provenance=provenance,
        licences=[*of_pretraining(provenance), *of_tuning(home_of(folder), card)],
        digest=weights_digest(module),
        notes=[*notes, FRAMES[card.input], joining(card)],
        **tuning(card, home_of(folder)),
        home=home_of(folder),
    )


FRAMES = {
    "windows": "It takes one frame. `miram finetune` judged whole films: each was scaled until it covered the frame, "
    "cut into even windows, and the logits of the windows were averaged.",
    "whole": "It takes one frame, into which `miram finetune` fitted the whole film: the same scale down and across, "
    "the film at the left and half-way up, the rest air (0 before normalisation).",
}


def of_segmenter(folder: Path, encoder: str | None) -> Source:
    """A segmentation model, its adapter merged where the method merges.

    Raises:
        UserError: it cannot be read.
        RunFailed: merging changed what it computes.
    """
    segmenter = read_segmenter(folder, encoder)
    card, module = segmenter.card, segmenter.model.cpu()
    notes = [TILES]
    if isinstance(module, EncoderDecoder):
        tuned = module.taps.tuned
        vit, told = merged(tuned, noise(2, card.channels, card.image_size), module)
        tuned.model = tuned.model if vit is None else vit
        notes += told
    named = encoder or card.encoder
    provenance = provenance_of(NEVER_TRAINED if named is None or card.control == "untrained" else named)
    same = ("model", "mm_per_pixel", "long_side", "overlap", "flips", "smallest")
    return Source(
        kind="segmenter",
        module=module.requires_grad_(False).eval(),
        vit=None,
        head=None,
        image_size=card.image_size,
        **statistics(card),
        classes=card.classes,
        kind_of_task=card.kind,
        thresholds={} if card.thresholds is None else {"pixel": card.thresholds},
        reading={name: getattr(card, name) for name in same},
        provenance=provenance,
        licences=[*(of_pretraining(provenance) if card.base else []), *of_tuning(home_of(folder), card)],
        digest=weights_digest(module),
        notes=notes,
        **tuning(card, home_of(folder)),
        home=home_of(folder),
    )


TILES = (
    "It takes one tile. `miram predict` cuts a film into overlapping tiles at the model's resolution, averages their "
    "probabilities, also of flipped tiles, and removes what is too small; those steps are not in the file."
)


def merged(tuned: Tuned, images: Tensor, around: nn.Module | None = None) -> tuple[Encoder | None, list[str]]:
    """The plain ViT that computes the same, where there is one, and what to say about it.

    Args:
        tuned: used up by it.
        images: (B, C, H, W) to see by that nothing changed.
        around: the model that `tuned` is a part of; None: it is the model.

    Raises:
        RunFailed: something did.
    """
    whole = around or tuned
    with torch.inference_mode():
        before = whole.eval()(images)
    try:
        vit = tuned.merged().eval()
    except UserError:  # the method never merges, or not into this encoder
        return None, [f"Tuned by {tuned.name}, which adds what a plain ViT has no place for; it is exported as it is."]
    tuned.model = vit
    with torch.inference_mode():
        after = whole(images)
    found = within(difference(before, after), float(before.abs().max()), TOLERANCE, {})
    if not found.holds:
        raise RunFailed(
            f"merging {tuned.name} into the encoder changed the outputs by {found.largest_difference:.3g}; nothing was "
            "written"
        )
    return vit, [f"Tuned by {tuned.name}, which is merged into the weights."]


def joining(card: ModelCard) -> str:
    """How the probabilities of images become those of breasts and patients, in words."""
    several = card.target.kind == "multiclass"
    views, breasts = ("mean" if how == "mean" or several else "largest" for how in vars(card.readout).values())
    return f"A breast's probability is the {views} over its images, a patient's the {breasts} over her breasts."


def statistics(card: ModelCard | SegmentCard) -> dict[str, Any]:
    """Channels and their normalisation, a number for each."""
    mean, std = (np.broadcast_to(np.atleast_1d(x), card.channels).tolist() for x in (card.mean, card.std))
    return {"channels": card.channels, "mean": tuple(mean), "std": tuple(std)}


def tuning(card: ModelCard | SegmentCard, home: Path) -> dict[str, Any]:
    """How, and on how much, a model was tuned, and how it did."""
    numbers = {"images": card.trained_on.images, "patients": card.trained_on.patients}
    return {"method": card.method or "", "trained_on": numbers, "judged": judged(home)}


def judged(home: Path) -> dict[str, Any]:
    """What a run's own test found; nothing of a model that was copied without its run."""
    if not (home / "result.json").is_file():
        return {}
    result = read_json(home / "result.json", RESULT)
    same = ("stage", "metric", "value", "interval", "level", "n_images", "n_patients", "split")
    return {name: result.get(name) for name in same}
