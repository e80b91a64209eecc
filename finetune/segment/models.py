"""The segmenters by name, their options, and how one is built."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from ...engine.config import Section, check
from ...engine.errors import UserError, did_you_mean
from ..peft.base import Tuned
from . import decoders
from .decoders import EncoderDecoder
from .taps import Taps
from .unet import UNet as UNetModule

RARE = 0.01  # probability of all foreground together, before anything is learnt


class Model(Section):
    """A segmenter: its fields are its options."""

    encoder: ClassVar[bool] = False  # whether it reads a pretrained one

    def make(self, tuned: Tuned | None, in_chans: int, num_classes: int, zeroed: bool) -> nn.Module:
        """The module: images (B, in_chans, H, W) -> logits (B, num_classes, H, W).

        Raises:
            UserError: options that do not go together, or do not fit the encoder.
        """
        raise NotImplementedError


class OnEncoder(Model):
    """A decoder on the maps of an encoder."""

    encoder: ClassVar[bool] = True
    decoder: ClassVar[Callable[..., nn.Module]]

    layers: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = None
    """the four blocks that the decoder reads, from 0; null: evenly spaced, the last among them"""

    def make(self, tuned: Tuned | None, in_chans: int, num_classes: int, zeroed: bool) -> nn.Module:
        """The encoder, its taps and the decoder."""
        assert tuned is not None
        shape, options = tuned.shape, self.model_dump(exclude={"layers"})
        assert in_chans == shape.C, f"images of {in_chans} channels for an encoder of {shape.C}"
        taps = Taps(tuned, self.layers, zeroed)
        return EncoderDecoder(taps, self.decoder(shape.D, (shape.p, shape.p), in_chans, num_classes, **options))


class Linear(OnEncoder):
    """A linear classifier of patches, to judge the encoder's features themselves."""

    decoder = decoders.Linear


class Light(OnEncoder):
    """Maps and convolutions of the image, enlarged level by level; the default."""

    decoder = decoders.Light

    width: Annotated[int, Field(ge=8, le=4096)] = 320
    """channels on the grid of patches; finer levels have fewer"""


class Unetr(OnEncoder):
    """UNETR's decoder; patches of 16 pixels only."""

    decoder = decoders.Unetr

    feature_size: Annotated[int, Field(ge=1, le=1024)] = 32
    """channels at full size; 2, 4 and 8 times as many at the levels below"""


Sizes = tuple[PositiveInt, PositiveInt, PositiveInt]


class MDSAUNet(Model):
    """MDSA-UNet, a network of its own: `mdsa_unet.py` says what each switch is."""

    released: bool = False
    """all switches below that are not given as in the authors' release"""
    mlp_ratios: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (2, 2, 2)
    """hidden width of each stage's gated MLP, as a multiple; [3, 2, 2] for the article's 6.65 M numbers"""
    dims: Sizes = (128, 320, 512)
    """channels of the stages"""
    depths: Sizes = (1, 1, 1)
    """blocks of the stages"""
    topks: Sizes = (1, 4, 16)
    """windows that a window attends to"""
    head_dim: PositiveInt = 32
    """channels of a head"""
    windows: PositiveInt | Literal["auto"] = "auto"
    """a side; auto: one for every 32 pixels (released: 7)"""
    scale: Literal["head", "dim"] = "head"
    """what logits of attention are divided by the root of (released: dim)"""
    drop: Literal["path", "dropout"] = "path"
    """whole branches of an image, or numbers of a branch (released: dropout)"""
    rate: float = Field(default=0.1, ge=0, lt=1)
    """chance of either"""
    norm: Literal["group", "batch"] = "group"
    """after convolutions (released: batch)"""
    qkv: Literal["shared", "learned"] = "shared"
    """queries, keys and values are one map (released), or a linear layer's"""
    padding: Literal["edge", "zero", "none"] = "edge"
    """where windows do not divide the image (released: none)"""

    def make(self, tuned: Tuned | None, in_chans: int, num_classes: int, zeroed: bool) -> nn.Module:
        """The network; what is not given stays with its own defaults."""
        from .mdsa_unet import MDSAUNet as Module

        given = {name: getattr(self, name) for name in self.model_fields_set - {"released"}}
        return (Module.released if self.released else Module)(in_chans, num_classes, **given)


class UNet(Model):
    """The convolutional baseline, a network of its own."""

    channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (32, 64, 128, 256, 512)
    """of the five levels, from full size to 1/16"""

    def make(self, tuned: Tuned | None, in_chans: int, num_classes: int, zeroed: bool) -> nn.Module:
        """The network."""
        return UNetModule(in_chans, num_classes, self.channels)


MODELS: dict[str, type[Model]] = {"linear": Linear, "light": Light, "unetr": Unetr, "mdsa_unet": MDSAUNet, "unet": UNet}
NEEDS_ENCODER = frozenset(name for name, model in MODELS.items() if model.encoder)


def read_model(name: str, options: dict[str, Any]) -> Model:
    """A model with its options checked.

    Raises:
        UserError: no such model or option.
    """
    if name not in MODELS:
        raise UserError(f"there is no segmenter {name!r}{did_you_mean(name, list(MODELS))}")
    try:
        return check(MODELS[name], options, f"segment.model_options of {name}")
    except TypeError as error:
        raise UserError(f"segment.model_options of {name}: {error}; give plain numbers, words and lists") from error


def build(
    name: str,
    options: dict[str, Any],
    tuned: Tuned | None,
    in_chans: int,
    num_classes: int,
    zeroed: bool = False,
    rare: bool = True,
) -> nn.Module:
    """A segmenter: images (B, in_chans, H, W) -> logits (B, num_classes, H, W).

    Args:
        name: a key of MODELS.
        options: fields of the model's class.
        tuned: the encoder with its method, of the models in NEEDS_ENCODER.
        in_chans: channels of the image, and of the encoder.
        num_classes: K >= 2, background first.
        zeroed: the control: the decoder is given zeros for maps.
        rare: foreground is, as lesions are; tissues are not.

    Raises:
        UserError: no such model or option, an encoder too many or too few, or one that the model cannot read.
    """
    assert num_classes >= 2, "background is a class"
    chosen = read_model(name, options)
    if chosen.encoder and tuned is None:
        raise UserError(f"{name} decodes what an encoder sees: name an encoder, or choose mdsa_unet or unet")
    if not chosen.encoder and (tuned or zeroed):
        raise UserError(f"{name} is a network of its own: name no encoder and no control without one, or choose light")
    model = chosen.make(tuned, in_chans, num_classes, zeroed)
    return start_rare(model, num_classes) if rare else model


def start_rare(model: nn.Module, num_classes: int) -> nn.Module:
    """Let every pixel begin as foreground with probability 0.01, shared by its classes (Lin et al. 2017, section 4.1).

    Else the first steps go into saying that nearly all is background, loudly enough to undo what was pretrained.
    """
    *_, last = (part for part in model.modules() if isinstance(part, nn.Conv2d))
    assert last.out_channels == num_classes
    assert last.bias is not None
    nn.init.normal_(last.weight, std=0.01)
    nn.init.constant_(last.bias, log(RARE / (num_classes - 1)))
    last.bias.data[0] = log(1 - RARE)
    return model
