"""MoCo v3 against arithmetic by hand, against itself on two ranks, and against everything that must stand still.

`python test_moco_v3.py FOLDER` is two ranks, which leave FOLDER/0.safetensors and FOLDER/1.safetensors.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from miram.engine.errors import UserError
from miram.engine.launch import make_accelerator
from miram.engine.loop import Trainer
from miram.engine.objective import Batch
from miram.engine.optim import make_optimizer
from miram.engine.recipe import TrainSection
from miram.engine.run import Run
from miram.pretrain.build import build_objective
from miram.pretrain.config import PretrainConfig
from miram.pretrain.encoder import card_for, save_encoder
from miram.pretrain.moco_v3 import MocoV3, contrast, refuse_accumulation
from miram.pretrain.sync_norm import GlobalBatchNorm

B, SIDE, DIM, TAU = 6, 16, 8, 0.2
TINY = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
Arrays = np.ndarray[Any, np.dtype[np.float64]]


def settings(seed: int = 0, options: dict[str, Any] | None = None, **moco: Any) -> PretrainConfig:
    chosen = {**TINY, **(options or {})}
    name = chosen.pop("name", "vit_tiny_patch16_224")
    model = {"encoder": name, "image_size": SIDE, "encoder_options": chosen}
    section = {"dim": DIM, "hidden": 12, **moco}
    return PretrainConfig.model_validate(
        {
            "seed": seed,
            "objective": "moco_v3",
            "data": {"shards": "none"},
            "model": model,
            "moco": section,
            "train": {"steps": 1},
        }
    )


def build(seed: int = 0, options: dict[str, Any] | None = None, **moco: Any) -> MocoV3:
    chosen = settings(seed, options, **moco)
    card = card_for(chosen.model.encoder, chosen.model.size, chosen.model.encoder_options)
    objective, _ = build_objective(chosen, card)
    assert isinstance(objective, MocoV3)
    return objective


def views(step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(B, 1, SIDE, SIDE, generator=generator)
    return {f"view/{name}": x + 0.5 * torch.randn(x.shape, generator=generator) for name in "ab"}


def parted() -> tuple[MocoV3, Batch]:
    """A model in float64 whose copies are somewhere else than at the start and than each other, and a batch for it.

    At the start the class token is so close to zero that its norm makes every gradient through it huge.
    """
    model = build().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model, {name: x.double() for name, x in views().items()}


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    """(2 B, 5) far from zero, where sums of squares cancel."""
    x = torch.randn(2 * B, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (x * torch.arange(1, 6) + 100).to(dtype).requires_grad_()


def norm_of(dtype: torch.dtype = torch.float64) -> nn.BatchNorm1d:
    norm = GlobalBatchNorm(5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 6))
        norm.bias.copy_(torch.arange(5))
    return norm


def be_a_rank(rank: int, folder: Path) -> None:
    """Half of the batch through DDP, as the trainer does it, and half of the rows through batch norm."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    model, batch = parted()
    half = slice(rank * B // 2, (rank + 1) * B // 2)
    parallel = DistributedDataParallel(model)  # named: it averages gradients for as long as it lives
    loss = parallel({name: x[half] for name, x in batch.items()})
    (loss / B * 2).sum().backward()  # a share of the global mean, times the ranks DDP averages over
    found = {f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for dtype in (torch.float64, torch.float32):
        x, norm, mine = rows(dtype), norm_of(dtype), slice(rank * B, (rank + 1) * B)
        y = norm(x[mine])
        (y * y.detach().cos() * 2).sum().backward()
        found |= {f"{dtype}/y": y, f"{dtype}/x": x.grad[mine], f"{dtype}/weight": norm.weight.grad}
        found |= {f"{dtype}/{name}": value for name, value in norm.named_buffers()}
    save_file({"loss": loss, **found}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What two processes found, each on its half."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, __file__, folder], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0
    return [load_file(folder / f"{r}.safetensors") for r in (0, 1)]


# ---------------------------------------------------------------------------------------------- the loss


def by_hand_norm(x: Arrays, layer: nn.BatchNorm1d) -> Arrays:
    y = (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5)
    return y * layer.weight.detach().numpy() + layer.bias.detach().numpy() if layer.affine else y


def by_hand_mlp(x: Arrays, head: nn.Sequential) -> Arrays:
    linear, norms = list(head)[::3], list(head)[1::3]
    for i, (layer, norm) in enumerate(zip(linear, norms, strict=True)):
        x = by_hand_norm(x @ layer.weight.detach().numpy().T, norm)
        x = np.maximum(x, 0) if i + 1 < len(linear) else x
    return x


def by_hand_contrast(q: Arrays, k: Arrays) -> Arrays:
    """(N,) 2 tau CE, image by image, over all keys there are."""
    losses = []
    for i in range(len(q)):
        logits = [q[i] @ k[j] / np.linalg.norm(q[i]) / np.linalg.norm(k[j]) / TAU for j in range(len(k))]
        losses.append(2 * TAU * (math.log(sum(math.exp(x) for x in logits)) - logits[i]))
    return np.array(losses)


def by_hand() -> Arrays:
    """(N,) the loss of every image of the global batch."""
    model, batch = parted()
    with torch.no_grad():
        fast = [model.encoder(batch[f"view/{name}"]).numpy() for name in "ab"]
        slow = [model.momentum_encoder(batch[f"view/{name}"]).numpy() for name in "ab"]
    q1, q2 = (by_hand_mlp(by_hand_mlp(x, model.projector), model.predictor) for x in fast)
    k1, k2 = (by_hand_mlp(x, model.momentum_projector) for x in slow)
    return by_hand_contrast(q1, k2) + by_hand_contrast(q2, k1)


def test_heads_are_those_of_the_paper() -> None:
    model = build()
    for head, widths in ((model.projector, [16, 12, 12, DIM]), (model.predictor, [DIM, 12, DIM])):
        linear = [part for part in head if isinstance(part, nn.Linear)]
        assert [(x.in_features, x.out_features) for x in linear] == list(pairwise(widths))
        assert all(x.bias is None for x in linear)
        assert [type(part).__name__ for part in head][-2:] == ["Linear", "GlobalBatchNorm"]
        assert [p.affine for p in head if isinstance(p, nn.BatchNorm1d)] == [True] * (len(linear) - 1) + [False]


def test_the_loss_equals_a_computation_by_hand() -> None:
    model, batch = parted()
    assert model(batch).shape == (1,)
    assert model(batch).item() == pytest.approx(by_hand().sum(), rel=1e-10)
    assert model.counts(batch).tolist() == [B]


def test_on_two_ranks_each_sums_its_own_images_of_the_loss_by_hand(ranks: list[dict[str, Tensor]]) -> None:
    expected = by_hand().reshape(2, -1).sum(1)
    assert [found["loss"].item() for found in ranks] == pytest.approx(expected.tolist(), rel=1e-10)


def test_on_two_ranks_every_gradient_is_that_of_one(ranks: list[dict[str, Tensor]]) -> None:
    model, batch = parted()
    (model(batch) / B).sum().backward()
    gradients = {f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for found in ranks:
        assert {name for name in found if name.startswith("gradient/")} == set(gradients)
        for name, gradient in gradients.items():
            assert gradient is not None
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    model, batch = parted()
    learnt = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in learnt]
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(model(batch).sum(), learnt), direction, strict=True))

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(learnt, direction, strict=True):
                p += by * d
            loss = model(batch).item()
            for p, d in zip(learnt, direction, strict=True):
                p -= by * d
        return loss

    h = 1e-6
    assert slope.item() == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-5)


def test_keys_that_fit_perfectly_leave_the_loss_in_closed_form() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    expected = 5 * 2 * TAU * (math.log(math.exp(1 / TAU) + 4) - 1 / TAU)
    assert contrast(3 * eye, 7 * eye, TAU).item() == pytest.approx(expected)


def test_autocast_leaves_the_contrast_in_fp32() -> None:
    q, k = torch.randn(2, B, DIM, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = by_hand_contrast(q.double().numpy(), k.double().numpy()).sum()
    with torch.autocast("cpu", torch.bfloat16):
        assert contrast(q, k, TAU).item() == pytest.approx(expected, rel=1e-6)
        assert build()(views()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_batch_norm_on_two_ranks_is_batch_norm_of_the_whole(
    dtype: torch.dtype, tolerance: float, ranks: list[dict[str, Tensor]]
) -> None:
    x, norm = rows(), nn.BatchNorm1d(5).double()
    norm.load_state_dict({**norm.state_dict(), "weight": torch.arange(1.0, 6), "bias": torch.arange(5.0)})
    y = norm(x)
    (y * y.detach().cos()).sum().backward()
    for name, expected in (("y", y), ("x", x.grad)):
        found = torch.cat([rank[f"{dtype}/{name}"] for rank in ranks]).double()
        scale = 2 if name == "x" else 1  # the loss there was doubled
        torch.testing.assert_close(found / scale, expected, rtol=tolerance, atol=tolerance)
    weight = (ranks[0][f"{dtype}/weight"] + ranks[1][f"{dtype}/weight"]).double() / 2
    torch.testing.assert_close(weight, norm.weight.grad, rtol=tolerance, atol=tolerance)
    for rank in ranks:
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(rank[f"{dtype}/{name}"].double(), buffer.double(), rtol=tolerance, atol=0)


def test_batch_norm_of_half_precision_is_that_of_the_same_numbers() -> None:
    x = rows().detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_of(torch.float32)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), norm_of()(x.double()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- the slow copy


def test_momentum_rises_along_a_cosine() -> None:
    model = build(momentum=0.9)
    expected = {
        0: 0.9,
        25: 1 - 0.1 * (1 + math.sqrt(0.5)) / 2,
        50: 0.95,
        75: 1 - 0.1 * (1 - math.sqrt(0.5)) / 2,
        100: 1,
    }
    for step, m in expected.items():
        assert model.momentum_at(step, 100) == pytest.approx(m, abs=1e-12)


def test_the_slow_copy_is_the_average_its_recursion_says() -> None:
    model, steps = build(momentum=0.6), 7
    generator = torch.Generator().manual_seed(4)
    fast = {"encoder": model.encoder, "projector": model.projector}
    expected = {f"{part}.{n}": p.detach().double() for part in fast for n, p in fast[part].named_parameters()}
    for step in range(steps):
        with torch.no_grad():
            for p in [*model.encoder.parameters(), *model.projector.parameters()]:
                p += p.requires_grad * torch.randn(p.shape, generator=generator)
        model.begin_step(step, steps)
        m = 1 - (1 + math.cos(math.pi * step / steps)) / 2 * (1 - 0.6)
        for name in expected:
            part, _, rest = name.partition(".")
            expected[name] = m * expected[name] + (1 - m) * fast[part].get_parameter(rest).detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(f"momentum_{name}").double(), value, rtol=1e-5, atol=1e-5)


def learn(model: MocoV3, steps: int) -> torch.optim.Optimizer:
    """As the engine does."""
    optimizer = make_optimizer(model, TrainSection(steps=steps, weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for step in range(steps):
        model.begin_step(step, steps)
        (model(views(step)) / B).sum().backward()
        assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_slow_copy_is_out_of_the_gradients_reach() -> None:
    model = build()
    optimizer = learn(model, 3)
    slow = [p for name, p in model.named_parameters() if name.startswith("momentum_")]
    assert slow
    assert all(p.grad is None and not p.requires_grad for p in slow)
    assert {id(p) for p in slow}.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"])


def test_a_frozen_patch_projection_stays_as_it_was_in_both_copies() -> None:
    model, start = build(), build()
    learn(model, 5)
    for copy in (model.encoder, model.momentum_encoder):
        for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"):
            assert copy.get_parameter(name).view(torch.int32).equal(start.encoder.get_parameter(name).view(torch.int32))
        moved = "blocks.0.attn.qkv.weight"
        assert not copy.get_parameter(moved).equal(start.encoder.get_parameter(moved))


def test_a_patch_projection_that_is_not_frozen_learns() -> None:
    model, start = build(freeze_patch_projection=False), build()
    learn(model, 3)
    for copy in (model.encoder, model.momentum_encoder):
        assert not copy.patch_embed.proj.weight.equal(start.encoder.patch_embed.proj.weight)


# ---------------------------------------------------------------------------------------------- in the engine


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Views:
    """Global batches cut into micro-batches."""

    batches_per_epoch = 5

    def skipped(self) -> int:
        return 0

    def batches(self, start: int, rank: int, world: int, micro_batch: int) -> Iterator[Batch]:
        for step in count(start):
            for i in range(0, B, micro_batch):
                yield {name: x[i : i + micro_batch] for name, x in views(step).items()}


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_slow_copy_moves_once_a_step_also_when_accumulating(micro_batch: int | None, tmp_path: Path) -> None:
    model, seen = build(), []
    begin = model.begin_step
    model.begin_step = lambda step, steps: (seen.append((step, steps)), begin(step, steps))[1]  # type: ignore[method-assign]
    train = TrainSection(steps=3, batch_size=B, micro_batch=micro_batch, precision="fp32")
    Trainer(Run(tmp_path, "pretrain"), model, Views(), train, 0, make_accelerator()).fit()
    assert seen == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"name": "vit_small_patch16_dinov3", "embed_dim": 32},
    ],
)
@pytest.mark.parametrize("freeze", [True, False])
def test_every_parameter_that_could_learn_does(options: dict[str, Any], freeze: bool) -> None:
    model = build(options=options, freeze_patch_projection=freeze)
    model(views()).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_state_saved_is_a_state_loaded(tmp_path: Path) -> None:
    model, other = build(), build(seed=1)
    learn(model, 3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    assert not other(views(9)).equal(model(views(9)))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for one in (model, other):
        one.begin_step(1, 3)
    assert other(views(9)).equal(model(views(9)))
    learn(other, 2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    assert all(p.equal(before[name]) for name, p in model.state_dict().items())


def test_inputs_are_what_a_batch_holds() -> None:
    assert build().inputs == {name: tuple(x.shape[1:]) for name, x in views().items()}


# ---------------------------------------------------------------------------------------------- building, refusing


def test_the_seed_decides_the_weights_and_both_copies_start_equal() -> None:
    one, same, other = build(), build(), build(seed=1)
    assert all(p.equal(same.state_dict()[name]) for name, p in one.state_dict().items())
    assert not one.projector[0].weight.equal(other.projector[0].weight)
    for slow, fast in ((one.momentum_encoder, one.encoder), (one.momentum_projector, one.projector)):
        assert all(p.equal(fast.state_dict()[name]) for name, p in slow.state_dict().items())


def test_queries_keys_and_values_start_as_three_matrices() -> None:
    """A uniform on +-sqrt(6 / (D + D)) has variance 1 / D; MAE's, on +-sqrt(6 / (D + 3 D)), half of it."""
    encoder = build(options={"embed_dim": 64, "num_heads": 2}).encoder
    weight = encoder.blocks[0].attn.qkv.weight
    assert weight.abs().max().item() <= math.sqrt(6 / 128)
    assert [m.var().item() for m in weight.chunk(3)] == pytest.approx([1 / 64] * 3, rel=0.1)


def test_weights_of_init_start_both_copies(tmp_path: Path) -> None:
    chosen = settings(seed=5)
    card = card_for(chosen.model.encoder, chosen.model.size, chosen.model.encoder_options)
    source = build(seed=1).encoder
    save_encoder(tmp_path, source, card)
    model, said = build_objective(chosen.model_copy(update={"init": str(tmp_path)}), card)
    assert said
    for copy in (model.encoder, model.momentum_encoder):
        assert all(p.equal(source.state_dict()[name]) for name, p in copy.state_dict().items())


@pytest.mark.parametrize(
    ("train", "world", "named"),
    [
        ({"batch_size": 64, "micro_batch": 16}, 2, r"train\.micro_batch=16.* 32 of the 64 .*train\.batch_size=32"),
        ({"batch_size": 1}, 1, r"train\.batch_size=1"),
    ],
)
def test_too_few_negatives_are_refused(train: dict[str, int], world: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        refuse_accumulation(TrainSection(steps=1, **train), world)


@pytest.mark.parametrize(("train", "world"), [({"batch_size": 2}, 2), ({"batch_size": 64, "micro_batch": 32}, 2)])
def test_a_batch_held_at_once_is_not_refused(train: dict[str, int], world: int) -> None:
    refuse_accumulation(TrainSection(steps=1, **train), world)


@pytest.mark.parametrize(
    ("options", "named"), [({"global_pool": ""}, "global_pool"), ({"patch_size": 6}, r"model\.image_size")]
)
def test_an_encoder_that_cannot_be_contrasted_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build(options=options)


if __name__ == "__main__":
    # Forked here, where torch has run nothing yet, and not by pytest, which may have used an accelerator.
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=be_a_rank, args=(rank, Path(sys.argv[1]))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
