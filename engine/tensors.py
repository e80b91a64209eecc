"""Files of tensors, written one tensor at a time and read by row: whole models never lie in memory twice.

The format is safetensors' own, so that its library reads what is written here:
    8 bytes          length of the header, little-endian
    header           JSON {name: {dtype, shape, data_offsets: [begin, end]}}, padded with blanks to a multiple of 8
    tensors          row-major, little-endian, without gaps; wide types first and then by name, so that all are aligned
Scalars are stored as shape (1,).

A tensor may lie in shards on many ranks (DTensor, cut along its first dimension as torch.chunk does): `whole` puts one
together, and `read_into` reads no more of a file than the rows of this rank.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .errors import UserError

CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


class Form(NamedTuple):
    """What a file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def form_of(tensor: Tensor) -> Form:
    """The form a tensor, sharded or not, has in a file."""
    return Form(tensor.dtype, tuple(tensor.shape) or (1,))


def in_file_order(names: Mapping[str, Tensor]) -> list[str]:
    """Names in the order a file has them: it depends on nothing but names and types."""
    return sorted(names, key=lambda name: (-names[name].dtype.itemsize, name))


# ---------------------------------------------------------------------------------------------- writing


def write_tensors(path: Path, forms: Mapping[str, Form], values: Iterable[Tensor]) -> str:
    """Write tensors as they come, and flush them to disk.

    Args:
        path: the file.
        forms: their forms by name, in the order of the file.
        values: the tensors in that order; each is let go of before the next is drawn.

    Returns:
        sha256 of the file.

    Raises:
        OSError: the disk is full or broken; what was written stays.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in _contents(forms, iter(values)):
            digest.update(content)
            file.write(content)
            del content  # else it would live until the next is there
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _contents(forms: Mapping[str, Form], values: Iterator[Tensor]) -> Iterator[Any]:
    yield _header(forms)
    for form in forms.values():
        value = next(values)
        assert form_of(value) == form
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        del value
    assert next(values, None) is None


def _header(forms: Mapping[str, Form]) -> bytes:
    header, begin = {}, 0
    for name, form in forms.items():
        end = begin + form.dtype.itemsize * torch.Size(form.shape).numel()
        header[name] = {"dtype": CODES[form.dtype], "shape": form.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------------------------------------- from all ranks


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, put together from all ranks if it is in shards: then all must call this, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Gathering:
    """Tensors in the order of their file, put together from all ranks one at a time, as they are drawn.

    Every rank draws every tensor, aliases too: whether two are one, a rank whose shards are empty cannot tell.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.aliases = shared(tensors)
        order = in_file_order(tensors)
        self.forms = {name: form_of(tensors[name]) for name in order if name not in self.aliases}
        self._stored = [name not in self.aliases for name in order]
        self._values = map(whole, [tensors[name] for name in order])

    def __iter__(self) -> Iterator[Tensor]:
        return compress(self._values, self._stored)

    def drain(self) -> None:
        """Draw what is left, because the other ranks do, and wait for this one."""
        deque(self._values, maxlen=0)


def shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one's memory, with the first name of it."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():  # the address of nothing says nothing
            place = (local.data_ptr(), local.stride(), form_of(tensor))
            if (kept := first.setdefault(place, name)) != name:
                aliases[name] = kept
    return aliases


# ---------------------------------------------------------------------------------------------- reading


def read_forms(path: Path) -> dict[str, Form]:
    """What tensors a file holds.

    Raises:
        UserError: it cannot be read, or holds a type of numbers that we never write.
    """
    with _opened(path) as file:
        return {name: _form(path, file, name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def read_into(path: Path, targets: Iterable[tuple[str, Tensor]]) -> None:
    """Fill (name in the file, tensor) pairs, on whatever device; of those in shards, this rank reads only its rows.

    Raises:
        UserError: the file cannot be read, lacks a name, or a tensor has another shape or type.
    """
    with _opened(path) as file:
        for name, target in targets:
            form = _form(path, file, name)
            if form != form_of(target):
                raise UserError(f"{path}: {name} is {form}, here {form_of(target)}; was the model changed?")
            first, last = local_rows(target)
            values = file.get_slice(name)[first:last]
            local = target.to_local() if isinstance(target, DTensor) else target
            local = local if local.ndim else local.reshape(1)
            assert local.shape == values.shape, f"{name}: rank holds {local.shape}, {first}:{last} of {form} are due"
            local.copy_(values)


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """[first, last) of the rows that this rank holds: all of them, or a chunk that may be empty."""
    first, last = 0, form_of(tensor).shape[0]
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if type(placement) is Shard and placement.dim == 0:
                chunk = -(-(last - first) // tensor.device_mesh.size(dimension))
                begin = first + chunk * tensor.device_mesh.get_local_rank(dimension)
                first, last = min(begin, last), min(begin + chunk, last)
            else:
                assert isinstance(placement, Replicate), f"no checkpoint of {placement}"
    return first, last


def _form(path: Path, file: Any, name: str) -> Form:
    stored = file.get_slice(name)
    if stored.get_dtype() not in DTYPES:
        raise UserError(f"{path}: {name} is of type {stored.get_dtype()}, which a checkpoint never holds")
    return Form(DTYPES[stored.get_dtype()], tuple(stored.get_shape()))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error})") from error
