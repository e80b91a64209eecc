"""Foreign encoders: files of tensors, and the architecture that their shapes tell. The one reader of .pth files.

FILE   a .pth, .pt or .bin of tensors, bare or under "model" or "state_dict"; a .safetensors; a folder of the hub
       (config.json with model.safetensors or pytorch_model.bin, of transformers or of timm); or an encoder of ours
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ...engine.errors import UserError, one_line
from ..encoder import RESERVED, Encoder, EncoderCard, build_encoder, card_for, find_card, load_ours
from .hub import NAMES, HubConfig, read_config
from .layouts import Fate, Weights, translate

USUAL = {  # width: timm's name, patch, depth, heads
    192: ("vit_tiny_patch16_224", 16, 12, 3),
    384: ("vit_small_patch16_224", 16, 12, 6),
    768: ("vit_base_patch16_224", 16, 12, 12),
    1024: ("vit_large_patch16_224", 16, 24, 16),
    1280: ("vit_huge_patch14_224", 14, 32, 16),
}


@dataclass(frozen=True)
class Source:
    """A foreign encoder as it was, before it is given our input."""

    vit: Encoder
    card: EncoderCard
    fates: list[Fate]
    decoder: dict[str, Tensor] = field(default_factory=dict)
    decoder_heads: int = 16  # MAE's own, at every size
    notes: list[str] = field(default_factory=list)


def read_source(file: Path, architecture: str | None) -> Source:
    """The encoder in a file or folder, as it was there.

    Raises:
        UserError: it cannot be read, or its architecture is unknown or another.
    """
    if is_ours(file):
        return read_ours(file)
    path = weights_file(file)
    state, dropped = tensors_of(read_tensors(path), path)
    config = read_config(file)
    if config.model_type.startswith("dinov3") or any(key.endswith("patch_embeddings.weight") for key in state):
        raise UserError(
            f"{file} is DINOv3 as transformers lays it out, which is not read; timm's is, e.g. vit_small_patch16_dinov3"
        )
    weights = translate(state)
    card, notes = identify(weights, config, architecture, path)
    return Source(
        vit=load_into(built(card, path), weights, card, path),
        card=card,
        fates=weights.fates + dropped,
        decoder=weights.decoder,
        decoder_heads=config.decoder_num_attention_heads,
        notes=[f"{path}: {notes[0]}", *notes[1:]],
    )


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Whatever a stranger's file makes go wrong is said of that file.

    Raises:
        UserError: something did.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        # it can be odd in more ways than can be listed
        said = one_line(str(error))[:200]
        raise UserError(f"{file} is not understood ({type(error).__name__}: {said}); is it a plain ViT's?") from error


def is_ours(file: Path) -> bool:
    """Whether this project wrote it: the card beside the weights says so."""
    return (file / "encoder.json").is_file() or (file.suffix == ".safetensors" and file.with_suffix(".json").is_file())


def read_ours(file: Path) -> Source:
    """An encoder that this project wrote, with a decoder if there is one beside it.

    Raises:
        UserError: it is damaged.
    """
    (vit, card), path = load_ours(str(file)), find_card(str(file))[0]
    beside = path.with_name("decoder.safetensors")
    decoder, heads = read_decoder(beside) if beside.is_file() else ({}, 16)
    fates = [Fate(key, "taken", target=key) for key in (*vit.state_dict(), *decoder)]
    return Source(vit, card, fates, decoder, heads, [f"{path}: an encoder of ours, {card.architecture}"])


def weights_file(file: Path) -> Path:
    """The file itself, or the one in a folder that holds weights.

    Raises:
        UserError: there is none.
    """
    names = ("encoder.safetensors", *NAMES) if file.is_dir() else ()
    found = [file / name for name in names if (file / name).is_file()] if file.is_dir() else [file]
    if not found or not found[0].is_file():
        raise UserError(f"there are no weights at {file}; name a .pth, .safetensors, or folder with one of {NAMES}")
    return found[0]


def read_tensors(path: Path) -> Any:
    """What a file holds; nothing in it is run.

    Raises:
        UserError: it holds more than tensors, or is no such file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # options that MAE's trainer keeps in the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own for bytes that are not what they should be
        said = str(error)
        if object_in_it := re.search(r"GLOBAL (\S+)", said):
            why = f"it holds a {object_in_it[1]}, which would run code; save the state_dict alone"
        else:  # torch puts advice before what happened
            why = f"{type(error).__name__}: {one_line(said.rpartition('error:')[2].partition('Check the')[0])[:120]}"
        raise UserError(f"{path} cannot be read as plain tensors ({why})") from error


def tensors_of(content: Any, path: Path) -> tuple[dict[str, Tensor], list[Fate]]:
    """The state in a file's content, and what lay around it.

    Raises:
        UserError: there is none.
    """
    wrapper = next((key for key in ("model", "state_dict") if isinstance(content, Mapping) and key in content), None)
    state = content[wrapper] if wrapper else content
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no tensors under names, bare or as 'model' or 'state_dict'")
    around = [] if wrapper is None else [key for key in content if key != wrapper]
    around += [key for key, value in state.items() if not isinstance(value, Tensor)]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    real = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    return real, [Fate(str(key), "dropped", "no weights of the model") for key in around]


def read_decoder(path: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of a decoder.safetensors and its attention heads.

    Raises:
        UserError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            return load_file(path), int(file.metadata()["heads"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no decoder that `miram convert` wrote: {one_line(str(error))}") from error


# ---------------------------------------------------------------------------------------------- architecture


def identify(
    weights: Weights, config: HubConfig, architecture: str | None, path: Path
) -> tuple[EncoderCard, list[str]]:
    """The card of the encoder as it was, and sentences on what of it was guessed.

    Raises:
        UserError: it needs to be named.
    """
    state, name = weights.encoder, architecture or config.architecture
    if "patch_embed.proj.weight" not in state:
        first = ", ".join(fate.key for fate in weights.fates[:3])
        raise UserError(f"{path} is of no known layout (its keys begin {first}); see --help")
    if name is None:
        name, options, how = from_shapes(state, config, path)
    else:
        options, how = timms_options(config), "as it was named"
    base = name.partition(".")[0]
    mean, std, whence = statistics(weights, config, name if how == "as it was named" else None)
    options = {"in_chans": state["patch_embed.proj.weight"].shape[1], **options}
    card = card_for(base, source_size(weights, config, base), options, f"{path}, --architecture")
    notes = [f"read as {base} {options}, {how}", f"pixels were normalised with {whence}"]
    if config.layer_norm_eps != 1e-6:
        notes.append(f"its norms add {config.layer_norm_eps:g} to the variance, timm's add 1e-06")
    return replace(card, mean=mean, std=std), notes


def timms_options(config: HubConfig) -> dict[str, Any]:
    """What timm's model was built with, without what is ours to set; timm writes most of that into every folder."""
    ours = {*RESERVED, "in_chans", *([] if config.options.get("global_pool") == "token" else ["global_pool"])}
    return {key: value for key, value in config.options.items() if key not in ours}


def from_shapes(state: Mapping[str, Tensor], config: HubConfig, path: Path) -> tuple[str, dict[str, Any], str]:
    """timm's name and options for weights of these shapes, and how the heads, which no shape shows, were found.

    Raises:
        UserError: only its name can tell.
    """
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    name, *usual = USUAL.get(width, ("vit_base_patch16_224", 16, 12, 12))
    heads = config.num_attention_heads or (usual[2] if width in USUAL else width // 64)
    if "pos_embed" not in state or "cls_token" not in state or heads < 1 or width % heads:
        raise UserError(f"{path}: its shapes do not tell what it is; name it: --architecture=vit_small_patch16_dinov3")
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    positions = state["pos_embed"].shape[1]
    facts = {
        "patch_size": (patch, usual[0]),
        "embed_dim": (width, width if width in USUAL else 768),
        "depth": (len({key.split(".")[1] for key in state if key.startswith("blocks.")}), usual[1]),
        "num_heads": (heads, usual[2]),
        "mlp_ratio": (state["blocks.0.mlp.fc1.weight"].shape[0] / width, 4.0),
        "qkv_bias": ("blocks.0.attn.qkv.bias" in state, True),
        "init_values": (1e-5 if "blocks.0.ls1.gamma" in state else None, None),
        "reg_tokens": (registers, 0),
        "no_embed_class": (isqrt(positions) ** 2 == positions, False),
    }
    return (
        name,
        {key: value for key, (value, default) in facts.items() if value != default},
        whence_heads(heads, width, config),
    )


def whence_heads(heads: int, width: int, config: HubConfig) -> str:
    """How the number of heads was found, aloud where it may well be wrong."""
    if config.num_attention_heads:
        return "heads from config.json"
    if width in USUAL:
        return f"{heads} heads, as is usual at this width"
    return f"THE {heads} HEADS ARE A GUESS from the width; if they are others, name the model with --architecture"


def source_size(weights: Weights, config: HubConfig, name: str) -> tuple[int, int]:
    """Height and width that the positions belong to: from a config, else of a square.

    Raises:
        UserError: the positions are of no square.
    """
    positions, patch = weights.encoder.get("pos_embed"), weights.encoder["patch_embed.proj.weight"].shape[-1]
    sides = config.size or (0, 0)
    registers = weights.encoder["reg_token"].shape[1] if "reg_token" in weights.encoder else 0
    if positions is None:
        known = timm.get_pretrained_cfg(name)
        return sides if any(sides) or known is None else known.input_size[-2:]
    counts = [positions.shape[1] - prefix for prefix in (0, 1, 1 + registers)]
    if (sides[0] // patch) * (sides[1] // patch) in counts:
        return sides
    square = next((isqrt(count) for count in counts if isqrt(count) ** 2 == count), None)
    if square is None:
        raise UserError(f"its {positions.shape[1]} positions are of no square; a config.json with image_size is needed")
    return square * patch, square * patch


def statistics(
    weights: Weights, config: HubConfig, name: str | None
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and standard deviation of each channel that the weights were trained with, and where that is known from."""
    channels = weights.encoder["patch_embed.proj.weight"].shape[1]
    timms = config.pretrained_cfg
    known = timm.get_pretrained_cfg(name) if name else None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if config.image_mean and config.image_std:
        mean, std, whence = config.image_mean, config.image_std, "what preprocessor_config.json says"
    elif timms.mean and timms.std:
        mean, std, whence = timms.mean, timms.std, "what config.json says"
    elif known and not weights.is_mae:
        mean, std, whence = known.mean, known.std, f"what timm says of {name}"
    else:
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        whence = "ImageNet's mean, as MAE's are" if weights.is_mae else "ImageNet's mean, A GUESS: nothing tells"
    if channels == len(mean):
        return tuple(mean), tuple(std), whence
    return (fmean(mean),) * channels, (fmean(std),) * channels, whence


def built(card: EncoderCard, path: Path) -> Encoder:
    """The encoder of a card, untrained.

    Raises:
        UserError: timm cannot build it, or it is no plain ViT.
    """
    try:
        return build_encoder(card)
    except UserError as error:  # speaks of a configuration, which there is none of here
        raise UserError(f"{path}, --architecture: {str(error).removeprefix('model.encoder: ')}") from error


def load_into(vit: Encoder, weights: Weights, card: EncoderCard, path: Path) -> Encoder:
    """The encoder with the weights, each used and none missing.

    Raises:
        UserError: they are those of another architecture.
    """
    wanted, found = vit.state_dict().keys(), weights.encoder.keys()
    lacks, over = sorted(wanted - found), sorted(found - wanted)
    if lacks or over:
        raise UserError(
            f"{path} is no {card.architecture}: it lacks {some(lacks)} and has {some(over)}; "
            "name what it is with --architecture"
        )
    try:
        vit.load_state_dict(weights.encoder)
    except RuntimeError as error:
        raise UserError(
            f"{path} is no {card.architecture}: {one_line(str(error))[:300]}; see --architecture"
        ) from error
    return vit.eval()


def some(keys: list[str]) -> str:
    """The first few."""
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "") if keys else "nothing"
