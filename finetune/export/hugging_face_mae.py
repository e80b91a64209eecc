"""A pretraining with one plain scale as ViTMAEForPreTraining: encoder and decoder, in OUT/mae.

Our names and those of transformers:
    encoder.*                          vit.*    (hugging_face_vit.py)
    mask_token  decoder_embed          decoder.{mask_token,decoder_embed}
    decoders.1.{blocks.N.*,norm,head}  decoder.{decoder_layers.N.*,decoder_norm,decoder_pred}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...engine.checkpoint import newest
from ...engine.config import check
from ...engine.errors import UserError
from ...pretrain.build import build_miram
from ...pretrain.config import PretrainConfig
from ...pretrain.encoder import Encoder
from ...pretrain.masking import random_masking
from ...pretrain.miram import Miram
from .hugging_face_vit import WEIGHTS, of_blocks, read, renamed, save, shape_of
from .licences import settings_of
from .parity import BATCHES, TOLERANCE, difference, noise, within
from .source import Source
from .timm_folder import plain

MAE_FILES = ("mae/config.json", f"mae/{WEIGHTS}")


class NoMae(Exception):
    """Why transformers cannot hold a pretraining."""


@dataclass(frozen=True)
class Pretrained:
    """A pretraining of one plain scale, with the weights that it ended with."""

    settings: PretrainConfig
    model: Miram


def write_mae(source: Source, folder: Path) -> dict[str, Any]:
    """Write ViTMAEForPreTraining, and see by the same noise that it predicts what ours does.

    Returns:
        For export.json: the largest difference of predicted patches, and notes.

    Raises:
        NoMae: there is no such pretraining, or transformers' would compute something else.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    ours = pretrained(source)
    section, scale = ours.settings.model, ours.settings.model.scales[0]
    assert source.vit is not None
    shape = shape_of(source.vit)
    if not shape["qkv_bias"]:  # one setting there for both
        raise NoMae("its decoder's queries and keys have biases, its encoder's have none")
    shape |= {
        "mask_ratio": section.mask_ratio,
        "norm_pix_loss": section.norm_pix,
        "decoder_hidden_size": scale.width,
        "decoder_num_hidden_layers": scale.depth,
        "decoder_num_attention_heads": scale.heads,
        "decoder_intermediate_size": 4 * scale.width,
    }
    model: Any = ViTMAEForPreTraining(ViTMAEConfig(**shape))
    model.load_state_dict(dict(renamed_mae(source.vit, ours.model)))
    place = folder / "mae"
    save(model, place)
    off, most = compared(ours.model.eval(), read(ViTMAEForPreTraining, place), source)
    if not within(off, most, TOLERANCE, {}).holds:
        rmtree(place)
        raise NoMae(f"its predictions differ by {off:.3g} from ours")
    return {"largest_difference": off, "notes": list(losses(ours.settings))}


def pretrained(source: Source) -> Pretrained:
    """The pretraining behind an encoder, if it is one that transformers knows.

    Raises:
        NoMae: it is not, or its weights are no longer there.
    """
    if source.kind != "encoder" or source.home is None or not (tree := settings_of(source.home)):
        raise NoMae("only a run of `miram pretrain` has a decoder")
    tree.pop("distill", None)
    try:
        settings = check(PretrainConfig, tree, "config.yaml")
    except UserError as error:
        raise NoMae("the run's configuration is of no pretraining that is known here") from error
    if why := unlike_mae(settings):
        raise NoMae(why)
    return Pretrained(settings, with_weights(source, settings))


def unlike_mae(settings: PretrainConfig) -> str:
    """In what a pretraining differs from MAE as transformers has it; nothing where it does not."""
    model, (scale, *others) = settings.model, settings.model.scales
    height, width = model.size
    if settings.objective != "miram":
        return f"{settings.objective} has no decoder"
    if others or scale.scale != 1:
        return f"it reconstructs the scales {', '.join(str(s.scale) for s in model.scales)}, and MAE has scale 1 alone"
    if scale.attention != "softmax" or scale.decode_fraction < 1 or model.mask_unit > 1:
        return "its decoder is none of MAE's: another attention, tiles, or patches hidden in groups"
    return "" if height == width else f"transformers' MAE takes square images, and these are {height} x {width}"


def with_weights(source: Source, settings: PretrainConfig) -> Miram:
    """The masked autoencoder as its newest sound checkpoint has it.

    Raises:
        NoMae: there is none, or it holds another encoder than the run gave.
    """
    assert source.vit is not None
    assert source.home is not None
    path, _ = newest(source.home / "checkpoints")
    if path is None:
        raise NoMae("the run's checkpoints are no longer there, and the decoder was in them")
    model = build_miram(settings.model, plain(source, "hf"))
    try:
        state = load_file(path / "model.safetensors")
        state |= load_file(path / "ema.safetensors") if (path / "ema.safetensors").is_file() else {}
        own = {name: state[name].reshape(tensor.shape) for name, tensor in model.state_dict().items()}
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise NoMae("its checkpoint holds other tensors than a masked autoencoder") from error
    given = source.vit.state_dict()
    if any(difference(own[f"encoder.{name}"], tensor) > 0 for name, tensor in given.items()):
        raise NoMae("the newest checkpoint is of another step than the encoder")
    model.load_state_dict(own)
    return model


def renamed_mae(vit: Encoder, model: Miram) -> Iterator[tuple[str, Tensor]]:
    """Encoder and decoder under transformers' names."""
    yield from ((f"vit.{name}", tensor) for name, tensor in renamed(vit))
    state = model.state_dict()
    yield "decoder.mask_token", state["mask_token"]
    yield "decoder.decoder_pos_embed", model.decoder_of(model.scales[0]).pos_embed
    for theirs, ours in (("embed", "decoder_embed"), ("norm", "decoders.1.norm"), ("pred", "decoders.1.head")):
        yield from ((f"decoder.decoder_{theirs}.{end}", state[f"{ours}.{end}"]) for end in ("weight", "bias"))
    yield from of_blocks(state, "decoders.1.blocks.", "decoder.decoder_layers.")


@torch.inference_mode()
def compared(ours: Miram, theirs: Any, source: Source) -> tuple[float, float]:
    """The largest difference between predicted patches where the same are hidden, and the largest prediction."""
    off, most = 0.0, 0.0
    for count in BATCHES:
        images = noise(count, source.channels, source.image_size)
        order = torch.rand(count, len(ours.units), generator=torch.Generator().manual_seed(count))
        ids_keep, _ = random_masking(order, ours.mask_ratio)
        (wanted,) = ours.reconstruct(images, ids_keep)
        off = max(off, difference(wanted, theirs(images, noise=order).logits))
        most = max(most, float(wanted.abs().max()))
    return off, most


def losses(settings: PretrainConfig) -> Iterator[str]:
    """In what the loss that transformers computes is another than that of the training."""
    model, scale = settings.model, settings.model.scales[0]
    yield "FOLDER/mae predicts what the pretraining did; its loss is that of MAE."
    if model.norm_pix:
        yield (
            f"Its targets add 1e-6 to a patch's variance, the training added {model.variance_floor:g}: losses of flat "
            "patches differ."
        )
    if scale.loss_on == "all" or model.tissue_loss:
        yield "It averages over hidden patches, all alike; the training weighted patches otherwise."
