"""A tuned encoder on disk: what learnt, the head, and which encoder it belongs on.

FOLDER/adapter.safetensors    the tensors that learnt, by their names in the model; of lora, dora and ia3 instead
FOLDER/adapter_model.safetensors + adapter_config.json    as the peft library writes and reads them
FOLDER/head.safetensors       weight (classes, D) and bias (classes,), if there is a head
FOLDER/adapter.json           {"schema", "method", "options", "base": {"architecture", "heads", "image_size",
                              "channels", "digest"}, "classes": 2 or null, "trainable", "frozen", "expected",
                              "files": {NAME: sha256}}

The folder appears whole or not at all. One that peft wrote has no adapter.json: it is read too, without a check of the
encoder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from torch import Tensor, nn

from ...engine.config import Section
from ...engine.errors import UserError, one_line
from ...engine.files import make_folder, read_json, sha256, sync_folder, write_json
from ...engine.tensors import read_into, whole
from ...pretrain.encoder import Encoder
from .base import TENSORS, Size, Tuned, write_all
from .low_rank import PEFT_WEIGHTS, classifier, from_peft
from .registry import describe, prepare, put_on, read_method

ADAPTER = "miram.adapter/1"
CARD, HEAD, CONFIG = "adapter.json", "head.safetensors", "adapter_config.json"
FILES = (TENSORS, HEAD, CONFIG, PEFT_WEIGHTS)  # what may lie beside the card


class Base(Section):
    """The encoder that an adapter belongs on."""

    architecture: str
    heads: int
    image_size: tuple[int, int]
    channels: int
    digest: str


class Card(Section):
    """adapter.json."""

    method: str
    options: dict[str, Any]
    base: Base | None
    classes: Size | None
    trainable: int = 0
    frozen: int = 0
    expected: int | None = None
    files: dict[str, str] = Field(min_length=1)


# ---------------------------------------------------------------------------------------------- writing


def save(tuned: Tuned, folder: str | Path, writes: bool = True) -> None:
    """Write what learnt, and the head.

    Args:
        tuned: also one in shards; then every rank calls this.
        folder: to be made; whatever happens, it is whole or not there.
        writes: whether this rank does; of several ranks, one.

    Raises:
        UserError: the folder is there already, the model was merged, or its head is none of `set_head`.
    """
    tuned.refuse_if_used_up()
    folder = Path(folder)
    if not isinstance(tuned.head, nn.Linear | nn.Identity):
        raise UserError(
            f"a head that is a {type(tuned.head).__name__} is not saved, only that of set_head; keep it apart"
        )
    contents = gathered(tuned.method.contents(tuned.model), writes)
    head = gathered(tuned.head.state_dict(), writes)
    if not writes:
        return
    if folder.exists():
        raise UserError(f"{folder} is there already; name another folder")
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    make_folder(part)
    try:
        tuned.method.write(tuned.model, contents, part)
        if head:
            write_all(part / HEAD, head)
        write_json(part / CARD, ADAPTER, card_of(tuned, part))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(folder.parent)


def gathered(tensors: Mapping[str, Tensor], writes: bool) -> dict[str, Tensor]:
    """The tensors, put together from all ranks one by one; in host memory, and of the rank that writes only."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if writes:
            found[name] = value.cpu()
    return found


def card_of(tuned: Tuned, folder: Path) -> dict[str, Any]:
    """What adapter.json says."""
    return {
        "method": tuned.name,
        "options": tuned.method.model_dump(mode="json"),
        "base": tuned.base,
        "classes": tuned.head.out_features if isinstance(tuned.head, nn.Linear) else None,
        "trainable": tuned.trainable,
        "frozen": tuned.frozen,
        "expected": tuned.expected,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }


# ---------------------------------------------------------------------------------------------- reading


def load(folder: str | Path, encoder: Encoder, force: bool = False) -> Tuned:
    """The tuned encoder that was saved, on its encoder, which is changed in place.

    Args:
        folder: what `save` or the peft library wrote.
        encoder: the one that was tuned, as it was before.
        force: take the adapter on another encoder of the same shape too.

    Raises:
        UserError: nothing is there, it is damaged, or it belongs on another encoder.
    """
    folder = Path(folder)
    card = read_card(folder)
    method = read_method(card.method, card.options)
    prepare(encoder, card.method, method)
    if card.base and not force:
        refuse_another(folder, card.base, Base(**describe(encoder)))
    tuned = put_on(encoder, card.method, method)
    method.read(tuned.model, folder)
    if card.classes:
        tuned.set_head(card.classes)
        read_into(folder / HEAD, tuned.head.state_dict().items())
    elif not card.base and (head := classifier(folder, tuned.shape.D)):
        tuned.set_head(len(head["weight"]))
        tuned.head.load_state_dict(head)
    return tuned


def refuse_another(folder: Path, wanted: Base, here: Base) -> None:
    """Refuse an encoder that an adapter was not made for.

    Raises:
        UserError: what differs.
    """
    odd = [key for key in Base.model_fields if getattr(wanted, key) != getattr(here, key)]
    if odd:
        pairs = (f"{key} {getattr(wanted, key)!s:.12}, here {getattr(here, key)!s:.12}" for key in odd)
        raise UserError(
            f"{folder} was tuned on another encoder ({'; '.join(pairs)}): load that one, or pass force=True"
        )


def read_card(folder: Path) -> Card:
    """adapter.json, or what it would be for a folder of peft's.

    Raises:
        UserError: neither is there, or something of it is damaged.
    """
    if not (folder / CARD).exists() and (folder / CONFIG).exists():
        if (folder / HEAD).exists():
            raise UserError(f"{folder} has {HEAD} but no {CARD}: a part of an adapter; copy the whole folder again")
        return card_of_peft(folder / CONFIG)
    content = read_json(folder / CARD, ADAPTER)
    try:
        text = json.dumps({key: value for key, value in content.items() if key != "schema"})
        card = Card.model_validate_json(text, strict=True)
        odd = sorted(card.files.keys() - FILES)
        if odd or card.base is None or (card.classes is not None) != (HEAD in card.files):
            raise ValueError(f"its files or base cannot be {odd or card.base}")
    except (ValidationError, ValueError) as error:
        raise UserError(f"{folder / CARD} is damaged: {one_line(str(error))[:200]}") from error
    for name, digest in card.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is missing or damaged; copy the adapter's folder again")
    return card


def card_of_peft(config: Path) -> Card:
    """What adapter.json would say of a folder that peft wrote.

    Raises:
        UserError: it is damaged, or holds what is not taken.
    """
    try:
        name, method = from_peft(dict(json.loads(config.read_text())))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{config} is damaged: {one_line(str(error))[:200]}") from error
    return Card(method=name, options=method.model_dump(mode="json"), base=None, classes=None, files={"": ""})
