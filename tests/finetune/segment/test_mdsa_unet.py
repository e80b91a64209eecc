"""MDSA-UNet as a whole: counts, sizes, padding, precision, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from miram.engine.errors import UserError
from miram.finetune.segment.mdsa_unet import MDSAUNet

SMALL: dict[str, Any] = {"dims": (16, 24, 32), "topks": (1, 2, 4), "head_dim": 8}
PARTS = ("downs", "ups", "encoder", "decoder")


def small(seed: int = 0, **options: Any) -> MDSAUNet:
    torch.manual_seed(seed)
    return MDSAUNet(1, 2, **{**SMALL, **options}).eval()


def picture(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("ratios", "classes", "count"), [((2, 2, 2), 1, 6_576_225), ((3, 2, 2), 1, 6_645_089), ((3, 2, 2), 4, 6_645_476)]
)
def test_counts_are_those_of_the_release_and_of_the_article(ratios: Any, classes: int, count: int) -> None:
    for model in (MDSAUNet(3, classes, ratios), MDSAUNet.released(3, classes, mlp_ratios=ratios)):
        assert sum(p.numel() for p in model.parameters()) == count


def test_parts_have_the_numbers_of_their_closed_forms() -> None:
    model = MDSAUNet(3, 1, (3, 2, 2))
    counts = {name: [sum(p.numel() for p in part.parameters()) for part in getattr(model, name)] for name in PARTS}
    assert counts["downs"] == [24_032, 429_560, 1_694_912]
    assert counts["ups"] == [580_600, 124_720]
    assert counts["encoder"] == [164_064, 765_680, 1_931_648]
    assert counts["decoder"] == [765_680, 164_064]


def test_switches_that_are_not_about_the_count_leave_it_alone() -> None:
    counts = {
        sum(p.numel() for p in small(**change).parameters())
        for change in (
            {},
            {"norm": "batch"},
            {"scale": "dim"},
            {"drop": "dropout"},
            {"windows": 3},
            {"padding": "zero"},
        )
    }
    assert len(counts) == 1


# ------------------------------------------------------------------------------------------ sizes and padding


@pytest.mark.parametrize(
    ("size", "windows"),
    [
        *(((224, 224), windows) for windows in ("auto", 3)),
        ((256, 256), "auto"),
        ((512, 512), "auto"),
        *((size, windows) for size in ((320, 192), (97, 301), (1, 5)) for windows in ("auto", 3)),
    ],
)
@torch.no_grad()
def test_an_image_of_any_size_gets_logits_of_its_size(size: tuple[int, int], windows: Any) -> None:
    out = small(windows=windows, norm="group" if windows == "auto" else "batch")(picture(*size))
    assert out.shape == (1, 2, *size)
    assert out.isfinite().all()


def test_the_full_model_runs_at_the_size_that_the_release_refuses() -> None:
    with torch.no_grad():
        assert MDSAUNet(3, 1).eval()(torch.randn(1, 3, 256, 256)).shape == (1, 1, 256, 256)
        released = MDSAUNet.released().eval()
        assert released(torch.randn(1, 3, 112, 224)).shape == (1, 1, 112, 224)
        with pytest.raises(UserError, match="256 x 256 is no multiple of 112"):
            released(torch.randn(1, 3, 256, 256))


@pytest.mark.parametrize(("windows", "padded"), [("auto", (96, 64)), (3, (96, 96))])
def test_an_odd_size_is_that_of_the_image_continued_at_the_right_and_below(windows: Any, padded: Any) -> None:
    x = picture(70, 50)
    extra = [(0, 0), (0, 0), *((0, to - size) for to, size in zip(padded, (70, 50), strict=True))]
    for padding, mode in (("edge", "edge"), ("zero", "constant")):
        model = small(windows=windows, padding=padding)
        continued = torch.from_numpy(np.pad(x.numpy(), extra, mode=mode))
        assert torch.equal(model(x), small(windows=windows, padding="none")(continued)[..., :70, :50])


def test_a_size_that_windows_divide_is_not_padded() -> None:
    x = picture(64, 96)
    assert torch.equal(small(padding="none")(x), small(padding="zero")(x))


def test_padding_does_not_reach_far_where_windows_are_local_and_norms_fixed() -> None:
    """Exactly 0 beyond what convolutions and own windows of five blocks reach; see the next test for the default."""
    local = {"topks": (1, 1, 1), "norm": "batch"}
    x = picture(32, 1000)  # 24 columns more
    edge, zero = (small(**local, padding=padding)(x) for padding in ("edge", "zero"))
    differs = (edge != zero).any(2)[0].any(0).nonzero()
    assert 1000 - 480 < int(differs.min()) < 1000


def test_what_the_padding_holds_matters_little_inside() -> None:
    """Group norms and the choice of windows see the whole padded image, so that nothing is exact here."""
    x = picture(250, 230)
    edge, zero = (small(padding=padding)(x)[..., :192, :192] for padding in ("edge", "zero"))
    assert 0 < (edge - zero).norm() < 0.12 * (edge - edge.mean()).norm()


# ------------------------------------------------------------------------------------------ training


def test_an_image_has_the_same_logits_whatever_its_batch() -> None:
    x, model = picture(64, 64, batch=3), small().train()
    model.apply(lambda part: setattr(part, "drop_prob", 0.0) if hasattr(part, "drop_prob") else None)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_bf16_is_close_to_fp32() -> None:
    x, model = picture(64, 96), small()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    assert (rounded.float() - exact).norm() < 0.05 * (exact - exact.mean()).norm()


def test_a_backward_pass_does_not_keep_what_windows_gather() -> None:
    """The gathered tokens are made again: K = 16 of 16 windows keep no more than K = 2."""
    kept = {}
    for topk in (2, 16):
        model, storages = small(topks=(topk,) * 3), {}

        def keep(saved: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            out = model(picture(128, 128))
        assert out.requires_grad
        kept[topk] = sum(storages.values())
    assert kept[16] < 1.02 * kept[2]


def test_it_learns_to_mark_discs() -> None:
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    centres = torch.randint(6, 26, (24, 2))
    discs = torch.stack([((rows - i) ** 2 + (columns - j) ** 2 < 25) for i, j in centres.tolist()])
    x = discs[:, None] + 0.5 * torch.randn(24, 1, 32, 32)
    model = small().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(40):
        part = slice(8 * (step % 2), 8 * (step % 2) + 8)
        loss = F.cross_entropy(model(x[part]), discs[part].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = model.eval()(x[16:]).argmax(1).bool()
    dice = 2 * (said & discs[16:]).sum() / (said.sum() + discs[16:].sum())
    assert dice > 0.7  # a mask of everything has 0.14


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dims": (16, 20, 32)}, "multiples of 8 and of head_dim"),
        ({"dims": (16, 24, 40), "head_dim": 16}, "multiples of 8 and of head_dim"),
        ({"topks": (1, 2)}, "topks must be three numbers"),
        ({"mlp_ratios": (0, 2, 2)}, "mlp_ratios must be three numbers above 0"),
        ({"scale": "heads"}, "scale must be one of head, dim, not 'heads'"),
        ({"padding": "mirror"}, "padding must be one of edge, zero, none"),
        ({"windows": 0}, "windows must be"),
        ({"rate": 1.0}, "rate must be in"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        small(**options)
