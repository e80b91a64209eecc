"""MDSA-UNet against a forward pass written out in loops over queries, which shares only its numbers with the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miram.finetune.segment.mdsa import MDSA, Block, ConvGLU, Switches, nearest
from miram.finetune.segment.mdsa_unet import MDSAUNet

TOPKS, HEAD_DIM = (1, 2, 3), 8
SMALL: dict[str, Any] = {"dims": (16, 32, 48), "topks": TOPKS, "head_dim": HEAD_DIM}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "released": {"windows": 2, "scale": "dim", "drop": "dropout", "norm": "batch", "qkv": "shared", "padding": "none"},
    "learned": {"qkv": "learned", "windows": 2},
}
SIZES = {"default": (64, 96), "released": (64, 32), "learned": (32, 64)}


def small(variant: str, **options: Any) -> MDSAUNet:
    """In double precision, with random numbers everywhere, also where training starts at 0 or 1."""
    torch.manual_seed(0)
    model = MDSAUNet(2, 3, (2, 1, 2), **{**SMALL, **VARIANTS[variant], **options}).double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("weight", "bias")):
                tensor.add_(0.15 * torch.randn_like(tensor))
            elif name.endswith("running_mean"):
                tensor.normal_(std=0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    return model


def images(variant: str) -> Tensor:
    return torch.randn(2, 2, *SIZES[variant], dtype=torch.double, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ the model, written out


class ByHand:
    """Forward pass from the description of the architecture and the tensors of a model's state."""

    def __init__(self, model: nn.Module, variant: str):
        self.numbers: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.variant = variant
        self.heads_scale = None if variant == "released" else HEAD_DIM**-0.5

    def conv(self, x: Tensor, name: str, **options: Any) -> Tensor:
        return F.conv2d(x, self.numbers[name + ".weight"], self.numbers.get(name + ".bias"), **options)

    def depthwise(self, x: Tensor, name: str) -> Tensor:
        side = self.numbers[name + ".weight"].shape[-1]
        return self.conv(x, name, padding=(side - 1) // 2, groups=x.shape[1])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.numbers[name + ".weight"], self.numbers[name + ".bias"]
        if self.variant == "released":
            mean, var = self.numbers[name + ".running_mean"], self.numbers[name + ".running_var"]
            return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)
        group = max(size for size in (1, 2, 4, 8, 16) if x.shape[1] % size == 0)
        return F.group_norm(x, x.shape[1] // group, weight, bias, eps=1e-5)

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        unit = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return unit * self.numbers[name + ".weight"][:, None, None] + self.numbers[name + ".bias"][:, None, None]

    def down(self, x: Tensor, name: str, stride: int) -> Tensor:
        pad = 3 if stride == 4 else 1
        a = self.norm(self.conv(x, f"{name}.strided.0", stride=stride, padding=pad), f"{name}.strided.1").relu()
        b = self.norm(self.conv(x, f"{name}.pooled.0", padding=pad), f"{name}.pooled.1")
        b = F.max_pool2d(b, 2 * pad + 1, stride, pad)
        return a + self.norm(self.conv(b, f"{name}.pooled.3"), f"{name}.pooled.4").relu()

    def up(self, x: Tensor, skip: Tensor, name: str) -> Tensor:
        x = torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), skip], 1)
        a = self.norm(self.conv(x, f"{name}.plain.0"), f"{name}.plain.1").relu()
        b = self.norm(self.conv(x, f"{name}.wide.0", padding=1), f"{name}.wide.1")
        return a + self.norm(self.conv(b, f"{name}.wide.2"), f"{name}.wide.3").relu()

    def aggregate(self, x: Tensor, name: str) -> Tensor:
        quarter = x.shape[1] // 4
        x = self.conv(x, f"{name}.enter")
        parts = [self.norm(x[:, :quarter], f"{name}.scales.0.0").relu()]
        for i in (1, 2, 3):
            part = self.depthwise(x[:, i * quarter : (i + 1) * quarter], f"{name}.scales.{i}.0")
            parts.append(self.norm(self.conv(part, f"{name}.scales.{i}.1"), f"{name}.scales.{i}.2").relu())
        return self.conv(torch.cat(parts, 1), f"{name}.leave")

    def attention(self, x: Tensor, name: str, topk: int, grid: tuple[int, int]) -> Tensor:
        q = k = v = x = self.aggregate(x, f"{name}.aggregate")
        if self.variant == "learned":
            q, k, v = self.conv(x, f"{name}.qkv").chunk(3, 1)
        mixed = torch.stack([attend(*maps, topk, grid, self.heads_scale) for maps in zip(q, k, v, strict=True)])
        return self.conv(mixed + self.depthwise(v, f"{name}.lepe"), f"{name}.out")

    def block(self, x: Tensor, name: str, topk: int, grid: tuple[int, int]) -> Tensor:
        x = x + self.depthwise(x, f"{name}.position")
        x = x + self.attention(self.layer_norm(x, f"{name}.norm1"), f"{name}.attention", topk, grid)
        h = self.conv(self.layer_norm(x, f"{name}.norm2"), f"{name}.glu.enter")
        gated = self.layer_norm(self.depthwise(h, f"{name}.glu.gate") * h, f"{name}.glu.norm")
        return x + self.conv(gated * (1 + torch.erf(gated / 2**0.5)) / 2, f"{name}.glu.leave")

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2] // 32, x.shape[3] // 32) if self.variant == "default" else (2, 2)
        first = self.block(self.down(x, "downs.0", 4), "encoder.0.0", TOPKS[0], grid)
        second = self.block(self.down(first, "downs.1", 2), "encoder.1.0", TOPKS[1], grid)
        x = self.block(self.down(second, "downs.2", 2), "encoder.2.0", TOPKS[2], grid)
        x = self.block(self.up(x, second, "ups.0"), "decoder.0.0", TOPKS[1], grid)
        x = self.block(self.up(x, first, "ups.1"), "decoder.1.0", TOPKS[0], grid)
        return F.interpolate(self.conv(x, "head"), scale_factor=4, mode="bilinear", align_corners=False)


def places(shape: tuple[int, ...], grid: tuple[int, int]) -> Iterator[list[tuple[int, int]]]:
    """Of every window the (row, column) of its tokens."""
    height, width = shape[0] // grid[0], shape[1] // grid[1]
    for row, column in product(range(grid[0]), range(grid[1])):
        yield [(row * height + i, column * width + j) for i in range(height) for j in range(width)]


def attend(q: Tensor, k: Tensor, v: Tensor, topk: int, grid: tuple[int, int], scale: float | None) -> Tensor:
    """(C, H, W) maps of one image -> (C, H, W), a query at a time."""
    out, windows = torch.zeros_like(v), list(places(q.shape[1:], grid))
    scale = q.shape[0] ** -0.5 if scale is None else scale
    keys = [F.normalize(torch.stack([k[:, i, j] for i, j in window]).mean(0), dim=0).detach() for window in windows]
    for window in windows:
        own = F.normalize(torch.stack([q[:, i, j] for i, j in window]).mean(0), dim=0).detach()
        order = sorted(range(len(windows)), key=lambda w: float((own - keys[w]).pow(2).sum()))
        seen = [place for w in order[:topk] for place in windows[w]]
        rows, columns = [i for i, _ in seen], [j for _, j in seen]
        for i, j in window:
            for head in range(0, q.shape[0], HEAD_DIM):
                part = slice(head, head + HEAD_DIM)
                weights = (scale * q[part, i, j] @ k[part][:, rows, columns]).softmax(0)
                out[part, i, j] = v[part][:, rows, columns] @ weights
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_every_gradient_are_those_written_out_in_loops(variant: str) -> None:
    model, x = small(variant), images(variant).requires_grad_()
    found, wanted = model(x), ByHand(model, variant).forward(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    parameters = dict(model.named_parameters())
    weigh = torch.randn_like(found)
    pairs = (torch.autograd.grad((out * weigh).sum(), [x, *parameters.values()]) for out in (found, wanted))
    for name, one, other in zip(["images", *parameters], *pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8, msg=name)
        assert one.abs().max() > 1e-6, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_single_precision_the_forward_pass_is_the_written_one_to_1e_5(variant: str) -> None:
    model, x = small(variant).float(), images(variant).float()
    with torch.no_grad():
        torch.testing.assert_close(model(x), ByHand(model, variant).forward(x), rtol=1e-5, atol=1e-5)


def test_the_loops_can_tell_one_switch_from_another() -> None:
    """Or the comparison above would say nothing."""
    x = images("default")
    wanted = ByHand(small("default"), "default").forward(x)
    for change in ({"scale": "dim"}, {"topks": (1, 3, 3)}, {"topks": (1, 2, 4)}, {"topks": (2, 2, 3)}):
        assert (small("default", **change)(x) - wanted).abs().max() > 1e-3, change


# ------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(("dim", "ratio", "count"), [(128, 2, 129_632), (320, 2, 765_680), (512, 2, 1_931_648)])
def test_a_block_has_the_numbers_of_its_closed_form(dim: int, ratio: int, count: int) -> None:
    block = Block(dim, 4, ratio, Switches())
    assert sum(p.numel() for p in block.parameters()) == count
    assert count == dim**2 * (3.1875 + 2 * ratio) + dim * (66.75 + 13 * ratio)
    assert sum(p.numel() for p in ConvGLU(dim, ratio).parameters()) == 2 * ratio * dim**2 + (13 * ratio + 1) * dim


def test_learned_queries_keys_and_values_are_one_linear_layer_more() -> None:
    counts = [sum(p.numel() for p in MDSA(64, 4, Switches(qkv=qkv)).parameters()) for qkv in ("learned", "shared")]
    assert counts[0] - counts[1] == 3 * 64**2 + 3 * 64


@pytest.mark.parametrize("topk", [1, 2])
def test_with_one_window_nothing_is_seen_beyond_the_window_and_the_convolutions(topk: int) -> None:
    """Windows of 8; a token at (4, 4) reaches 3 further by the aggregation, and 2 by LePE."""
    torch.manual_seed(0)
    module = MDSA(16, topk, Switches(head_dim=8, norm="batch")).eval()
    x = torch.randn(1, 16, 32, 32)
    other = x.clone()
    other[..., 4, 4] += 1
    changed = (module(x, (4, 4)) - module(other, (4, 4))).abs().amax((0, 1)) > 0
    assert changed[:8, :8].all()
    assert bool(changed[10:].any() or changed[:, 10:].any()) == (topk > 1)


def test_every_window_is_among_its_own_also_where_all_are_alike() -> None:
    air = torch.zeros(1, 9, 4, 8)
    alike = torch.ones(1, 9, 4, 8)
    for x in (air, alike, torch.randn(2, 9, 4, 8)):
        chosen = nearest(x, x, 3, own=True)
        assert (chosen == torch.arange(9)[:, None]).any(-1).all()
        assert all(len(set(row)) == 3 for row in chosen.flatten(0, 1).tolist())


def test_no_more_windows_are_chosen_than_there_are() -> None:
    x = torch.randn(1, 4, 4, 8)
    assert nearest(x, x, 16, own=True).shape == (1, 4, 4)
    assert sorted(nearest(x, x, 16, own=False)[0, 0].tolist()) == [0, 1, 2, 3]


def test_the_choice_of_windows_does_not_depend_on_the_precision_of_autocast() -> None:
    torch.manual_seed(0)
    x = 1 + 0.01 * torch.randn(1, 64, 4, 32)  # all nearly alike: rounded to bf16, most would be equally near
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(x, x, 8, own=True)
    assert torch.equal(found, nearest(x, x, 8, own=True))


def test_what_is_dropped_is_a_branch_of_an_image_or_single_numbers() -> None:
    torch.manual_seed(0)
    x = torch.ones(64, 4, 3, 3)
    path, dropout = (Switches(drop=drop, rate=0.5).dropping()(x).flatten(1) for drop in ("path", "dropout"))
    assert set(path.unique().tolist()) == set(dropout.unique().tolist()) == {0.0, 2.0}
    assert (path.amin(1) == path.amax(1)).all()
    assert (dropout.amin(1) < dropout.amax(1)).all()
