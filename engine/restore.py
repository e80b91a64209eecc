"""Giving a model and an optimizer back what a checkpoint holds; its format is pictured in checkpoint.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import UserError
from .files import read_json
from .tensors import read_forms, read_into, read_tensors

LOOP_STATE = "miram.loop/1"
WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")  # torch.compile, activation checkpointing


def read_state(path: Path) -> dict[str, Any]:
    """The step, and what the loop carries."""
    state = read_json(path / "state.json", LOOP_STATE)
    return {key: value for key, value in state.items() if key not in {"schema", "aliases"}}


def load_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """Whole tensors of a part by name, shared ones under all their names; scalars have shape (1,).

    Raises:
        UserError: the checkpoint has no such part.
    """
    tensors = read_tensors(file_of(path, part))
    return tensors | {name: tensors[kept] for name, kept in aliases(path, part).items()}


def load_into(path: Path, part: str, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place; each rank reads its own rows of those in shards.

    Raises:
        UserError: the part holds other names than `targets`, or a tensor of another shape or type.
    """
    stored = stored_names(path, part)
    refuse(path, part, "holds", stored.keys() - targets.keys())
    refuse(path, part, "lacks", targets.keys() - stored.keys())
    read_into(file_of(path, part), [(stored[name], target) for name, target in targets.items()])


def load_model(path: Path, model: nn.Module, part: str = "model") -> None:
    """Give a model its parameters and buffers; what another part than "model" does not hold comes from "model".

    Raises:
        UserError: the checkpoint is of a model with other names, shapes or types.
    """
    targets = {bare(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    load_into(path, "model", targets)
    if part != "model":
        stored = stored_names(path, part)
        refuse(path, part, "holds", stored.keys() - targets.keys())
        load_into(path, part, {name: targets[name] for name in stored})


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every moment as `<moment>.<parameter name>`; scalars get shape (1,)."""
    return {
        f"{moment}.{bare(name)}": value.reshape(1) if value.ndim == 0 else value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Give each parameter its moments back, by name, on its own device and in its own shards.

    Raises:
        UserError: a moment belongs to no parameter of the model, or has another shape.
    """
    file = file_of(path, "optimizer")
    forms = read_forms(file)
    parameters = {bare(name): parameter for name, parameter in model.named_parameters()}
    refuse(path, "optimizer", "holds", {key for key in forms if key.partition(".")[2] not in parameters})
    fused = any(group.get("fused") for group in optimizer.param_groups)
    optimizer.state.clear()
    targets = {}
    for key, form in forms.items():
        moment, _, name = key.partition(".")
        parameter = parameters[name]
        if moment == "step":  # never in shards, and on the device for fused optimizers only
            targets[key] = torch.zeros((), dtype=form.dtype, device=parameter.device if fused else "cpu")
        else:
            targets[key] = torch.zeros_like(parameter, dtype=form.dtype)
        optimizer.state[parameter][moment] = targets[key]
    read_into(file, targets.items())


def stored_names(path: Path, part: str) -> dict[str, str]:
    """Every name of a part, and the one its tensor is stored under."""
    return {name: name for name in read_forms(file_of(path, part))} | aliases(path, part)


def aliases(path: Path, part: str) -> dict[str, str]:
    """Other names of tensors that are stored once."""
    return read_json(path / "state.json", LOOP_STATE).get("aliases", {}).get(part, {})


def file_of(path: Path, part: str) -> Path:
    """The file of a part.

    Raises:
        UserError: the checkpoint has none.
    """
    file = path / f"{part}.safetensors"
    if not file.is_file():
        raise UserError(f"{path} holds no {file.name}; it is no checkpoint, or of a run that had no {part}")
    return file


def refuse(path: Path, part: str, verb: str, names: set[str]) -> None:
    """Refuse a checkpoint for names that it holds or lacks.

    Raises:
        UserError: there are such names.
    """
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{path}: its {part} {verb} {min(names)!r}{more}, unlike this run; was the model changed?")


def bare(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return WRAPPERS.sub("", name)
