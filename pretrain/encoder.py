"""The encoder: a timm ViT (also with rotary positions), built, saved and loaded so that timm alone can load it too.

encoder.safetensors   timm's own key names
encoder.json          {"schema", "architecture": NAME, "kwargs": {…}, "mean": [m], "std": [s], "provenance": {…}}

vit = timm.create_model(card["architecture"], **card["kwargs"]); vit.load_state_dict(load_file(…))
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import timm
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers.patch_embed import PatchEmbed
from timm.models import adapt_input_conv, checkpoint
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..data.views import Normalisation
from ..engine.errors import UserError, did_you_mean, one_line
from ..engine.files import read_json, write_json

CARD = "miram.encoder/1"

RESERVED = {
    "img_size": "the size is model.image_size",
    "num_classes": "an encoder has none",
    "pretrained": "weights come from init, e.g. init: timm:NAME",
    "patch_drop_rate": "patches are hidden by model.mask_ratio",
}
Encoder = VisionTransformer | Eva  # Eva is timm's ViT with rotary positions: EVA-02, DINOv3


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


def card_for(
    name: str, image_size: tuple[int, int], options: Mapping[str, Any], setting: str = "model.encoder"
) -> EncoderCard:
    """The card of a timm ViT, grayscale unless `options` hold another `in_chans`.

    Raises:
        UserError: timm knows no such ViT.
    """
    known = timm.list_models(["*vit*", "eva*"])
    if name not in known:
        near = did_you_mean(name, known)  # or all of timm's names, which are no help
        raise UserError(f"{setting}: timm has no ViT {name!r}{near if len(near) < 100 else ''}")
    for option in RESERVED.keys() & options.keys():
        raise UserError(f"model.encoder_options.{option} is not for you to set; {RESERVED[option]}")
    return EncoderCard(
        architecture=name, kwargs={"in_chans": 1, "num_classes": 0, "img_size": list(image_size), **options}
    )


def build_encoder(card: EncoderCard) -> Encoder:
    """The ViT of a card with MAE's initialisation: fixed 2-D sine-cosine positions, xavier-uniform matrices.

    Rotary positions stay as timm makes them; a ViT may have either kind or both.

    Raises:
        UserError: timm refuses the combination, or what it builds is no plain ViT.
    """
    try:
        vit = timm.create_model(card.architecture, **card.kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"model.encoder: timm cannot build {card.architecture} with {card.kwargs}: {one_line(str(error))}"
        ) from error
    if not isinstance(vit, Encoder) or (vit.pos_embed is None and getattr(vit, "rope", None) is None):
        raise UserError(f"model.encoder: {card.architecture} is no plain ViT with positions; try vit_small_patch16_224")
    if vit.pos_embed is not None and vit.embed_dim % 4:
        raise UserError(f"model.encoder: width {vit.embed_dim} is no multiple of 4, as sine-cosine positions need")
    if any(True for _ in vit.fc_norm.parameters()):
        raise UserError(f"model.encoder: {card.architecture} norms after pooling; choose a ViT with a class token")
    if getattr(vit, "attn_pool", None) is not None:
        raise UserError(
            f"model.encoder: {card.architecture} pools by attention, which nothing here would train; set "
            "model.encoder_options={global_pool: avg}"
        )
    if type(vit.patch_embed) is not PatchEmbed or len(set(vit.patch_embed.patch_size)) > 1:
        raise UserError(f"model.encoder: {card.architecture} does not cut images into plain square patches")
    initialise(vit)
    set_sincos_positions(vit)
    return describe(vit, card)


def describe(vit: Encoder, card: EncoderCard) -> Encoder:
    """Put the input's size and statistics where timm looks for them."""
    size = (card.kwargs["in_chans"], *card.image_size)
    config = {"input_size": size, "mean": card.mean, "std": card.std, "num_classes": 0}
    cast(Any, vit).pretrained_cfg = {**cast(Any, vit).pretrained_cfg, **config}
    return vit


def normalisation(vit: Encoder) -> Normalisation:
    """How its input is normalised; of a colour model's statistics the mean, for one channel."""
    config = cast(Any, vit).pretrained_cfg
    if vit.patch_embed.proj.in_channels > 1:
        return Normalisation(tuple(config["mean"]), tuple(config["std"]))
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


def set_sincos_positions(vit: Encoder) -> None:
    """Fix the position embedding to sines and cosines of the grid; prefix tokens get none."""
    if vit.pos_embed is None:
        return
    grid = sincos_positions(vit.patch_embed.grid_size, vit.embed_dim)
    missing = vit.pos_embed.shape[1] - grid.shape[1]
    vit.pos_embed.data = torch.cat([torch.zeros(1, missing, vit.embed_dim), grid], dim=1)
    vit.pos_embed.requires_grad_(False)


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """(1, N, D) fixed 2-D sine-cosine embedding, D a multiple of 4 (MAE, appendix A).

    A quarter of the channels each: sine and cosine of the column, then of the row. The order is that of MAE's released
    weights, whose decoders it has to fit.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[None].float()


def encode_visible(vit: Encoder, images: Tensor, ids_keep: Tensor) -> Tensor:
    """(B, C, H, W) and (B, V) kept patches -> (B, prefix + V, D): the ViT on those patches only (MAE, section 3)."""
    (x,) = deque(layers(vit, images, ids_keep), maxlen=1)
    return vit.norm(x)


def layers(vit: Encoder, images: Tensor, ids_keep: Tensor) -> Iterator[Tensor]:
    """What each block of `encode_visible` gives, (B, prefix + V, D): who stops asking computes no more."""
    tokens, rope = embed(vit, images)
    prefix, patches = tokens[:, : vit.num_prefix_tokens], tokens[:, vit.num_prefix_tokens :]
    kept = patches.gather(1, ids_keep[..., None].expand(-1, -1, patches.shape[-1]))
    x = vit.norm_pre(torch.cat([prefix, kept], dim=1))
    for block, angles in zip(vit.blocks, rotations(vit, rope, ids_keep), strict=True):
        rotated: dict[str, Any] = {} if angles is None else {"rope": angles}
        x = run(block, x, vit.grad_checkpointing, **rotated)
        yield x


def run(block: nn.Module, x: Tensor, recompute: bool, **rotated: Any) -> Tensor:
    """One block, (B, N, D) -> (B, N, D); `recompute` it in the backward pass instead of keeping what it made."""
    out: Tensor = checkpoint(block, x, **rotated) if recompute and torch.is_grad_enabled() else block(x, **rotated)
    return out


def embed(vit: Encoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, C, H, W) -> (B, prefix + N, D) tokens with their absolute positions, and rotary ones if the ViT has them."""
    embedded = cast(Any, vit)._pos_embed(vit.patch_embed(images))
    return embedded if isinstance(vit, Eva) else (embedded, None)


def rotations(vit: Encoder, rope: Tensor | None, ids_keep: Tensor) -> Sequence[Tensor | None]:
    """For every block the rotary embedding of the kept patches, (B, 1 or heads, V, d).

    `rope` is (N, d), or (blocks, heads, N, d) where every block learns its own.
    """
    if rope is None or rope.dim() == 2:
        return [None if rope is None else rope[ids_keep][:, None]] * len(vit.blocks)
    return list(rope[:, :, ids_keep].transpose(1, 2))


# ---------------------------------------------------------------------------------------------- another input


def set_image_size(vit: Encoder, size: tuple[int, int]) -> str:
    """Change the input's height and width in place, interpolating absolute positions; say what was done, if anything.

    Raises:
        UserError: the size is no multiple of the patch.
    """
    before, patch = vit.patch_embed.grid_size, vit.patch_embed.patch_size
    if size[0] % patch[0] or size[1] % patch[1]:
        raise UserError(f"an image of {size[0]} x {size[1]} is not made of patches of {patch[0]} x {patch[1]}")
    vit.set_input_size(img_size=size)
    after = vit.patch_embed.grid_size
    if vit.pos_embed is None or before == after:
        return ""
    return f"interpolated from {before[0]} x {before[1]} to {after[0]} x {after[1]}"


@torch.no_grad()
def set_channels(vit: Encoder, channels: int) -> str:
    """Change the input's channels in place so that grey pictures give what they gave; say what was done, if anything.

    Of a grey pixel g, colour channel c sees (g - m_c) / s_c and a single channel u = (g - m) / s, m and s the means of
    m_c and s_c. Put g = s u + m into sum_c W_c (g - m_c) / s_c: the channels are summed with weights s / s_c, and what
    is left, sum_c W_c (m - m_c) / s_c, is a constant for the bias. A projection without one (CLIP's) loses it, and
    grey pictures give what they gave but for that constant. Several channels share a single one's weights.
    """
    old, config = cast(Any, vit.patch_embed.proj), cast(Any, vit).pretrained_cfg
    if old.in_channels == channels:
        return ""
    mean, std = (torch.tensor(config[key]).expand(old.in_channels) for key in ("mean", "std"))
    scale, shift = std.mean() / std, (mean.mean() - mean) / std
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    grey = adapt_input_conv(1, old.weight * scale[:, None, None], base_chans=old.in_channels)
    new.weight.copy_(adapt_input_conv(channels, grey, base_chans=1))
    if new.bias is not None:
        new.bias.copy_(old.bias + old.weight.sum((2, 3)) @ shift)
    vit.patch_embed.proj = new
    statistics = {"mean": (mean.mean().item(),) * channels, "std": (std.mean().item(),) * channels}
    size = (channels, *vit.patch_embed.img_size)
    cast(Any, vit).pretrained_cfg = {**config, **statistics, "input_size": size}
    lost = new.bias is None and bool(shift.abs().max() > 1e-6)
    done = f"{old.in_channels} channels summed to 1" if channels == 1 else f"grey spread over {channels} channels"
    return done + "; WITHOUT A BIAS THE DIFFERENCE OF THE CHANNELS' MEANS IS LOST" * lost


def adapt(vit: Encoder, size: tuple[int, int], channels: int) -> dict[str, str]:
    """Give an encoder another input in place; returns what happened to which tensor.

    Raises:
        UserError: the size is no multiple of the patch.
    """
    several = channels != vit.patch_embed.proj.in_channels > 1 and vit.patch_embed.proj.bias is not None
    changes = {
        "patch_embed.proj.weight": set_channels(vit, channels),
        "patch_embed.proj.bias": "took up the channels' different means" if several else "",
        "pos_embed": set_image_size(vit, size),
    }
    cast(Any, vit).pretrained_cfg = {**cast(Any, vit).pretrained_cfg, "input_size": (channels, *size)}
    return {key: how for key, how in changes.items() if how}


# ---------------------------------------------------------------------------------------------- files


def save_encoder(folder: Path, vit: Encoder, card: EncoderCard) -> None:
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
    try:
        card = TypeAdapter(EncoderCard).validate_python({f.name: content[f.name] for f in fields(EncoderCard)})
        if min(size := (card.kwargs["in_chans"], *card.image_size)) < 1:
            raise ValueError(f"an input of {size}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}, {one_line(str(error))[:200]}") from error
    return card


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
    if not weights.with_suffix(".json").exists():
        raise UserError(f"{weights} is no encoder of ours: run `miram convert {weights} DIR` and name DIR")
    return weights, read_card(weights.with_suffix(".json"))


def load_ours(path: str) -> tuple[Encoder, EncoderCard]:
    """An encoder of ours in eval mode, and its card: of a run folder or of an encoder.safetensors.

    Raises:
        UserError: nothing is there, or the weights and the architecture do not match key by key.
    """
    weights, card = find_card(path)
    vit = build_encoder(card)
    try:
        vit.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{weights} does not fit its encoder.json: {one_line(str(error))}") from error
    return vit.eval(), card


def weights_digest(vit: nn.Module) -> str:
    """sha256 in hex of the names, shapes, types and bytes of all tensors, wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
