"""Checkpoints that are whole or not there, and free of pickle and of the number of ranks.

checkpoints/step-00000120/
    model.safetensors        parameters and buffers by name, wrapper prefixes stripped
    optimizer.safetensors    exp_avg.<name>, exp_avg_sq.<name>, step.<name>; scalars as shape (1,)
    rng.safetensors          generator states, one row a rank
    state.json               step and whatever the loop carries from step to step
    manifest.json            sha256 of each file above, written last: without it the checkpoint does not count
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import UserError
from .files import read_json, sha256, sync_folder, write_json

MANIFEST = "miram.checkpoint/1"
LOOP_STATE = "miram.loop/1"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, as plain tensors by name."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint beside its place, rename it there, seal it with the manifest, prune to the last `keep`."""
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("model", "optimizer", "rng"):
        _save_tensors(temporary / f"{name}.safetensors", getattr(checkpoint, name))
    write_json(temporary / "state.json", LOOP_STATE, checkpoint.state)
    temporary.replace(final)
    sync_folder(folder)
    write_json(final / "manifest.json", MANIFEST, {"sha256": {p.name: sha256(p) for p in sorted(final.iterdir())}})
    _prune(folder, step, keep)
    return final


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose manifest verifies (None if there is none) and a sentence for each one skipped."""
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = verify(path)
        if fault is None:
            return _load(path), skipped
        skipped.append(f"skipped checkpoint {path.name}: {fault}")
    return None, skipped


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (path / "manifest.json").exists():
        return "it was not finished (no manifest)"
    try:
        digests = read_json(path / "manifest.json", MANIFEST).get("sha256")
    except UserError as error:
        return str(error)
    if not isinstance(digests, dict):
        return "its manifest is damaged"
    for name, digest in digests.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} does not match its sha256"
    return None


def _load(path: Path) -> Checkpoint:
    tensors = {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "rng")}
    return Checkpoint(**tensors, state=read_json(path / "state.json", LOOP_STATE))


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    places = Counter(tensor.data_ptr() for tensor in plain.values())
    save_file({n: t.clone() if places[t.data_ptr()] > 1 else t for n, t in plain.items()}, path)  # tied weights
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _prune(folder: Path, step: int, keep: int) -> None:
    """Later steps are left alone: a resume skipped them as damaged, and they must not push out sound ones."""
    reached = [path for path in sorted(folder.glob("step-*")) if path.name <= f"step-{step:08d}"]
    for path in reached[:-keep]:
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------- optimizer by name


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every moment as `<moment>.<parameter name>`; scalars get shape (1,)."""
    return {
        f"{moment}.{name}": value.reshape(1) if value.ndim == 0 else value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give each parameter its moments back, by name, on its own device.

    Raises:
        UserError: a moment belongs to no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for key, value in tensors.items():
        moment, _, name = key.partition(".")
        if name not in parameters:
            raise UserError(
                f"the checkpoint's optimizer holds {key!r}, which this model has not; was the model changed?"
            )
        parameter = parameters[name]
        counts = moment == "step"  # a 0-D tensor, which only a fused optimizer keeps on the device
        moved = value.reshape(() if counts else parameter.shape)
        optimizer.state[parameter][moment] = moved.to("cpu" if counts and not fused else parameter.device, copy=True)
