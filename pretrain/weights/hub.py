"""What a folder of the Hugging Face hub says of its weights: config.json, and preprocessor_config.json if it is there.

of transformers   {"model_type", "image_size", "num_attention_heads", "hidden_act", "layer_norm_eps", …}
                  {"image_mean", "image_std", …}
of timm           {"architecture", "model_args": {…}, "pretrained_cfg": {"input_size", "mean", "std", …}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from ...engine.config import Section, check
from ...engine.errors import UserError

NAMES = ("model.safetensors", "pytorch_model.bin")  # of weights in a folder of the hub
Values = tuple[float, ...]
Deviations = tuple[PositiveFloat, ...]
Size = Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=2)]


def refuse_half(mean: Values | None, std: Values | None) -> None:
    """Mean and standard deviation come together.

    Raises:
        ValueError: there is one of them, or they have different lengths.
    """
    if len(mean or ()) != len(std or ()):
        raise ValueError("mean and standard deviation must both be there, for as many channels")


class Told(Section):
    """A part of the two files that matters here; there is much more in them."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class TimmsTold(Told):
    """How timm's weights were trained."""

    input_size: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=3)] | None = None
    mean: Values | None = None
    std: Deviations | None = None

    @model_validator(mode="after")
    def _both(self) -> TimmsTold:
        refuse_half(self.mean, self.std)
        return self


class TimmsOptions(Told):
    """What timm's model was built with; all else goes on to timm."""

    model_config = ConfigDict(extra="allow")

    img_size: PositiveInt | Size | None = None


class HubConfig(Told):
    """Both files together; empty if there are none."""

    model_type: str = ""
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: PositiveFloat = 1e-6
    image_size: PositiveInt | Size | None = None
    num_attention_heads: PositiveInt | None = None
    decoder_num_attention_heads: PositiveInt = 16
    image_mean: Values | None = None
    image_std: Deviations | None = None
    architecture: str | None = None
    model_args: TimmsOptions = TimmsOptions()
    pretrained_cfg: TimmsTold = TimmsTold()

    @model_validator(mode="after")
    def _both(self) -> HubConfig:
        refuse_half(self.image_mean, self.image_std)
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the input."""
        told = self.image_size or self.model_args.img_size or (self.pretrained_cfg.input_size or ())[-2:]
        return (told, told) if isinstance(told, int) else (told[0], told[1]) if told else None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for timm."""
        return dict(self.model_args.model_extra or {})


def read_config(file: Path) -> HubConfig:
    """What a folder of the hub says, named as a folder or by its weights; nothing of files that lie beside others.

    Raises:
        UserError: one of its files is not JSON, or says what cannot be.
    """
    found: dict[str, Any] = {}
    if not file.is_dir() and file.name not in NAMES:
        return HubConfig()
    folder = file if file.is_dir() else file.parent
    paths = [folder / name for name in ("config.json", "preprocessor_config.json") if (folder / name).is_file()]
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} cannot be read as JSON ({error})") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} is no object of keys and values")
        found |= content
    known = {key: value for key, value in found.items() if value is not None}
    return check(HubConfig, known, str(folder / "config.json"))
