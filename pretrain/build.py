"""From the configuration of a pretraining to its encoder, objective and views."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from ..data.augment import TwoViews
from ..data.shards import ShardDataset
from ..data.views import MultiScaleViews, Normalisation
from ..engine.config import dump_yaml
from ..engine.errors import UserError
from ..engine.seeding import stable_seed
from ..version import __version__
from .config import ModelSection, PretrainConfig, ScaleSection
from .encoder import Encoder, EncoderCard, build_encoder, card_for
from .miram import Miram
from .moco_v3 import MocoV3, initialise_qkv
from .weights.loading import read_provenance
from .weights.start import initialise_decoder, initialise_encoder

PretrainObjective = Miram | MocoV3


def encoder_card(settings: PretrainConfig, shards: ShardDataset) -> EncoderCard:
    """What the encoder will say of itself: shape, normalisation, and what it was trained on and how.

    Raises:
        UserError: timm knows no such ViT, or it is asked for another number of channels than the data has.
    """
    options = {"in_chans": shards.channels} | settings.model.encoder_options
    card = card_for(settings.model.encoder, settings.model.size, options)
    if card.kwargs["in_chans"] != shards.channels:
        raise UserError(
            f"model.encoder_options.in_chans is not the {shards.channels} channels of data.shards; leave it out"
        )
    mean, std = shards.pixel_statistics
    provenance = {
        "miram": __version__,
        "objective": settings.objective,
        "init": settings.init and {"from": settings.init, **read_provenance(settings.init)},
        "data": [{k: m[k] for k in ("dataset", "licence", "records")} for m in shards.manifests],
        "split": settings.data.split,
        "split_digest": shards.split_digest,
        "fold": settings.data.fold,
        "images": len(shards),
        "config_sha256": hashlib.sha256(dump_yaml(settings).encode()).hexdigest(),
    }
    return replace(card, mean=(mean,) * shards.channels, std=(std,) * shards.channels, provenance=provenance)


def build_objective(settings: PretrainConfig, card: EncoderCard) -> tuple[PretrainObjective, list[str]]:
    """What learns, with the weights that the seed or `init` gives it, and a report of what `init` gave.

    Raises:
        UserError: encoder, `init` and objective do not fit each other.
    """
    torch.manual_seed(stable_seed(settings.seed, "weights") % 2**63)
    encoder = build_encoder(card)
    check_patches(settings.model, encoder)
    encoder.set_grad_checkpointing(settings.model.checkpointing)
    said = initialise_encoder(encoder, settings.init) if settings.init else []
    if settings.objective == "moco_v3":
        if settings.model.attention_backend == "xformers":
            raise UserError("model.attention_backend: moco_v3 has no decoder that xformers could run in; leave it out")
        if settings.init is None:
            initialise_qkv(encoder)
        return MocoV3(encoder, settings.moco), said
    model = build_miram(settings.model, encoder)
    return model, said + (initialise_decoder(model, settings.init) if settings.init else [])


def check_patches(section: ModelSection, encoder: Encoder) -> None:
    """Refuse an image that does not divide into patches.

    Raises:
        UserError: it does not.
    """
    patch = encoder.patch_embed.patch_size[0]
    if any(side % patch for side in section.size):
        raise UserError(
            f"model.image_size {list(section.size)} must be multiples of the encoder's patches of {patch} pixels"
        )


def build_miram(section: ModelSection, encoder: Encoder) -> Miram:
    """The masked autoencoder around an encoder.

    Raises:
        UserError: a scale does not fit the grid of patches, or too few patches would stay visible.
    """
    scales = [with_backend(scale, section.attention_backend) for scale in section.scales]
    exact = [scale for scale in scales if scale.tokens == "upsampled" and scale.attention == "softmax"]
    if section.attention_backend == "xformers" and not exact:
        raise UserError("model.attention_backend: xformers has no softmax decoder to run in; leave it out")
    try:
        model = Miram(
            encoder,
            scales,
            mask_ratio=section.mask_ratio,
            mask_unit=section.mask_unit,
            norm_pix=section.norm_pix,
            variance_floor=section.variance_floor,
            tissue_loss=section.tissue_loss,
            target=section.target,
        )
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    units, visible = len(model.units), int(len(model.units) * (1 - section.mask_ratio))
    if not 0 < visible < units:
        raise UserError(f"model.mask_ratio {section.mask_ratio} leaves {visible} of {units} patches visible")
    return model


def with_backend(scale: ScaleSection, backend: str) -> ScaleSection:
    """Softmax decoders take the model's backend where they name none of their own."""
    if scale.attention != "softmax":
        return scale
    return scale.model_copy(update={"options": {"backend": backend, **scale.options}})


def build_views(
    settings: PretrainConfig, card: EncoderCard, objective: PretrainObjective
) -> MultiScaleViews | TwoViews:
    """What the objective is shown of an image: `inputs`, each drawn anew every epoch."""
    normalise = Normalisation(card.mean, card.std)
    if isinstance(objective, MocoV3):
        return TwoViews(settings.model.size, settings.crop, settings.pair, normalise, settings.seed)
    shapes = objective.inputs
    return MultiScaleViews(
        size=settings.model.size,
        scales=scales_of("view", shapes),
        units=shapes["noise"][0],
        crop=settings.crop,
        normalise=normalise,
        seed=settings.seed,
        tiles={s: shapes[f"tiles/{s}"][0] for s in scales_of("tiles", shapes)},
        tissue={x.scale: objective.grid_of(x) for x in objective.scales if settings.model.tissue_loss},
    )


def scales_of(name: str, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """s of every NAME/s."""
    return [int(key.removeprefix(f"{name}/")) for key in shapes if key.startswith(f"{name}/")]
