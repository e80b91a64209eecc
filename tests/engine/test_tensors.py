"""Files of tensors: safetensors' own format, written one by one, read by row."""

from __future__ import annotations

import hashlib
import multiprocessing
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from miram.engine.errors import UserError
from miram.engine.tensors import (
    CODES,
    Form,
    Gathering,
    in_file_order,
    read_forms,
    read_into,
    read_tensors,
    write_tensors,
)

fork = multiprocessing.get_context("fork")


def write(path: Path, tensors: dict[str, Tensor]) -> str:
    gathering = Gathering(tensors)
    return write_tensors(path, gathering.forms, gathering)


def noise(dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Any bits at all, not-a-numbers included; a bool has but two."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


shapes = st.lists(st.integers(0, 4), max_size=3)
files = st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(st.sampled_from(sorted(CODES, key=str)), shapes))


@given(files, st.integers(0, 2**31))
def test_safetensors_reads_every_bit_of_any_type_and_shape(
    tmp_path_factory: pytest.TempPathFactory, forms: dict[str, tuple[torch.dtype, list[int]]], seed: int
) -> None:
    torch.manual_seed(seed)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    tensors = {name: noise(*form) for name, form in forms.items() if name != "__metadata__"}
    digest = write(path, tensors)
    for found in (load_file(path), read_tensors(path)):
        assert {n: (t.dtype, t.shape, bits(t)) for n, t in found.items()} == {
            n: (t.dtype, t.shape or (1,), bits(t)) for n, t in tensors.items()
        }
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_forms(path) == {name: Form(t.dtype, tuple(t.shape) or (1,)) for name, t in tensors.items()}
    assert list(read_forms(path)) == sorted(tensors)  # (the library's order of keys)


def test_bytes_are_those_that_safetensors_itself_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{dtype}/{i}ä": noise(dtype, [i, 3]) for dtype in CODES for i in range(4) if dtype.is_floating_point}
    del tensors["torch.bfloat16/1ä"]
    tensors = {
        k: t for k, t in tensors.items() if t.dtype != torch.float16
    }  # the library's order within 16 bits is its own
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_order_of_the_mapping_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3), "c": torch.ones(1).double(), "d": torch.ones(3).bool()}
    write(tmp_path / "one", tensors)
    write(tmp_path / "other", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_slices_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "s": base[:, 1:3], "e": torch.ones(1).expand(3), "b": base}
    write(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_is_let_go_of_before_the_next_is_drawn(tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []  # to the memory, which outlives a tensor that others look at
    seen = []

    def drawn() -> Iterator[Tensor]:
        for i in range(5):
            seen.append(sum(ref() is not None for ref in alive))
            memory = np.full(100, i, dtype=np.float32)
            alive.append(weakref.ref(memory))
            tensor = torch.from_numpy(memory)
            del memory
            yield tensor
            del tensor

    write_tensors(tmp_path / "file", {str(i): Form(torch.float32, (100,)) for i in range(5)}, drawn())
    assert seen == [0] * 5


def test_stream_writes_shared_memory_once_and_only_that(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"z": base, "a": base.detach(), "t": base.T, "row": base[0], "copy": base.clone(), "none": base[:0]}
    tensors |= {"empty": torch.empty(0, 3), "void": torch.empty(0, 3), "bits": base.view(torch.int32)}
    gathering = Gathering(tensors)
    assert gathering.aliases == {"a": "z"}
    write_tensors(tmp_path / "file", gathering.forms, gathering)
    assert load_file(tmp_path / "file").keys() == tensors.keys() - {"a"}


# ---------------------------------------------------------------------------------------------- reading into place


def test_targets_are_filled_in_place_whatever_their_layout(tmp_path: Path) -> None:
    write(tmp_path / "file", {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7), "e": torch.empty(0, 2)})
    w, n, e = torch.zeros(3, 2).T, torch.tensor(0), torch.empty(0, 2)
    places = w.data_ptr(), n.data_ptr()
    read_into(tmp_path / "file", [("w", w), ("n", n), ("e", e)])
    assert (w.tolist(), n.item(), w.stride()) == ([[0, 1, 2], [3, 4, 5]], 7, (1, 2))
    assert places == (w.data_ptr(), n.data_ptr())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (torch.zeros(3, 2), r"w is float32 \[2, 3\], here float32 \[3, 2\]"),
        (torch.zeros(2, 3).half(), r"here float16 \[2, 3\]"),
        (torch.tensor(1.0), r"here float32 \[1\]"),
    ],
)
def test_another_shape_or_type_is_a_user_error(tmp_path: Path, target: Tensor, said: str) -> None:
    write(tmp_path / "file", {"w": torch.ones(2, 3)})
    with pytest.raises(UserError, match=said):
        read_into(tmp_path / "file", [("w", target)])


def test_what_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "rubbish").write_bytes(b"\xff" * 100)
    save_file({"x": torch.ones(3).to(torch.float8_e5m2)}, tmp_path / "foreign")
    for path in (tmp_path / "absent", tmp_path / "rubbish"):
        with pytest.raises(UserError, match=f"{path.name} cannot be read"):
            read_tensors(path)
    with pytest.raises(UserError, match="x is of type F8_E5M2"):
        read_forms(tmp_path / "foreign")
    write(tmp_path / "file", {"w": torch.ones(2, 3)})
    with pytest.raises(UserError, match="cannot be read"):
        read_into(tmp_path / "file", [("v", torch.ones(2, 3))])


# ---------------------------------------------------------------------------------------------- in shards

ROWS = range(1, 10)


def read_shards(rank: int, folder: Path) -> None:
    """Every number of rows, over 4 ranks and over 2 x 2 (replicas of shards, and shards of shards)."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=4)
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for mesh, cut in ((line, [Shard(0)]), (square, [Replicate(), Shard(0)]), (square, [Shard(0), Shard(0)])):
        for rows in ROWS:
            data = torch.arange(2.0 * rows).reshape(rows, 2)
            target = distribute_tensor(torch.zeros(rows, 2), mesh, cut)
            read_into(folder / "file", [(str(rows), target)])
            assert torch.equal(target.to_local(), distribute_tensor(data, mesh, cut).to_local())
            assert torch.equal(target.full_tensor(), data)
    distributed.destroy_process_group()


def test_ranks_read_the_rows_that_torch_deals_them(tmp_path: Path) -> None:
    write(tmp_path / "file", {str(rows): torch.arange(2.0 * rows).reshape(rows, 2) for rows in ROWS})
    ranks = [fork.Process(target=read_shards, args=(rank, tmp_path)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * 4


def test_widest_types_come_first() -> None:
    tensors = {"a": torch.ones(1).bool(), "b": torch.ones(1).half(), "c": torch.ones(1), "d": torch.ones(1).long()}
    assert in_file_order(tensors) == ["d", "c", "b", "a"]
