"""The encoder: a timm ViT, built, saved and loaded so that timm alone can load it too.

encoder.safetensors   timm's own key names
encoder.json          {"schema", "architecture": NAME, "kwargs": {…}, "mean": [m], "std": [s], "provenance": {…}}

vit = timm.create_model(card["architecture"], **card["kwargs"]); vit.load_state_dict(load_file(…))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..data.views import Normalisation
from ..engine.errors import UserError, did_you_mean, one_line
from ..engine.files import read_json, sha256, write_json

CARD = "miram.encoder/1"


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """What it takes to build an encoder again and to feed it."""

    architecture: str  # timm's name
    kwargs: dict[str, Any]  # of timm.create_model: in_chans, img_size, num_classes, …
    mean: tuple[float, ...] = (0.5,)  # of pixels as fractions of their largest value
    std: tuple[float, ...] = (0.5,)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its input."""
        height, width = self.kwargs["img_size"]
        return height, width


def card_for(name: str, image_size: tuple[int, int], options: Mapping[str, Any]) -> EncoderCard:
    """The card of a timm ViT, grayscale unless `options` hold another `in_chans`.

    Raises:
        UserError: timm knows no such ViT.
    """
    known = timm.list_models("*vit*")
    if name not in known:
        raise UserError(f"model.encoder: timm has no ViT {name!r}{did_you_mean(name, known) if len(name) > 3 else ''}")
    return EncoderCard(
        architecture=name, kwargs={"in_chans": 1, "num_classes": 0, "img_size": list(image_size), **options}
    )


def build_encoder(card: EncoderCard) -> VisionTransformer:
    """The ViT of a card with MAE's initialisation: fixed 2-D sine-cosine positions, xavier-uniform matrices.

    Raises:
        UserError: timm refuses the combination, or what it builds is no plain ViT.
    """
    try:
        vit = timm.create_model(card.architecture, **card.kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"model.encoder: timm cannot build {card.architecture} with {card.kwargs}: {one_line(str(error))}"
        ) from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise UserError(
            f"model.encoder: {card.architecture} is no plain ViT with absolute positions; try vit_small_patch16_224"
        )
    if vit.embed_dim % 4:
        raise UserError(f"model.encoder: width {vit.embed_dim} is no multiple of 4, as sine-cosine positions need")
    if any(True for _ in vit.fc_norm.parameters()):
        raise UserError(
            f"model.encoder: {card.architecture} norms after pooling, not before; choose a ViT with a class token"
        )
    initialise(vit)
    set_sincos_positions(vit)
    return describe(vit, card)


def describe(vit: VisionTransformer, card: EncoderCard) -> VisionTransformer:
    """Put the input's size and statistics where timm looks for them."""
    size = (card.kwargs["in_chans"], *card.image_size)
    config = {"input_size": size, "mean": card.mean, "std": card.std, "num_classes": 0}
    cast(Any, vit).pretrained_cfg = {**cast(Any, vit).pretrained_cfg, **config}
    return vit


def normalisation(vit: VisionTransformer) -> Normalisation:
    """How its input is normalised; of a colour model's statistics the mean, for one channel."""
    config = cast(Any, vit).pretrained_cfg
    return Normalisation(fmean(config["mean"]), fmean(config["std"]))


def initialise(module: nn.Module) -> None:
    """Xavier-uniform matrices (the patch projection as one), zero biases, unit norms (MAE, appendix A)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
        elif isinstance(part, nn.Conv2d) and part.groups == 1:
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
        if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
            nn.init.zeros_(part.bias)


def set_sincos_positions(vit: VisionTransformer) -> None:
    """Fix the position embedding to sines and cosines of the grid; prefix tokens get none."""
    assert vit.pos_embed is not None
    grid = sincos_positions(vit.patch_embed.grid_size, vit.embed_dim)
    missing = vit.pos_embed.shape[1] - grid.shape[1]
    vit.pos_embed.data = torch.cat([torch.zeros(1, missing, vit.embed_dim), grid], dim=1)
    vit.pos_embed.requires_grad_(False)


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """(1, N, D) fixed 2-D sine-cosine embedding, D a multiple of 4 (MAE, appendix A)."""
    return build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=False)[None]


def encode_visible(vit: VisionTransformer, images: Tensor, ids_keep: Tensor) -> Tensor:
    """(B, C, H, W) and (B, V) kept patches -> (B, prefix + V, D): the ViT on those patches only (MAE, section 3)."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    prefix, patches = tokens[:, : vit.num_prefix_tokens], tokens[:, vit.num_prefix_tokens :]
    kept = patches.gather(1, ids_keep[..., None].expand(-1, -1, patches.shape[-1]))
    return vit.norm(vit.blocks(vit.norm_pre(torch.cat([prefix, kept], dim=1))))


# ---------------------------------------------------------------------------------------------- files


def save_encoder(folder: Path, vit: VisionTransformer, card: EncoderCard) -> None:
    """Write encoder.safetensors and encoder.json."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vit.state_dict().items()}
    temporary = folder / ".encoder.safetensors"
    save_file(tensors, temporary)
    temporary.chmod(0o644)  # safetensors keeps its files to their owner; weights are to be shared
    temporary.replace(folder / "encoder.safetensors")
    parameters = sum(p.numel() for p in vit.parameters())
    write_json(folder / "encoder.json", CARD, asdict(card) | {"parameters": parameters})


def read_card(path: Path) -> EncoderCard:
    """encoder.json as a card.

    Raises:
        UserError: it is missing or no such file.
    """
    content = read_json(path, CARD)
    fields = {k: content[k] for k in ("architecture", "kwargs", "provenance")}
    return EncoderCard(**fields, mean=tuple(content["mean"]), std=tuple(content["std"]))


def find_card(path: str) -> tuple[Path, EncoderCard]:
    """The weights' file and the card of a run folder or of an encoder.safetensors.

    Raises:
        UserError: either is missing.
    """
    weights = Path(path) / "encoder.safetensors" if Path(path).is_dir() else Path(path)
    if not weights.is_file():
        raise UserError(
            f"there is no encoder at {path}: name a finished pretraining run, an encoder.safetensors, or timm:NAME"
        )
    return weights, read_card(weights.with_suffix(".json"))


def read_provenance(path_or_name: str) -> dict[str, Any]:
    """What an encoder of ours was trained on; nothing is known of timm's.

    Raises:
        UserError: there is no such encoder.
    """
    return {} if path_or_name.startswith("timm:") else find_card(path_or_name)[1].provenance


def encoder_digest(path_or_name: str) -> str:
    """Changes when the weights do; timm's are known by their name.

    Raises:
        UserError: there is no such encoder.
    """
    return path_or_name if path_or_name.startswith("timm:") else sha256(find_card(path_or_name)[0])


def load_encoder(path_or_name: str | Path) -> VisionTransformer:
    """An encoder in eval mode: from a RUN folder, an `encoder.safetensors`, or `timm:NAME` (timm's own weights).

    Raises:
        UserError: nothing is there, or the weights and the architecture do not match key by key.
    """
    name = str(path_or_name)
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:"))
    weights, card = find_card(name)
    vit = build_encoder(card)
    try:
        vit.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{weights} does not fit its encoder.json: {one_line(str(error))}") from error
    return vit.eval()


def random_like(path_or_name: str | Path, seed: int) -> VisionTransformer:
    """An encoder of the same shape and input as `load_encoder` gives, as it is before any training.

    Raises:
        UserError: nothing is there.
    """
    name = str(path_or_name)
    torch.manual_seed(seed)
    if not name.startswith("timm:"):
        return build_encoder(find_card(name)[1]).eval()
    vit = cast(VisionTransformer, timm.create_model(name.removeprefix("timm:"), in_chans=1, num_classes=0))
    initialise(vit)
    return vit.eval()


def _load_timm(name: str) -> VisionTransformer:
    try:
        vit = timm.create_model(name, pretrained=True, in_chans=1, num_classes=0)
    except Exception as error:  # whatever the hub, the network or timm raise: the user's to mend
        raise UserError(
            f"timm:{name} could not be had ({one_line(str(error))[:200]}); is the name right and the network up?"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"timm:{name} is no plain ViT; choose one of timm's vit_… models")
    return vit.eval()
