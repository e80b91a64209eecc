"""Every objective learns on two ranks, with copies of it (DDP) or shards of it (FSDP2), what it learns on one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from forked import finish, killed_at, last_checkpoint, metrics, order, start
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import miram
from miram.engine.loop import Trainer

Spoil = Callable[[int], None]

WAYS = ("ddp", "fsdp2")
COMMON = [
    "--train.steps=6",
    "--train.checkpoint_every=2",
    "--train.ema=0.9",
    "--train.clip_grad=0.7",
    "--monitor.every=2",
    "--monitor.images=8",
    "--monitor.pictures=2",
]
ENCODER = "depth: 2, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3"
MIRAM = [  # the second scale is a Nystrom
    f"--model.encoder_options={{{ENCODER}}}",
    "--model.scales.0.attention=performer",
    "--model.scales.0.options={num_features: 16, redraw_every: 2}",
]
MOCO = [
    "--objective=moco_v3",
    f"--model.encoder_options={{{ENCODER}, global_pool: token}}",
    "--moco.hidden=32",
    "--moco.dim=16",
]


# ---------------------------------------------------------------------------------------------- running


def around_fit(before: Callable[[Trainer], None], after: Callable[[Trainer], None]) -> None:
    """From now on, in this process: look at a trainer when it begins and when it has ended."""
    original = Trainer.fit

    def fit(self: Trainer) -> None:
        before(self)
        original(self)
        after(self)

    Trainer.fit = fit  # type: ignore[method-assign]


def lying(way: str) -> Spoil:
    """On every rank, see that what is trained, and its moments and averages, lies as `way` says: in shards or whole."""
    sharded = way == "fsdp2"

    def look(trainer: Trainer) -> None:
        learner = trainer.learner
        assert isinstance(learner.model, DistributedDataParallel) is not sharded
        tensors = dict(trainer.objective.named_parameters()) | learner.averages
        tensors |= {
            f"{name} of {number}": value
            for number, state in enumerate(learner.optimizer.state.values())
            for name, value in state.items()
            if name != "step"
        }
        assert [name for name, tensor in tensors.items() if isinstance(tensor, DTensor) is not sharded] == []

    return lambda rank: around_fit(look, look)


def compiling(rank: int) -> None:
    """Compile without generating code; see that something was, and that no graph was broken."""
    backend = CompileCounterWithBackend("aot_eager")
    nn.Module.compile = partialmethod(nn.Module.compile, backend=backend)  # type: ignore[assignment]

    def look(trainer: Trainer) -> None:
        assert backend.frame_count > 0
        assert not counters["graph_break"]

    around_fit(lambda trainer: None, look)


def run(folder: Path, way: str, arguments: list[str], *spoils: Spoil) -> None:
    """On two ranks, to the end."""

    def spoil(rank: int) -> None:
        for each in (lying(way), *spoils):
            each(rank)

    finish(folder, [*arguments, f"--train.parallel={way}"], world=2, spoil=spoil)


# ---------------------------------------------------------------------------------------------- comparing


def assert_close(found: Path, expected: Path, losses: float, weights: float) -> None:
    """The same samples in the same order; losses, what is saved, and what the encoder makes of an image alike.

    Vectors are seen through the encoder's tokens only: a few, as the keys' bias, have no gradient but rounding.

    Args:
        losses: relative; of gradient norms and what monitors saw, too.
        weights: of the norm of a matrix.
    """
    assert order(found) == order(expected)
    for line, other in zip(metrics(found), metrics(expected), strict=True):
        assert line == pytest.approx(other, rel=losses)
    for part in ("model", "ema"):
        one, two = (load_file(last_checkpoint(folder) / f"{part}.safetensors") for folder in (found, expected))
        assert distance(one, two) < weights
    assert distance(*(load_file(folder / "run/encoder.safetensors") for folder in (found, expected))) < weights
    assert distance(*({"tokens": tokens(folder)} for folder in (found, expected))) < weights


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Of the matrices and variances that differ most, relative."""
    assert one.keys() == two.keys()
    names = [name for name in one if one[name].ndim > 1 or name.endswith("running_var")]
    return max(float((one[name] - two[name]).norm() / two[name].norm()) for name in names)


@torch.no_grad()
def tokens(folder: Path) -> Tensor:
    """What the encoder in a run folder makes of four images."""
    encoder = miram.load_encoder(folder / "run")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size, generator=generator)
    return encoder.eval().forward_features(images)


# ---------------------------------------------------------------------------------------------- Miram

LOSSES, WEIGHTS = 4e-5, 2e-5  # measured at most 4.1e-6 and 2.2e-6


@pytest.fixture(scope="module")
def small(tiny: list[str]) -> list[str]:
    return [*tiny, *COMMON, *MIRAM]


@pytest.fixture(scope="module")
def alone(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank, in which all that is to be compared takes place."""
    folder = tmp_path_factory.mktemp("alone")
    finish(folder, small)
    lines = metrics(folder)
    assert [line["step"] for line in lines if "rankme" in line] == [2, 4, 6]
    assert any(line["clipped_steps"] for line in lines)
    one, two = (load_file(path / "model.safetensors") for path in (folder / "run/checkpoints").iterdir())
    drawn = [name for name in one if name.endswith(".features")]
    assert drawn
    assert not any(one[name].equal(two[name]) for name in drawn)  # drawn anew in between
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_miram_learns_the_same_on_two_ranks_as_on_one(way: str, small: list[str], alone: Path, tmp_path: Path) -> None:
    run(tmp_path, way, small)
    assert_close(tmp_path, alone, LOSSES, WEIGHTS)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "fsdp2"), (1, "fsdp2")),
        pytest.param((1, "ddp"), (2, "fsdp2"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp2"), (2, "ddp"), marks=pytest.mark.slow),
        pytest.param((2, "ddp"), (2, "fsdp2"), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_when_ranks_share_the_model_in_another_way(
    before: tuple[int, str], after: tuple[int, str], small: list[str], alone: Path, tmp_path: Path
) -> None:
    (world, way), (later_world, later_way) = before, after
    killed = start(tmp_path, [*small, f"--train.parallel={way}"], world=world, taking=killed_at(5, 0, world - 1))
    assert killed[-1] is None
    said = finish(tmp_path, [*small, f"--train.parallel={later_way}"], world=later_world).out
    assert "going on from step 4 of 6" in said
    assert "equal to rounding, not to the bit" in said
    assert_close(tmp_path, alone, LOSSES, WEIGHTS)


# ---------------------------------------------------------------------------------------------- all the rest

LINFORMER = ["--model.scales.1.attention=linformer", "--model.scales.1.options={num_projected: 16}"]
TILES = [
    "--model.image_size=64",
    "--model.scales.1.decode_fraction=0.5",
    "--model.tissue_loss=1",
    "--model.scales.1.loss_on=masked",
]
CASES: dict[str, tuple[list[str], float, float]] = {  # options, and how close losses and weights are
    "moco_v3": (MOCO, 1.5e-4, 1.5e-4),  # measured 1.4e-5 and 1.4e-5
    "linformer": ([*MIRAM, *LINFORMER], LOSSES, WEIGHTS),
    "tiles": ([*MIRAM, *TILES], LOSSES, WEIGHTS),
    "fp16": ([*MIRAM, "--train.precision=fp16"], 3e-2, 1e-2),  # 2.9e-3 and 1.2e-3
    "bf16": ([*MIRAM, "--train.precision=bf16"], 1e-1, 8e-2),  # 1.1e-2 and 8.9e-3
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_whatever_is_learnt_two_ranks_learn_it_as_one_does(case: str, tiny: list[str], tmp_path: Path) -> None:
    options, losses, weights = CASES[case]
    finish(tmp_path / "alone", [*tiny, *COMMON, *options])
    for way in WAYS:
        run(tmp_path / way, way, [*tiny, *COMMON, *options])
        assert_close(tmp_path / way, tmp_path / "alone", losses, weights)


CHECKPOINTING = [f"--model.{where}checkpointing=true" for where in ("", "scales.0.", "scales.1.")]
COSTS: dict[str, tuple[list[str], list[str], list[Spoil]]] = {  # of what is learnt, and of how
    "checkpointing": (MIRAM, CHECKPOINTING, []),
    "compiled": (MIRAM, ["--train.compile=true"], [compiling]),
    "compiled, checkpointing": (MIRAM, ["--train.compile=true", "--train.micro_batch=2", *CHECKPOINTING], [compiling]),
    "compiled moco_v3": (MOCO, ["--train.compile=true"], [compiling]),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", COSTS)
def test_recomputed_and_compiled_two_ranks_learn_what_a_plain_run_learns_on_one(
    case: str, way: str, tiny: list[str], tmp_path: Path
) -> None:
    options, more, spoils = COSTS[case]
    finish(tmp_path / "plain", [*tiny, *COMMON, *options])
    run(tmp_path / way, way, [*tiny, *COMMON, *options, *more], *spoils)
    assert_close(tmp_path / way, tmp_path / "plain", *(CASES["moco_v3"][1:] if options is MOCO else (LOSSES, WEIGHTS)))
