"""The tuning methods by name, and how one is put on an encoder."""

from __future__ import annotations

from typing import Any, cast

from ...engine.config import check
from ...engine.errors import UserError, did_you_mean
from ...pretrain.encoder import Encoder, weights_digest
from .adapters import AdaptFormer, Houlsby
from .base import MARK, Method, Tuned
from .dvpt import DVPT
from .lora_qkv import LoraQkv
from .low_rank import Dora, Ia3, Lora
from .mpl import MPL
from .plain import BitFit, Full, Linear, NormTuning
from .prompts import VPTDeep, VPTGated, VPTShallow
from .savit import Savit
from .ssf import SSF

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "linear": Linear,
    "bitfit": BitFit,
    "ln": NormTuning,
    "lora": Lora,
    "dora": Dora,
    "ia3": Ia3,
    "lora_qkv": LoraQkv,
    "houlsby": Houlsby,
    "adaptformer": AdaptFormer,
    "ssf": SSF,
    "vpt_shallow": VPTShallow,
    "vpt_deep": VPTDeep,
    "vpt_gated": VPTGated,
    "mpl": MPL,
    "dvpt": DVPT,
    "savit": Savit,
}


def apply(encoder: Encoder, method: str, **options: Any) -> Tuned:
    """Put a tuning method on an encoder, which is changed in place: give a deep copy if it is needed as it was.

    Args:
        encoder: a timm ViT (`miram.load_encoder`); its classifier, if any, is taken off.
        method: a key of METHODS.
        options: fields of the method's class.

    Raises:
        UserError: no such method or option, the method cannot stand on this encoder (which is then frozen and without
            its classifier), or one stands on it already.
    """
    chosen = read_method(method, options)
    prepare(encoder, method, chosen)
    return put_on(encoder, method, chosen)


def prepare(encoder: Encoder, name: str, method: Method) -> None:
    """Take an encoder's classifier off, if it has one.

    Raises:
        UserError: it is none that the method takes, or one stands on it already.
    """
    if not isinstance(encoder, method.encoders):
        kinds = " or ".join(kind.__name__ for kind in method.encoders)
        given = type(encoder)
        raise UserError(
            f"method {name} takes timm's {kinds} (miram.load_encoder), not {given.__module__}.{given.__name__}"
        )
    if already := getattr(encoder, MARK, None):
        raise UserError(
            f"the encoder is tuned with {already} already; merge that, or take the encoder as it was loaded"
        )
    if encoder.num_classes:
        encoder.reset_classifier(0)


def put_on(encoder: Encoder, name: str, method: Method) -> Tuned:
    """A method on an encoder that was prepared for it, in the mode, training or not, that the encoder is in.

    Raises:
        UserError: the method cannot stand on this encoder.
    """
    shape, base = method.shape(encoder), describe(encoder)
    encoder.requires_grad_(False)
    model = method.attach(encoder)
    setattr(encoder, MARK, name)
    return Tuned(name, method, model, shape, base).train(encoder.training)


def read_method(name: str, options: dict[str, Any]) -> Method:
    """A method with its options checked.

    Raises:
        UserError: no such method or option.
    """
    if name not in METHODS:
        raise UserError(f"there is no tuning method {name!r}{did_you_mean(name, list(METHODS))}")
    try:
        return check(METHODS[name], options, f"options of {name}")
    except TypeError as error:
        raise UserError(f"options of {name}: {error}; give plain numbers, words and lists") from error


def describe(encoder: Encoder) -> dict[str, Any]:
    """What an adapter says of the encoder it was made for."""
    config = cast(Any, encoder).pretrained_cfg
    embed = encoder.patch_embed
    return {
        "architecture": config.get("architecture") or type(encoder).__name__,
        "heads": next(part.num_heads for part in encoder.modules() if hasattr(part, "num_heads")),
        "image_size": list(embed.img_size),
        "channels": embed.proj.in_channels,
        "digest": weights_digest(encoder),
    }
