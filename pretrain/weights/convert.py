"""`miram convert FILE OUT`: foreign weights in, an encoder of ours out.

OUT    encoder.safetensors  encoder.json  and, if there is a decoder, decoder.safetensors with the names it has in Miram

A grey picture gives the converted encoder's tokens what it gave the original's, three equal channels each with its own
mean and standard deviation: `encoder.set_channels` says how.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor

from ...engine.errors import UserError
from ...engine.files import sha256
from ...version import __version__
from ..encoder import save_encoder
from .foreign import Source, read_source, weights_file
from .layouts import DECODER, report, with_adaptations
from .start import adapt


def convert(
    file: Path, out: Path, image_size: str | None = None, channels: int = 1, architecture: str | None = None
) -> list[str]:
    """Write an encoder of ours into OUT; returns a report that names every key of the file.

    Raises:
        UserError: the file cannot be read without running code, its layout or architecture is unknown, or OUT has one.
    """
    if (out / "encoder.safetensors").exists():
        raise UserError(f"{out} already has an encoder; name another folder")
    source = read_source(file, architecture)
    vit, (decoder, averaged) = source.vit, with_channels(source, channels)
    size = parse_size(image_size) or vit.patch_embed.img_size
    fates = with_adaptations(source.fates, averaged | adapt(vit, size, channels))
    config = cast(Any, vit).pretrained_cfg
    kwargs = source.card.kwargs | {"in_chans": channels, "img_size": list(size)}
    origin = {"file": file.name, "sha256": sha256(weights_file(file)), "miram": __version__}
    provenance = source.card.provenance | {"converted_from": origin}
    card = replace(source.card, kwargs=kwargs, mean=config["mean"], std=config["std"], provenance=provenance)
    out.mkdir(parents=True, exist_ok=True)
    if decoder:
        save_file(decoder, out / "decoder.safetensors", metadata={"heads": str(source.decoder_heads)})
        (out / "decoder.safetensors").chmod(0o644)
    save_encoder(out, vit, card)
    totals = ", ".join(f"{sum(f.verdict == v for f in fates)} {v}" for v in ("taken", "adapted", "dropped"))
    statistics = f"mean {rounded(card.mean)}, standard deviation {rounded(card.std)}"
    fed = f"input: {channels} channel{'s' * (channels > 1)} of {size[0]} x {size[1]}, {statistics}"
    return [*source.notes, fed, *report(fates), f"{len(fates)} tensors: {totals}, none missing", f"wrote {out}"]


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
