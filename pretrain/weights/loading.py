"""Encoders by name: whatever a probe, a table or a tuning method is told to stand on.

RUN, encoder.safetensors     what `miram pretrain` and `miram convert` wrote
x.safetensors, hub folder    of others, read as `miram convert` reads them
timm:NAME, or bare NAME      timm's own weights
random, random:NAME          no training at all
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any, Literal, cast

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from ...engine.errors import UserError, one_line
from ...engine.files import sha256
from ..encoder import Encoder, EncoderCard, adapt, build_encoder, card_for, find_card, initialise, set_image_size
from .foreign import Source, is_ours, read_source, understood, weights_file
from .hub import NAMES
from .layouts import Fate, report, superfluous, with_adaptations

UNTRAINED = "vit_small_patch16_224"  # what plain `random` is
Kind = Literal["ours", "foreign", "timm", "random"]
Size = int | tuple[int, int]


def load_encoder(path_or_name: str | Path, image_size: Size | None = None, channels: int | None = None) -> Encoder:
    """An encoder in eval mode, without a head.

    Args:
        path_or_name: RUN, encoder.safetensors (also a converted one), a .safetensors or hub folder of others,
            `timm:NAME` or a bare name of timm's, `random` or `random:NAME`.
        image_size: side, or height and width, of its input: positions are interpolated. None: its own.
        channels: of its input, adapted so that grey pictures give what they gave. None: those of an encoder of
            ours, else 1.

    Raises:
        UserError: nothing is there, it needs `miram convert` first, or a weight is missing or without a use.
    """
    vit, lines = read_encoder(path_or_name, image_size, channels)
    for line in lines:
        if "GUESS" in line:  # heads or statistics that a foreign file does not tell
            warnings.warn(line, stacklevel=2)
    return vit


def read_encoder(
    path_or_name: str | Path, image_size: Size | None = None, channels: int | None = None
) -> tuple[Encoder, list[str]]:
    """`load_encoder`, and the lines of a report that names every key.

    Raises:
        UserError: as `load_encoder`.
    """
    kind, name = recognise(path_or_name)
    if kind == "random":
        return random_like(path_or_name, 0, image_size, channels), [f"random:{name}: untrained, no weights were read"]
    source = timms_source(name) if kind == "timm" else source_of(name)
    size, channels = input_of(source.card, kind, image_size, channels)
    fates = with_adaptations(without_decoder(source), adapt(source.vit, size, channels))
    totals = Counter(fate.verdict for fate in fates)
    counted = ", ".join(f"{totals[verdict]} {verdict}" for verdict in ("taken", "adapted", "dropped"))
    return source.vit, [*source.notes, *report(fates), f"{len(fates)} tensors: {counted}, none missing"]


def recognise(path_or_name: str | Path) -> tuple[Kind, str]:
    """What kind of encoder a name means, and its path or timm's name. A `Path` is never a name.

    Raises:
        UserError: none that can be loaded.
    """
    name = str(path_or_name)
    if isinstance(path_or_name, str):
        prefix, colon, rest = name.partition(":")
        if colon and prefix in ("timm", "random"):
            return cast(Kind, prefix), rest
        if name == "random":
            return "random", UNTRAINED
    path = Path(name)
    if is_ours(path):
        return "ours", name
    if path.exists() and not (path / "encoder.safetensors").is_file() and is_foreign(path):
        return "foreign", name
    if isinstance(path_or_name, str) and not path.exists() and timm.is_model(name):
        return "timm", name
    find_card(name)  # says why not
    raise AssertionError(f"{name} is an encoder of ours after all")


def is_foreign(path: Path) -> bool:
    """Whether there are weights of others, which can be read without `miram convert`.

    Raises:
        UserError: there are, which cannot.
    """
    found = [path / name for name in NAMES if (path / name).is_file()] if path.is_dir() else [path]
    if found and found[0].suffix != ".safetensors":
        raise UserError(f"{found[0]} is no file of plain tensors: run {conversion(path)}")
    return bool(found)


def conversion(path: Path) -> str:
    """The command that makes an encoder of ours of a file, and how to go on."""
    file, out = quote(str(path)), quote(str(path.with_name(f"{path.stem}-encoder")))
    return f"`miram convert {file} {out}` and name {out}"


def input_of(
    card: EncoderCard, kind: Kind, image_size: Size | None, channels: int | None
) -> tuple[tuple[int, int], int]:
    """Height, width and channels that are wanted of an encoder's input.

    Raises:
        UserError: there can be no such input.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size or card.image_size
    if channels is None:
        channels = card.kwargs["in_chans"] if kind == "ours" else 1
    if min(*size, channels) < 1:
        raise UserError(f"no encoder takes {channels} channels of {size[0]} x {size[1]}")
    return (size[0], size[1]), channels


def source_of(name: str) -> Source:
    """What `miram convert` would read.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with understood(Path(name)):
            return read_source(Path(name), None)
    except UserError as error:
        option = f", an option of {conversion(Path(name))}" if "--architecture" in str(error) else ""
        raise UserError(f"{error}{option}") from error


def without_decoder(source: Source) -> list[Fate]:
    """The fates of a file's tensors where only the encoder is wanted."""
    dropped: dict[str, Any] = {"verdict": "dropped", "how": "of the decoder, which is not asked for", "target": ""}
    return [replace(fate, **dropped) if fate.target in source.decoder else fate for fate in source.fates]


# ---------------------------------------------------------------------------------------------- timm's own


def load_timm(name: str) -> Encoder:
    """timm's own weights as they are, in eval mode, without a head.

    Raises:
        UserError: they cannot be had, do not fit key by key, or are those of no plain ViT.
    """
    return timms_source(name).vit


def timms_source(name: str) -> Source:
    """timm's own weights, as those of a foreign file would be.

    Raises:
        UserError: as `load_timm`.
    """
    try:  # with the head they came with: told to leave it out, timm no longer minds which keys are missing
        vit = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub, the network or timm raise: the user's to mend
        raise UserError(
            f"timm:{name} could not be had ({one_line(str(error))[:300]}); is the name right and the network up?"
        ) from error
    keys = list(vit.state_dict())
    encoder = without_head(vit, f"timm:{name}").eval()
    left = encoder.state_dict().keys()
    fates = [
        Fate(key, "taken", target=key) if key in left else Fate(key, "dropped", superfluous(key, "")) for key in keys
    ]
    return Source(encoder, timms_card(encoder, name), fates, notes=[f"timm:{name}"])


def without_head(vit: nn.Module, name: str) -> Encoder:
    """timm's model as an encoder, changed in place.

    Raises:
        UserError: it is no plain ViT.
    """
    if not isinstance(vit, Encoder) or type(vit.patch_embed) is not PatchEmbed:
        raise UserError(f"{name} is no plain ViT; choose one of timm's vit_… models, e.g. {UNTRAINED}")
    vit.reset_classifier(0)
    return vit


def timms_card(vit: Encoder, name: str) -> EncoderCard:
    """The card that a model of timm's would have."""
    config = cast(Any, vit).pretrained_cfg
    kwargs = {"in_chans": vit.patch_embed.proj.in_channels, "num_classes": 0, "img_size": vit.patch_embed.img_size}
    return EncoderCard(architecture=name, kwargs=kwargs, mean=tuple(config["mean"]), std=tuple(config["std"]))


# ---------------------------------------------------------------------------------------------- without training


def random_like(
    path_or_name: str | Path, seed: int, image_size: Size | None = None, channels: int | None = None
) -> Encoder:
    """An encoder of the same shape and input as `load_encoder` gives, as it is before any training.

    Raises:
        UserError: nothing is there.
    """
    kind, name = recognise(path_or_name)
    if kind == "timm":
        return timms_untrained(name, seed, image_size, channels)
    card = card_of(kind, name)
    size, channels = input_of(card, kind, image_size, channels)
    torch.manual_seed(seed)
    vit = build_encoder(card_with(card, size, channels))
    set_image_size(vit, size)  # refuses a size that patches do not fill; changes nothing
    return vit.eval()


def timms_untrained(name: str, seed: int, image_size: Size | None, channels: int | None) -> Encoder:
    """A model of timm's without its weights, matrices as MAE draws them."""
    torch.manual_seed(seed)
    vit = without_head(timm.create_model(name), f"timm:{name}")
    adapt(vit, *input_of(timms_card(vit, name), "timm", image_size, channels))
    initialise(vit)
    return vit.eval()


def card_of(kind: Kind, name: str) -> EncoderCard:
    """What an encoder is before it is given another input.

    Raises:
        UserError: it is no encoder, or one that cannot be built untrained.
    """
    if kind == "ours":
        return find_card(name)[1]
    if kind == "foreign":
        return source_of(name).card
    config = timm.get_pretrained_cfg(name.partition(".")[0])
    size = config.input_size[-2:] if config else (224, 224)
    return card_for(name, size, {}, f"random:{name}")


def card_with(card: EncoderCard, size: tuple[int, int], channels: int) -> EncoderCard:
    """The card for another input: of several channels' statistics the mean, as `set_channels` has it."""
    kwargs = card.kwargs | {"in_chans": channels, "img_size": list(size)}
    if channels == card.kwargs["in_chans"]:
        return replace(card, kwargs=kwargs)
    return replace(card, kwargs=kwargs, mean=(fmean(card.mean),) * channels, std=(fmean(card.std),) * channels)


# ---------------------------------------------------------------------------------------------- what is known of one


def read_provenance(path_or_name: str | Path) -> dict[str, Any]:
    """What an encoder of ours was trained on; nothing is known of others.

    Raises:
        UserError: there is no such encoder.
    """
    kind, name = recognise(path_or_name)
    return find_card(name)[1].provenance if kind == "ours" else {}


def encoder_digest(path_or_name: str | Path) -> str:
    """Changes when the weights do; timm's are known by their name.

    Raises:
        UserError: there is no such encoder.
    """
    kind, name = recognise(path_or_name)
    if kind in ("timm", "random"):
        return f"{kind}:{name}"
    return sha256(find_card(name)[0] if kind == "ours" else weights_file(Path(name)))
