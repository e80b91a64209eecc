"""A tuned encoder on disk: what learnt, the head, and which encoder it belongs on.

FOLDER/adapter.safetensors    the tensors that learnt, by their names in the model; of lora, dora and ia3 instead
FOLDER/adapter_model.safetensors + adapter_config.json    as the peft library writes and reads them
FOLDER/head.safetensors       weight (classes, D) and bias (classes,), if there is a head
FOLDER/adapter.json           {"schema", "method", "options", "base": {"architecture", "heads", "image_size",
                              "channels", "digest"}, "classes": 2 or null, "trainable", "frozen", "expected",
                              "files": {NAME: sha256}}, written last

A folder that peft wrote has no adapter.json: it is read too, without a check of the encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ...engine.errors import UserError
from ...engine.files import make_folder, read_json, sha256, write_json
from ...engine.tensors import read_into
from ...pretrain.encoder import Encoder
from . import apply
from .base import Tuned
from .low_rank import classifier, from_peft

ADAPTER = "miram.adapter/1"
CARD, HEAD, CONFIG = "adapter.json", "head.safetensors", "adapter_config.json"


def save(tuned: Tuned, folder: Path) -> None:
    """Write what learnt, and the head.

    Raises:
        UserError: the folder holds an adapter already.
    """
    for name in (CARD, CONFIG):
        if (folder / name).exists():
            raise UserError(f"{folder} already has {name}; name another folder")
    make_folder(folder)
    tuned.method.write(tuned.model, folder)
    classes = tuned.head.out_features if isinstance(tuned.head, nn.Linear) else None
    if classes:
        save_file({name: tensor.detach().cpu() for name, tensor in tuned.head.state_dict().items()}, folder / HEAD)
    about = {"method": tuned.name, "options": tuned.method.model_dump(mode="json"), "base": tuned.base}
    counts = {"trainable": tuned.trainable, "frozen": tuned.frozen, "expected": tuned.expected}
    files = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    write_json(folder / CARD, ADAPTER, {**about, "classes": classes, **counts, "files": files})


def load(folder: Path, encoder: Encoder, force: bool = False) -> Tuned:
    """The tuned encoder that was saved, on its encoder, which is changed in place.

    Args:
        folder: what `save` or the peft library wrote.
        encoder: the one that was tuned, as it was before.
        force: take the adapter on another encoder of the same shape too.

    Raises:
        UserError: nothing is there, it is damaged, or it belongs on another encoder.
    """
    card = read_card(folder)
    tuned = apply(encoder, card["method"], **card["options"])
    if not force and card["base"] and (odd := [key for key in tuned.base if card["base"].get(key) != tuned.base[key]]):
        raise UserError(
            f"{folder} was tuned on another encoder: its {', '.join(odd)} differ "
            f"({card['base'].get(odd[0])!s:.40}, here {tuned.base[odd[0]]!s:.40}); load that one, or force it"
        )
    tuned.method.read(tuned.model, folder)
    if card["classes"]:
        tuned.set_head(card["classes"])
        read_into(folder / HEAD, tuned.head.state_dict().items())
    elif (folder / CONFIG).is_file() and (head := classifier(folder)):
        tuned.set_head(len(head["weight"]))
        tuned.head.load_state_dict(head)
    return tuned


def read_card(folder: Path) -> dict[str, Any]:
    """adapter.json, or what it would be for a folder of peft's.

    Raises:
        UserError: neither is there, or it is damaged.
    """
    if (folder / CARD).is_file() or not (folder / CONFIG).is_file():
        card = read_json(folder / CARD, ADAPTER)
        for name, digest in card["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                raise UserError(f"{folder / name} is missing or damaged; copy the adapter's folder again")
        return card
    try:
        name, method = from_peft(dict(json.loads((folder / CONFIG).read_text())))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}") from error
    return {"method": name, "options": method.model_dump(mode="json"), "base": None, "classes": None}
