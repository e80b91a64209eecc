"""`miram plan` against closed forms, other counters, and what a process really holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from miram.__main__ import app
from miram.engine.errors import UserError
from miram.pretrain.attention import ATTENTIONS, build_attention
from miram.pretrain.build import build_objective
from miram.pretrain.config import PretrainConfig
from miram.pretrain.encoder import card_for
from miram.pretrain.plan import Plan, cost_of, plan, variants_of
from miram.pretrain.plan.count import Cost
from miram.pretrain.plan.timing import time_attention

ENCODER = {"encoder": "vit_tiny_patch16_224", "encoder_options": {"depth": 2}, "image_size": [128, 64]}
ONE = {"scale": 1, "depth": 1, "width": 64, "heads": 4}
TWO = {"scale": 2, "depth": 2, "width": 64, "heads": 4}


def settings(
    *scales: dict[str, object], precision: str = "fp32", batch_size: int = 8, **model: object
) -> PretrainConfig:
    """A small configuration: 8 x 4 patches of 16 x 16, 8 of them visible."""
    train = {"steps": 1, "batch_size": batch_size, "precision": precision}
    return PretrainConfig.model_validate(
        {"data": {"shards": "none"}, "train": train, "model": {**ENCODER, "scales": list(scales), **model}}
    )


@cache
def base() -> Cost:
    """Of the small configuration."""
    return cost_of(settings(ONE, TWO))


def block(tokens: int, width: int) -> int:
    """Operations of a pre-norm ViT block: qkv, Q K^T and A V, projection, two layers of 4 x width."""
    return 2 * tokens * (3 * width**2 + 2 * tokens * width + width**2 + 8 * width**2)


# ---------------------------------------------------------------------------------------------- operations


def test_forward_operations_are_those_of_the_closed_form_to_one():
    cost = base()
    projection = 2 * 32 * 256 * 192  # of all patches: masking comes after it
    assert cost.forward["encoder"] == projection + 2 * block(1 + 8, 192)
    assert cost.forward["decoder_embed"] == 2 * 9 * 192 * 64
    assert cost.forward["decoders.1"] == block(1 + 32, 64) + 2 * 32 * 64 * 256
    assert cost.forward["decoders.2"] == 2 * block(1 + 128, 64) + 2 * 128 * 64 * 256


def test_backward_takes_two_products_for_each_of_forward_and_the_attention_map_once_more():
    cost = base()
    again = 2 * (2 * 129 * 129 * 64)  # Q K^T of both blocks
    assert cost.backward["decoders.2"] == 2 * cost.forward["decoders.2"] + again
    # nothing wants the gradient of the image
    assert cost.backward["encoder"] == 2 * cost.forward["encoder"] - 2 * 32 * 256 * 192 + 2 * (2 * 9 * 9 * 192)


def test_checkpointing_costs_the_blocks_forward_once_more_and_keeps_less():
    plain, saving = base(), cost_of(settings(ONE, {**TWO, "checkpointing": True}))
    assert saving.forward == plain.forward
    more = saving.backward["decoders.2"] - plain.backward["decoders.2"]
    assert more == pytest.approx(2 * block(129, 64), rel=0.35)  # recomputing stops at the last thing that is needed
    assert more <= 2 * block(129, 64)
    assert saving.held["decoders.2"] < 0.5 * plain.held["decoders.2"]
    assert saving.peak(8, 8) < plain.peak(8, 8)


def test_tiles_of_several_scales_cost_their_share_with_an_enlarged_target():
    """Of 128 and 512 tokens a half and a fourth; the target, here the enlarged input, has no products."""
    scales = (ONE, {**TWO, "decode_fraction": 0.5}, {**TWO, "scale": 4, "decode_fraction": 0.25})
    cost, source = (cost_of(settings(*scales, target=target)) for target in ("upsampled", "source"))
    for part, of in (("decoders.2", 64), ("decoders.4", 128)):
        sequences, tokens, _ = cost.sequences[part]
        assert sequences * (tokens - 1) == of
        assert cost.forward[part] == 2 * sequences * block(tokens, 64) + 2 * of * 64 * 256
    assert cost.forward == source.forward
    assert cost.inputs < source.inputs  # the finer views need not be loaded


def test_a_scale_that_shares_tokens_costs_a_larger_head_and_nothing_else():
    alone, shared = cost_of(settings(ONE)), cost_of(settings(ONE, {"scale": 2, "tokens": "shared"}))
    assert shared.forward["decoders.1"] == alone.forward["decoders.1"]
    assert shared.forward.total() - alone.forward.total() == 2 * 32 * 64 * (4 * 256)  # 32 x 32 pixels a token
    assert shared.parameters.total() - alone.parameters.total() == (64 + 1) * 4 * 256


def test_half_of_the_tiles_cost_half_of_the_linear_layers_and_a_fourth_of_each_map():
    cost = cost_of(settings(ONE, {**TWO, "decode_fraction": 0.5}))
    sequences, tokens, _ = cost.sequences["decoders.2"]
    assert sequences * (tokens - 1) == 64
    assert cost.forward["decoders.2"] == 2 * sequences * block(tokens, 64) + 2 * 64 * 64 * 256


def nystrom(N: int, m: int, d: int, H: int, iterations: int) -> int:
    """Two attentions, the core, four m x m products an iteration, the inverse times the summary, the convolution."""
    attentions = 2 * (2 * 2 * N * m * d)
    core = 2 * m * m * d + iterations * 4 * 2 * m**3 + 2 * m * m * d
    landmarks = 2 * (2 * 16 * 8 * 4 + 2 * 16 * 8 * 4) * H * d  # Q and K: 8 to 4 columns, then 16 to 8 rows
    return H * (attentions + core) + 2 * 9 * (N - 1) * H * d + landmarks


@pytest.mark.parametrize(
    ("name", "options", "products"),
    [
        ("nystrom", {"num_landmarks": 32}, lambda: nystrom(129, 33, 16, 4, 6)),
        ("performer", {"num_features": 32}, lambda: 2 * 129 * 32 * 64 * 4),  # each of Q, K, V and the output with W
    ],
    ids=["nystrom", "performer"],
)
def test_linear_attentions_have_the_products_of_their_closed_form(
    name: str, options: dict[str, int], products: Callable[[], int]
):
    cost = cost_of(settings(ONE, {**TWO, "attention": name, "options": options}))
    linear = 2 * (block(129, 64) - 4 * 129 * 129 * 64) + 2 * 128 * 64 * 256
    assert cost.forward["decoders.2"] == pytest.approx(linear + 2 * products(), rel=0.01)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_has_the_operations_that_torchs_own_counter_sees_in_a_real_pass(name: str):
    cost = cost_of(settings(ONE, {**TWO, "attention": name, "depth": 1}))
    attention = build_attention(name, 64, 4, (16, 8), prefix_tokens=1)
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, 129, 64))
    rest = 2 * 129 * 8 * 64**2 + 2 * 128 * 64 * 256
    assert cost.forward["decoders.2"] == pytest.approx(counter.get_total_flops() + rest, rel=0.01)


def test_backward_of_a_depthwise_convolution_is_twice_its_forward():
    with_conv, without = (
        cost_of(settings(ONE, {**TWO, "attention": "nystrom", "options": {"num_landmarks": 16, "conv_kernel": k}}))
        for k in (3, 0)
    )
    convolution = 2 * (2 * 9 * 128 * 64)  # two blocks
    assert with_conv.forward["decoders.2"] - without.forward["decoders.2"] == convolution
    assert with_conv.backward["decoders.2"] - without.backward["decoders.2"] == 2 * convolution


# ---------------------------------------------------------------------------------------------- parameters


def test_the_encoders_parameters_are_timms():
    cost = base()
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, in_chans=1, num_classes=0, img_size=(128, 64))
    assert cost.parameters["encoder"] == sum(p.numel() for p in vit.parameters())
    assert cost.trainable == 4 * (cost.parameters.total() - vit.pos_embed.numel())


def test_moco_has_its_heads_and_a_slow_copy_that_learns_nothing():
    changed = settings(ONE).model_copy(update={"objective": "moco_v3"})
    cost = cost_of(changed)
    widths = (192, 4096, 4096, 256)
    matrices = sum(a * b for a, b in pairwise(widths))
    assert cost.parameters["projector"] == matrices + 2 * (4096 + 4096)
    assert cost.forward["projector"] == 2 * 2 * matrices  # of two views
    assert cost.parameters["momentum_encoder"] == cost.parameters["encoder"]
    assert cost.forward["momentum_encoder"] == cost.forward["encoder"] == 2 * (2 * 32 * 256 * 192 + 2 * block(33, 192))
    assert cost.backward["momentum_encoder"] == cost.held["momentum_encoder"] == 0


# ---------------------------------------------------------------------------------------------- memory

MEASURE = """
import ctypes, gc, json, sys
import torch
from miram.engine.config import load
from miram.engine.optim import make_optimizer
from miram.pretrain.build import build_objective
from miram.pretrain.config import PretrainConfig
from miram.pretrain.encoder import card_for

def resident(field="VmRSS"):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def forward(images):
    batch = {name: torch.rand(images, *shape) for name, shape in model.inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.train.precision == "bf16"):
        return model(batch).sum(), batch

def step(images):
    forward(images)[0].backward()
    optimizer.step()
    optimizer.zero_grad()

settings = load(PretrainConfig, sys.argv[1], [])
images, m = settings.train.batch_size, settings.model
model, _ = build_objective(settings, card_for(m.encoder, m.size, {"in_chans": 1, **m.encoder_options}))
optimizer = make_optimizer(model, settings.train)
step(1)
step(2)
idle = resident()
held = forward(images)
kept = resident() - idle - sum(x.nbytes for x in held[1].values())
del held
idle = resident()
open("/proc/self/clear_refs", "w").write("5")
step(images)
print(json.dumps({"kept": kept, "peak": resident("VmHWM") - idle}))
"""


def measure(changed: PretrainConfig, folder: Path) -> dict[str, int]:
    """Bytes by which a process grows: over a forward pass, and at most over a step. Large blocks are mapped singly,
    so that freed memory is given back and what malloc keeps for later does not count."""
    (folder / "config.yaml").write_text(json.dumps(changed.model_dump()))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(folder / "config.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize(
    ("scales", "precision", "checkpointing"),
    [
        ([{**ONE, "width": 256, "heads": 8}], "fp32", False),
        pytest.param(
            [{**ONE, "width": 128}, {**TWO, "width": 128, "attention": "nystrom"}],
            "fp32",
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [{**ONE, "width": 128}, {**TWO, "width": 128, "attention": "agent", "checkpointing": True}],
            "bf16",
            True,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["softmax", "nystrom", "checkpointed bf16"],
)
def test_kept_bytes_and_peak_are_what_a_process_grows_by(
    scales: list[dict[str, object]], precision: str, checkpointing: bool, tmp_path: Path
):
    changed = settings(*scales, precision=precision, batch_size=96, image_size=[256, 128], checkpointing=checkpointing)
    cost, measured = cost_of(changed), measure(changed, tmp_path)
    assert 96 * cost.held.total() + cost.fixed == pytest.approx(measured["kept"], rel=0.15)
    assert cost.peak(96, 96) - cost.weights - 2 * cost.trainable == pytest.approx(measured["peak"], rel=0.15)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_kept_bytes_are_the_unique_storages_that_autograd_saves_in_a_real_pass(name: str):
    changed = settings(ONE, {**TWO, "attention": name})
    cost = cost_of(changed)
    assert 3 * cost.held.total() + cost.fixed == pytest.approx(saved_bytes(changed, images=3), rel=0.01)


def saved_bytes(changed: PretrainConfig, images: int) -> int:
    """Bytes that autograd saves of real tensors, beside weights and inputs."""
    options = {"in_chans": 1} | changed.model.encoder_options
    card = card_for(changed.model.encoder, changed.model.size, options)
    model = build_objective(changed, card)[0]
    batch = {key: torch.rand(images, *shape) for key, shape in model.inputs.items()}
    given = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *batch.values())}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(batch).sum()
    del loss
    return sum(size for pointer, size in saved.items() if pointer not in given)


def test_eager_attention_keeps_the_map_that_fused_attention_does_not():
    fused, eager = (cost_of(settings(ONE, {**TWO, "options": {"backend": b}})) for b in ("sdpa", "eager"))
    one_map = 4 * 129 * 129 * 4  # bytes in fp32, four heads
    more = eager.held["decoders.2"] - fused.held["decoders.2"]
    assert more >= 1.9 * one_map  # of two blocks, less what fused attention keeps of its rows' sums
    assert fused.held["decoders.2"] < 2 * 40 * 129 * 64 * 4


def test_peak_grows_with_the_micro_batch_and_accumulating_holds_the_gradients():
    cost: Cost = base()
    peaks = [cost.peak(images, 64) for images in range(1, 65)]
    assert peaks[:-1] == sorted(peaks[:-1])
    slope = (peaks[62] - peaks[31]) / 31
    assert cost.held.total() < slope < 1.5 * cost.held.total()  # what is kept, and what lives shortly
    assert 0 <= cost.peak(32, 64) - cost.peak(32, 32) <= cost.trainable
    assert cost.largest_micro_batch(peaks[20], 64) == 21
    assert cost.largest_micro_batch(0, 64) == 0


def test_an_average_of_the_weights_takes_room_for_itself_and_for_a_model_that_has_it():
    changed = settings(ONE, TWO)
    with_average = changed.model_copy(update={"train": changed.train.model_copy(update={"ema": 0.99})})
    cost, averaged = base(), cost_of(with_average)
    assert averaged.averages == cost.weights + cost.trainable
    assert averaged.peak(8, 8) - cost.peak(8, 8) == averaged.averages


# ---------------------------------------------------------------------------------------------- other attentions


@pytest.mark.parametrize(
    ("names", "depth", "checkpointing"),
    [
        (("softmax", "window"), 3, False),
        pytest.param(ATTENTIONS, 5, False, marks=pytest.mark.slow),
        pytest.param(ATTENTIONS, 4, True, marks=pytest.mark.slow),
    ],
    ids=["two", "all", "all checkpointed"],
)
def test_a_row_of_another_attention_is_what_its_own_configuration_costs(
    names: Iterable[str], depth: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    """Rows are made up of one or two counted blocks; here all of them are counted."""
    one = {**ONE, "depth": depth, "checkpointing": checkpointing}
    changed = settings(one, precision="bf16")
    monkeypatch.setattr("miram.pretrain.plan.ATTENTIONS", {name: ATTENTIONS[name] for name in names})
    for variant in variants_of(changed, cost_of(changed), 0, timed=False):
        cost = cost_of(settings({**one, "attention": variant.attention}, precision="bf16"))
        assert variant.parameters == cost.parameters["decoders.1"]
        assert variant.forward_flops == cost.forward["decoders.1"]
        assert variant.backward_flops == cost.backward["decoders.1"]
        assert variant.kept_bytes == cost.held["decoders.1"]
        assert variant.peak_bytes == pytest.approx(cost.peak(8, 8), rel=0.02)


# ---------------------------------------------------------------------------------------------- the command


def planned(tmp_path: Path, changed: PretrainConfig, *arguments: str) -> Plan:
    """`miram plan` without times."""
    (tmp_path / "c.yaml").write_text(json.dumps(changed.model_dump(exclude_unset=True)))
    return plan(str(tmp_path / "c.yaml"), arguments, timed=False)


def test_a_shared_scale_has_a_part_and_no_attentions_to_choose_from(tmp_path: Path):
    changed = settings(ONE, {"scale": 2})
    found = planned(tmp_path, changed, "--model.scales.1.tokens=shared")
    assert list(found.variants) == ["decoders.1"]
    assert "wide_heads" in [part.name for part in found.parts]


def test_moco_has_no_decoder_to_choose_an_attention_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = planned(tmp_path, settings(ONE).model_copy(update={"objective": "moco_v3"}))
    assert found.variants == {}
    assert {"encoder", "projector", "predictor", "momentum_encoder"} < {part.name for part in found.parts}
    assert "moco_v3, per image" in capsys.readouterr().out


def test_a_plan_says_what_it_counts_apart_from_its_tables_whose_lines_stay_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    planned(tmp_path, settings({**ONE, "width": 512}))
    out, err = capsys.readouterr()
    assert "counting" not in out
    assert all(f"counting decoders.1 with {name}" in err for name in ATTENTIONS)
    assert max(len(line) for line in out.splitlines() if line.startswith("  ")) <= 80


def test_help_names_the_plans_own_options_and_that_nothing_starts():
    said = CliRunner().invoke(app, ["plan", "--help"]).output
    assert all(word in said for word in ("--no-time", "--json FILE", "starts no training", "--model.scales"))


def test_a_json_without_its_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", "pretrain/demo", "--json", "--no-time"])
    assert isinstance(result.exception, UserError)
    assert "--json: name a file" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_the_plan_names_every_attention_and_marks_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.yaml").write_text(json.dumps(settings(ONE, TWO).model_dump()))
    found = plan(str(tmp_path / "c.yaml"), ["--model.scales.1.depth=1"], timed=False, json=tmp_path / "plan.json")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ATTENTIONS)
    assert "computed, not run" in printed
    assert "fewest operations" in printed
    for variants in found.variants.values():
        assert [variant.attention for variant in variants] == list(ATTENTIONS)
        assert sum(variant.fastest for variant in variants) == sum(variant.configured for variant in variants) == 1
    assert json.loads((tmp_path / "plan.json").read_text())["memory"]["peak"] == found.memory.peak
    assert not (tmp_path / "runs").exists()


def test_xformers_is_counted_as_the_fused_kernel_that_it_is(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(json.dumps(settings(ONE).model_dump()))
    a, b = (
        plan(str(tmp_path / "c.yaml"), [f"--model.attention_backend={name}"], timed=False)
        for name in ("xformers", "sdpa")
    )
    assert a.parts == b.parts


def test_a_long_attention_is_timed_at_a_smaller_grid_and_scaled(monkeypatch: pytest.MonkeyPatch):
    grids: list[tuple[int, int]] = []

    def build(grid: tuple[int, int]):
        grids.append(grid)
        return build_attention("softmax", 16, 1, grid)

    monkeypatch.setattr("miram.pretrain.plan.timing.time_pass", lambda attention, *_: 1e-7 * attention.grid[0] ** 4)
    timing = time_attention(build, "softmax", 1, (256, 256), "fp32")
    assert grids == [(32, 32), (64, 64)]  # 0.1 s, 1.7 s; 128 x 128 would take 27 s
    assert timing.extrapolated
    assert timing.seconds == pytest.approx(1e-7 * 256**4)
    assert not time_attention(build, "softmax", 1, (64, 32), "fp32").extrapolated


def test_an_attention_that_does_not_fit_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refusing(changed: PretrainConfig) -> Cost:
        if changed.model.scales[0].attention != "softmax":
            raise UserError("model: does not fit")
        return cost_of(changed)

    monkeypatch.setattr("miram.pretrain.plan.cost_of", refusing)
    (tmp_path / "c.yaml").write_text(json.dumps(settings(ONE).model_dump()))
    found = plan(str(tmp_path / "c.yaml"), timed=False)
    assert [variant.refused for variant in found.variants["decoders.1"]] == ["", *["model: does not fit"] * 5]
    assert "does not fit" in capsys.readouterr().out
