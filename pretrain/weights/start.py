"""A start for training: weights of another run, of a converted file or of timm, put into the encoder and decoder.

INIT/encoder.safetensors   what `miram pretrain` and `miram convert` write
INIT/decoder.safetensors   of `miram convert`, if the file had a decoder: mask_token, decoder_embed.*, decoders.1.*;
                           its attention heads are in the metadata
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ...engine.errors import UserError, one_line
from ..encoder import Encoder, adapt, load_ours
from .foreign import read_decoder
from .layouts import DECODER, Fate, report, superfluous, with_adaptations
from .loading import load_timm


def initialise_encoder(vit: Encoder, init: str) -> list[str]:
    """Give an encoder the weights of another of the same architecture, at its own image size and channels.

    `init` is a run folder, an encoder.safetensors (also a converted one) or timm:NAME. Positions stay fixed, as in MAE,
    also where the source learnt them: they are its own, interpolated to this grid. The source's normalisation is
    used to make the channels equal to one (see `set_channels`) and then forgotten: training normalises with the mean
    and standard deviation of its own data, which bring pictures to the range the weights know.

    Returns:
        Lines of a report that names every key.

    Raises:
        UserError: there is no such source, or its architecture is another.
    """
    source = load_timm(init.removeprefix("timm:")) if init.startswith("timm:") else load_ours(init)[0]
    theirs, ours = outline(source), outline(vit)
    if theirs != ours:
        raise UserError(f"init {init} is {theirs}, model.encoder is {ours}; set model.encoder to what init is")
    adapted = adapt(source, vit.patch_embed.img_size, vit.patch_embed.proj.in_channels)
    state = source.state_dict()
    fates = [
        Fate(key, "dropped", why) if (why := superfluous(key, "")) else Fate(key, "taken", target=key) for key in state
    ]
    try:
        vit.load_state_dict({fate.key: state[fate.key] for fate in fates if fate.target})
    except RuntimeError as error:
        raise UserError(f"init {init} does not fit model.encoder: {one_line(str(error))}") from error
    return [f"init {init}: {theirs}", *report(with_adaptations(fates, adapted))]


def outline(vit: Encoder) -> str:
    """What two encoders must share for weights to pass between them."""
    heads, rope = cast(Any, vit.blocks[0]).attn.num_heads, getattr(vit, "rope", None)
    facts = [
        f"{len(vit.blocks)} blocks of {vit.embed_dim} with {heads} heads",
        f"patches of {vit.patch_embed.patch_size[0]} pixels",
        f"{vit.num_prefix_tokens} prefix token{'s' * (vit.num_prefix_tokens != 1)}",
        *([f"{type(rope).__name__} positions"] if rope is not None else []),
    ]
    return ", ".join(facts)


def initialise_decoder(model: nn.Module, init: str) -> list[str]:
    """Give Miram's decoder of scale 1 the weights in the decoder.safetensors beside `init`, if there are and they fit.

    Returns:
        One line that says what was done; none if there is no such file.

    Raises:
        UserError: the file is no decoder of ours.
    """
    path = (Path(init) if Path(init).is_dir() else Path(init).parent) / "decoder.safetensors"
    if init.startswith("timm:") or not path.is_file():
        return []
    state, heads = read_decoder(path)
    ours = {k: v for k, v in model.state_dict().items() if k.startswith(("mask_token", "decoder_embed.", DECODER))}
    blocks = [m for k, m in model.named_modules() if k.startswith(f"{DECODER}blocks.") and k.endswith(".attn")]
    fits = {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in state.items()}
    if not fits or {getattr(block, "num_heads", None) for block in blocks} != {heads}:
        return [f"init {path}: not used; the decoder of scale 1 would have to be {describe(state, heads)}"]
    model.load_state_dict(state, strict=False)
    return [f"init {path}: taken by the decoder of scale 1 ({describe(state, heads)})"]


def describe(state: Mapping[str, Tensor], heads: int) -> str:
    """A decoder in a few words."""
    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    return f"softmax, depth {depth}, width {state['mask_token'].shape[-1]}, heads {heads}"
