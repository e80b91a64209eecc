"""What locked models have in common: a folder that appears whole, a card that seals it, the encoder it stands on.

FOLDER/model.json     {"schema", …, "encoder", "base", "image_size", "mean", "std", "files": {NAME: sha256}, "digest"}

`digest` is sha256 over all else in model.json, which holds those of the files: it names the model. The encoder itself
is not in the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import ValidationError

from ..engine.config import Section
from ..engine.errors import UserError, one_line
from ..engine.files import make_folder, read_json, sha256, sync_folder, write_json
from ..engine.run import STATE
from ..pretrain.encoder import Encoder
from ..pretrain.weights.loading import read_encoder
from .peft.files import Base
from .peft.registry import describe

CARD = "model.json"
CLASSIFIER, SEGMENTER = "miram.model/1", "miram.segmenter/1"
MAKERS: Mapping[str, str] = {CLASSIFIER: "finetune", SEGMENTER: "segment"}  # the stage, by the schema
ALIKE = {"federate": "finetune"}  # a stage whose runs hold models of another's


class SealedCard(Section):
    """model.json, as far as all kinds of models have it."""

    encoder: str | None
    base: Base | None
    image_size: tuple[int, int]
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    files: dict[str, str] = {}
    digest: str = ""

    def own_digest(self) -> str:
        """sha256 of everything else in the card."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


Card = TypeVar("Card", bound=SealedCard)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which then takes the place of `folder`: that appears whole or not at all."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    make_folder(part)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(folder.parent)


def seal(part: Path, schema: str, card: Card) -> Card:
    """Write the card of a folder whose other files are there, and return it with its digest."""
    paths = (path for path in sorted(part.rglob("*")) if path.is_file())
    files = {path.relative_to(part).as_posix(): sha256(path) for path in paths}
    card = card.model_copy(update={"files": files})
    card = card.model_copy(update={"digest": card.own_digest()})
    write_json(part / CARD, schema, card.model_dump(mode="json"))
    return card


def word(path: Path, key: str) -> str:
    """What a JSON file says under a key; nothing where it cannot be read: who reads all of it says why."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError):
        return ""
    return str(content.get(key, "")) if isinstance(content, dict) else ""


def stage_of(run: str | Path) -> str:
    """The stage that a run or a model's folder is of; nothing where neither says it."""
    run = Path(run)
    path = next((p for p in (run / CARD, run / "model" / CARD) if p.is_file()), None)
    return word(run / "state.json", "stage") if path is None else MAKERS.get(word(path, "schema"), "")


def read_card(folder: Path, schema: str, kind: type[Card]) -> Card:
    """model.json, once it and all files it names are found to be what was written.

    Raises:
        UserError: one is missing or damaged, or it is another stage's.
    """
    if (found := word(folder / CARD, "schema")) != schema and found in MAKERS:
        raise UserError(f"{folder} is a model of `miram {MAKERS[found]}`; name one of `miram {MAKERS[schema]}`")
    content = read_json(folder / CARD, schema)
    try:
        text = json.dumps({key: value for key, value in content.items() if key != "schema"})
        card = kind.model_validate_json(text, strict=True)
        if card.digest != card.own_digest():
            raise ValueError("its digest is another")
    except (ValidationError, ValueError) as error:
        raise UserError(
            f"{folder / CARD} is damaged or was edited ({one_line(str(error))[:200]}); copy the model again"
        ) from error
    for name, digest in card.files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise UserError(f"{path} is missing or damaged; copy the model's folder again")
    return card


def refuse_without(folder: Path, card: SealedCard, name: str) -> None:
    """Raises: UserError: the card does not seal a file that such a model needs."""
    if name not in card.files:
        raise UserError(f"{folder / name} is missing or damaged; copy the model's folder again")


def refuse_unfinished(run: Path, stage: str) -> None:
    """Refuse what holds no model to rely on.

    Raises:
        UserError: says what it is.
    """
    if not run.is_dir():
        raise UserError(f"the run {run} is not there; name the folder that `miram {stage}` wrote")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run: it holds no config.yaml; name the folder that `miram {stage}` wrote")
    state = read_json(run / "state.json", STATE) if (run / "state.json").exists() else {}
    if (found := state.get("stage", stage)) == "sweep":
        raise UserError(f"{run} is a sweep; name one of the runs in its folder cells")
    if ALIKE.get(found, found) != stage:
        raise UserError(f"{run} is a run of `miram {found}`, which makes no such model; name one of `miram {stage}`")
    if (status := state.get("status", "not begun")) != "finished":
        raise UserError(f"{run} is not finished ({status}); repeat the command that made it, and it goes on")
    if not (run / "model" / CARD).is_file():
        raise UserError(f"{run} kept no model ({stage}.final was off, or it was removed); run it again and keep it")


@contextmanager
def asking(folder: Path, card: SealedCard, encoder: str | None) -> Iterator[str]:
    """The encoder's name, to read it by; what is not where the run found it is asked for.

    Raises:
        UserError: reading failed.
    """
    assert card.encoder is not None
    try:
        yield encoder or card.encoder
    except UserError as error:
        if encoder is not None:
            raise
        raise UserError(
            f"{error}; {folder} was tuned on {card.encoder}: say with --encoder where it lies now"
        ) from error


def read_base(folder: Path, card: SealedCard, encoder: str | None) -> Encoder:
    """The encoder that a model stands on.

    Raises:
        UserError: it is not there, or is another one.
    """
    assert card.base is not None
    with asking(folder, card, encoder) as source:
        vit, _ = read_encoder(source, card.image_size, card.base.channels)
    here = Base(**describe(vit))
    if here != card.base:
        odd = [name for name in Base.model_fields if getattr(here, name) != getattr(card.base, name)]
        said = "; ".join(f"{name} {getattr(card.base, name)!s:.12}, here {getattr(here, name)!s:.12}" for name in odd)
        raise UserError(
            f"{source} is not the encoder that {folder} was tuned on ({said}); name that one with --encoder"
        )
    statistics = {"mean": np.atleast_1d(card.mean).tolist(), "std": np.atleast_1d(card.std).tolist()}
    cast(Any, vit).pretrained_cfg = {**cast(Any, vit).pretrained_cfg, **statistics}
    return vit.requires_grad_(False)
