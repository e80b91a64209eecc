"""`miram convert FILE OUT`: foreign weights in, an encoder of ours out.

OUT    encoder.safetensors  encoder.json  and, if there is a decoder, decoder.safetensors with the names it has in Miram

A grey picture gives the converted encoder's tokens what it gave the original's, three equal channels each with its own
mean and standard deviation: `encoder.set_channels` says how, and what a projection without
a bias loses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor

from ...engine.config import check
from ...engine.errors import UserError
from ...engine.files import sha256
from ...version import __version__
from ..config import ScaleSection
from ..encoder import EncoderCard, adapt, save_encoder
from ..miram import Miram
from .foreign import Source, read_source, some, understood, weights_file
from .layouts import DECODER, report, with_adaptations

FILES = ("decoder.safetensors", "encoder.json", "encoder.safetensors")


def convert(
    file: Path, out: Path, image_size: str | None = None, channels: int = 1, architecture: str | None = None
) -> list[str]:
    """Write an encoder of ours into OUT; returns a report that names every key of the file.

    Raises:
        UserError: the file cannot be read without running code, its layout or architecture is unknown, or OUT has one.
    """
    for name in FILES:
        if (out / name).exists():
            raise UserError(f"{out} already has {name}; name another folder")
    with understood(file):
        source = decoder_that_fits(read_source(file, architecture))
        decoder, averaged = with_channels(source, channels)
        size = parse_size(image_size) or source.vit.patch_embed.img_size
        fates = with_adaptations(source.fates, averaged | adapt(source.vit, size, channels))
    card = card_of(source, file, size, channels)
    write(out, source, decoder, card)
    totals = ", ".join(f"{sum(f.verdict == v for f in fates)} {v}" for v in ("taken", "adapted", "dropped"))
    statistics = f"mean {rounded(card.mean)}, standard deviation {rounded(card.std)}"
    fed = f"input: {channels} channel{'s' * (channels > 1)} of {size[0]} x {size[1]}, {statistics}"
    return [*source.notes, fed, *report(fates), f"{len(fates)} tensors: {totals}, none missing", f"wrote {out}"]


def card_of(source: Source, file: Path, size: tuple[int, int], channels: int) -> EncoderCard:
    """The card of the converted encoder; what is known of the training stays, also through several conversions."""
    config, before = cast(Any, source.vit).pretrained_cfg, source.card.provenance
    kwargs = source.card.kwargs | {"in_chans": channels, "img_size": list(size)}
    origin = {"file": file.name, "sha256": sha256(weights_file(file)), "miram": __version__}
    was = {"was": before["converted_from"]} if "converted_from" in before else {}
    provenance = before | {"converted_from": origin | was}
    return replace(source.card, kwargs=kwargs, mean=config["mean"], std=config["std"], provenance=provenance)


def write(out: Path, source: Source, decoder: Mapping[str, Tensor], card: EncoderCard) -> None:
    """All files beside their places, then into them, the encoder's last: what is there is whole and of one source."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".convert.") as folder:
        if decoder:
            save_file(dict(decoder), Path(folder) / FILES[0], metadata={"heads": str(source.decoder_heads)})
            (Path(folder) / FILES[0]).chmod(0o644)
        save_encoder(Path(folder), source.vit, card)
        for name in FILES if decoder else FILES[1:]:
            (Path(folder) / name).replace(out / name)


def decoder_that_fits(source: Source) -> Source:
    """The source, without its decoder if Miram's of scale 1 has other tensors; the fates say why."""
    try:
        why = misfit(source) if source.decoder else ""
    except UserError as error:  # of a section that cannot be
        why = str(error)
    if not why:
        return source
    fates = [
        replace(f, verdict="dropped", how=f"no decoder of ours: {why}", target="") if f.target in source.decoder else f
        for f in source.fates
    ]
    return replace(source, decoder={}, fates=fates, notes=[*source.notes, f"THE DECODER IS LEFT OUT: {why}"])


def misfit(source: Source) -> str:
    """How a decoder's tensors differ from those that Miram of its depth and width would have; empty if they do not.

    Raises:
        UserError: there is no such Miram.
    """
    blocks = {key.split(".")[3] for key in source.decoder if key.startswith(f"{DECODER}blocks.")}
    if not blocks or "mask_token" not in source.decoder:
        return "it lacks its blocks or its mask_token"
    shape = {"depth": len(blocks), "width": source.decoder["mask_token"].shape[-1], "heads": source.decoder_heads}
    state = Miram(source.vit, [check(ScaleSection, {"scale": 1, **shape}, "its shape")]).state_dict()
    wanted = {key: tensor.shape for key, tensor in state.items() if key.startswith(("mask_token", "decoder"))}
    found = {key: tensor.shape for key, tensor in source.decoder.items()}
    odd = sorted(key for key in wanted.keys() & found.keys() if wanted[key] != found[key])
    told = {"it lacks": wanted.keys() - found.keys(), "it has": found.keys() - wanted.keys(), "of other shape are": odd}
    return ", ".join(f"{how} {some(sorted(keys))}" for how, keys in told.items() if keys)


def rounded(values: tuple[float, ...]) -> str:
    """For the eye."""
    return ", ".join(f"{value:.4g}" for value in values)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "448" or "512x256", height first, as (height, width).

    Raises:
        UserError: it is neither.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise UserError(f"--image-size={text} is no size; write 448, or 512x256 for height and width")
    sides = [int(side) for side in text.split("x")]
    return sides[0], sides[-1]


def with_channels(source: Source, channels: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The decoder with a head for so many channels, and what was done to which tensor.

    A grey picture has the same in every channel, so the mean of the channels' predictions is what one predicts.
    """
    was, decoder = source.vit.patch_embed.proj.in_channels, dict(source.decoder)
    keys = [key for key in decoder if key.startswith(f"{DECODER}head.")] if channels != was else []
    for key in keys:
        one = decoder[key].reshape(-1, was, *decoder[key].shape[1:]).mean(1)
        decoder[key] = one.repeat_interleave(channels, 0)
    return decoder, dict.fromkeys(keys, f"predictions of {was} channels averaged")
