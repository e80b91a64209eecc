"""Between lines of the log the host reads nothing of the device: it would wait there, and the device after it.

On a processor nothing waits, but what would is seen: every method and operation that hands the host a value.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miram.engine.loop import Trainer
from miram.engine.objective import Batch
from miram.pretrain.miram import Miram
from miram.pretrain.moco_v3 import MocoV3
from miram.pretrain.stage import pretrain

METHODS = (
    *("item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "unique", "masked_select"),
    *("__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__", "__format__", "__repr__"),
)
OPERATIONS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "bincount"}
OPERATIONS |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # wait where a mask says which: how many are they?
Read = tuple[int, str, str]  # step counted from 1, what, file:function of ours


class Reads(TorchDispatchMode):
    """Notes whatever lets the host see values of a tensor, from a step's learning to the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0  # 0: not watching
        self.found: list[Read] = []

    def note(self, what: str) -> None:
        if not self.step:
            return
        frame = sys._getframe(1)
        while frame.f_back and (not frame.f_globals.get("__package__", "").startswith("miram") or here(frame)):
            frame = frame.f_back
        self.found.append((self.step, what, f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if name in INDEXING else []
        )
        if name in OPERATIONS or masks:
            self.note(f"aten::{name}")
        return func(*args, **(kwargs or {}))


def here(frame: Any) -> bool:
    return frame.f_code.co_filename == __file__


@contextmanager
def watching(reads: Reads) -> Iterator[None]:
    """Every `fit` inside is watched, but for its drawing of data, which lies in host memory."""
    with pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            patch.setattr(Tensor, name, noted(reads, name, getattr(Tensor, name)))
        draw, fit = Trainer.draw, Trainer.fit

        def drawn(self: Trainer, batches: Iterator[Batch]) -> list[Batch]:
            reads.step = 0
            try:
                return draw(self, batches)
            finally:
                reads.step = self.step + 1

        def fitted(self: Trainer) -> None:
            with reads:
                fit(self)
            reads.step = 0

        patch.setattr(Trainer, "draw", drawn)
        patch.setattr(Trainer, "fit", fitted)
        yield


def noted(reads: Reads, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        reads.note(name)
        return method(*args, **kwargs)

    return call


STEPS, LINES = 6, (3, 6)
COMMON = [f"--train.steps={STEPS}", "--train.log_every=3", "--train.checkpoint_every=6", "--train.ema=0.9"]
COMMON += ["--train.clip_grad=0.5", "--train.micro_batch=2", "--monitor.images=8", "--monitor.pictures=1"]
MIRAM = [
    "--model.image_size=64",
    "--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3, proj_drop_rate: 0.2}",
    "--model.mask_unit=2",
    "--model.tissue_loss=0.5",
    "--model.checkpointing=true",
    "--model.scales=[{scale: 1, attention: performer, depth: 1, width: 32, heads: 2, options: {num_features: 16, "
    "redraw_every: 4}}, {scale: 2, attention: nystrom, depth: 1, width: 16, heads: 2, decode_fraction: 0.5, "
    "upsample: learned, checkpointing: true, options: {num_landmarks: 4}}]",
]
OTHERS = [
    *MIRAM[:-1],
    "--model.scales=[{scale: 1, attention: agent, depth: 1, width: 32, heads: 2}, {scale: 2, attention: window, depth: "
    "1, width: 16, heads: 2, options: {window: 4}}, {scale: 4, attention: linformer, depth: 1, width: 16, heads: 2}]",
]
MOCO = ["--objective=moco_v3", "--moco.hidden=32", "--moco.dim=8", "--train.micro_batch=null"]
EVERYTHING = {
    "miram fp32": MIRAM,
    "miram fp16": [*MIRAM, "--train.precision=fp16"],
    "miram bf16": [*MIRAM, "--train.precision=bf16", "--train.schedule=constant", "--train.layer_decay=0.7"],
    "other attentions": OTHERS,
    "moco_v3 fp32": MOCO,
    "moco_v3 fp16": [*MOCO, "--train.precision=fp16"],
}


def trained(arguments: list[str], out: Path) -> list[Read]:
    AcceleratorState._reset_state(True)
    reads = Reads()
    with watching(reads):
        pretrain("pretrain/demo", [*arguments, f"--out={out}"])
    return reads.found


def quiet(found: list[Read]) -> Counter[Read]:
    """Those of steps after which nothing is due, less the one look at its seed that Performer may take to draw anew."""
    return Counter(read for read in found if read[0] not in LINES) - REDRAWN


# Every 1000 steps by default, every 4 here.
REDRAWN = Counter((5, what, "performer.py:begin_step") for what in ("__int__", "aten::_local_scalar_dense"))
# The flags of the step before, which came to the host while the device worked. The first step has none to read, and a
# line has read its own.
ALLOWED = Counter((step, "tolist", "guard.py:read") for step in range(2, STEPS) if not {step, step - 1} & {*LINES})


@pytest.mark.parametrize("name", EVERYTHING)
def test_between_lines_the_host_reads_only_the_flags_of_the_step_before(
    name: str, tiny: list[str], tmp_path: Path
) -> None:
    found = trained([*tiny, *COMMON, *EVERYTHING[name]], tmp_path)
    assert {where for _, _, where in found} > {"guard.py:read", "window.py:take"}, "nothing is watched"
    assert quiet(found) == ALLOWED


def test_nor_does_any_of_two_ranks(tiny: list[str], tmp_path: Path) -> None:
    ranks = on_ranks(2, lambda: trained([*tiny, *COMMON, *MIRAM], tmp_path))
    for found in ranks:
        assert quiet(found) == ALLOWED


def test_a_line_is_read_at_once(tiny: list[str], tmp_path: Path) -> None:
    """What a line needs comes to the host in one go, not figure by figure."""
    found = trained([*tiny, *COMMON, *MIRAM], tmp_path)
    reads = [(what, where) for step, what, where in found if step == LINES[0] and not what.startswith("aten")]
    assert reads.count(("tolist", "window.py:take")) == 1
    assert reads.count(("tolist", "guard.py:read")) == 2  # this step's, and those of the step before
    assert len(reads) <= 4, reads


SINS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda sums: sums.sum().item(),
    "__bool__": lambda sums: bool(sums.isnan().any()),
    "__float__": lambda sums: float(sums.detach().max()),
    "cpu": lambda sums: sums.detach().cpu(),
    "aten::index": lambda sums: sums[sums > 0],
    "aten::nonzero": lambda sums: torch.where(sums > 0),
    "__format__": lambda sums: f"{sums.detach()[0]:.3f}",
}


@pytest.mark.parametrize(("objective", "options"), [(Miram, []), (MocoV3, MOCO)])
def test_an_objective_that_makes_the_host_wait_is_seen(
    objective: type, options: list[str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = objective.forward

    def sinful(self: Any, batch: Batch) -> Tensor:
        sums: Tensor = forward(self, batch)
        for sin in SINS.values():
            sin(sums)
        return sums

    monkeypatch.setattr(objective, "forward", sinful)
    found = trained([*tiny, *COMMON, *options, "--train.micro_batch=null"], tmp_path)
    seen = Counter(what for step, what, where in found if step == 2 and where == "step.py:backward")
    assert seen.keys() >= SINS.keys()
    assert seen["item"] == 2  # its own, and that of the string


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and MIRAM_GPU=1")
@pytest.mark.parametrize("name", EVERYTHING)
def test_torch_sees_no_wait_for_the_gpu_between_lines(
    name: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Trainer.learn

    def watched(self: Trainer, batches: list[Batch]) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.step else "default")  # the first step sets up libraries
        try:
            learn(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "learn", watched)
    AcceleratorState._reset_state(True)
    steady = ["--model.scales.0.options={num_features: 16, redraw_every: 0}"] if name.startswith("miram") else []
    pretrain("pretrain/demo", [*tiny, *COMMON, *EVERYTHING[name], *steady, f"--out={tmp_path}"])
